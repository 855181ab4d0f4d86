"""Keyword arguments of Python functions from the dataclasses that make the flags."""

import inspect
from collections.abc import Callable
from dataclasses import MISSING, fields
from typing import TypeVar, get_type_hints

from arguments_umae import PROGRAMS

F = TypeVar("F", bound=Callable)


def keywords(program: str) -> Callable[[F], F]:
    """Gives a function of `**given` the signature of a program's arguments and their help, for notebooks."""

    def decorate(function: F) -> F:
        parameters, lines = [], []
        for kind in PROGRAMS[program][0]:
            hints = get_type_hints(kind)
            for field in fields(kind):
                default = inspect.Parameter.empty if field.default is MISSING else field.default
                parameters.append(
                    inspect.Parameter(
                        field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hints[field.name]
                    )
                )
                lines.append(f"        {field.name}: {field.metadata['help'].replace('%%', '%')}")
        signature = inspect.Signature(parameters, return_annotation=get_type_hints(function)["return"])
        setattr(function, "__signature__", signature)  # noqa: B010  # which no type of functions has
        summary, _, rest = (function.__doc__ or "").partition("\n    Returns:")
        function.__doc__ = f"{summary}\n    Args:\n" + "\n".join(lines) + f"\n\n    Returns:{rest}"
        return function

    return decorate
