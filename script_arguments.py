"""Command lines from dataclasses: one field a flag, recipes of the same names, errors that help.

Beside the scripts rather than in the package, whose import takes seconds that `--help` need not wait for.
"""

import argparse
import dataclasses
import difflib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml
from transformers.hf_argparser import HfArgumentParser


@dataclasses.dataclass(frozen=True)
class Between:
    """The range of a number, for annotations: `Annotated[int, Between(1)]` is at least 1, and never NaN or infinite."""

    low: float
    high: float = math.inf


class _Yaml(yaml.SafeLoader):
    """YAML, with `5e-4` a number as in YAML 1.2; PyYAML reads text unless it is `5.0e-4`."""


_Yaml.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def flag(default: Any, help: str) -> Any:
    """A dataclass field that becomes a flag; a default that needs no explanation is shown in brackets."""
    shown = "" if default is None or default is False else f" [{default}]"
    return dataclasses.field(default=default, metadata={"help": help + shown})


class _OneLine(argparse.HelpFormatter):
    """A flag and its help on one line; HfArgumentParser's second spelling of each (`--mask-ratio`) works unsaid."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=36, width=120)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        choices = " " + "|".join(map(str, action.choices)) if action.choices else ""
        return action.option_strings[0] + choices


def parse_arguments(types: Sequence[type], argv: Sequence[str], read_recipe: bool = True) -> tuple:
    """One instance of every dataclass in `types`. Flags override the recipe (`--recipe file.yaml`), which overrides
    the defaults. Without `read_recipe` flags and defaults alone count.

    Raises:
        ValueError: an unknown flag or recipe key (the nearest name is given), a value of a recipe that is not of its
            field's type, or a number out of its range.
        SystemExit: argparse's own refusals (status 2) and `--help` (status 0).
    """
    usage = "%(prog)s [--flag value ...] (--help lists the flags)"
    parser = HfArgumentParser(types, allow_abbrev=False, usage=usage, formatter_class=_OneLine)
    hints = {name: hint for one in types for name, hint in get_type_hints(one).items()}
    recipe = _recipe_of(argv) if read_recipe else None
    if recipe is not None:
        values = _read_recipe(Path(recipe), hints)
        parser.set_defaults(**values)
        for action in parser._actions:
            action.required = action.required and action.dest not in values
    *parsed, unknown = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True, look_for_args_file=False)
    if unknown:
        name = unknown[0].split("=")[0]
        raise ValueError(f"unknown argument {name}{_nearest(name.lstrip('-'), list(hints), '--')}")
    for instance in parsed:
        _check_ranges(instance)
    return tuple(parsed)


@contextmanager
def one_line_refusals(program: str, types: Sequence[type] = ()) -> Iterator[None]:
    """End the program with one line and status 1 where the input is wrong or training has failed.

    Args:
        types: the dataclasses of the program's flags. The package names parameters; where the program has a flag for
            one, `output_dir`, the line says `--output_dir`. Names without an underscore are words and stay as they are.
    """
    try:
        yield
    except (ValueError, FloatingPointError) as error:
        raise SystemExit(f"{program}: {_with_dashes(str(error), types)}") from error


def _with_dashes(text: str, types: Sequence[type]) -> str:
    names = [field.name for one in types for field in dataclasses.fields(one) if "_" in field.name]
    if not names:
        return text
    # Neither quoted nor a part of a path
    return re.sub(rf"(?<![\w/.'\"`-])({'|'.join(names)})(?![\w/'\"`]|\.\w)", r"--\1", text)


def parse_overrides(given: Mapping[str, Any] | str | None, names: Sequence[str], flag_name: str) -> dict[str, Any]:
    """`hidden_size=192,pooling=mean` -> {"hidden_size": 192, "pooling": "mean"}, values read as YAML; a block of a
    recipe, which has types, stays as it is.

    Raises:
        ValueError: a part without `=`, a value that is no YAML, or a name not in `names` (the nearest is given).
    """
    if isinstance(given, Mapping):
        overrides = dict(given)
    else:
        overrides = {}
        for part in filter(None, (given or "").split(",")):
            name, equals, value = part.partition("=")
            if not equals:
                raise ValueError(f"{flag_name}: {part!r} is not name=value")
            overrides[name.strip()] = _read_yaml(flag_name, value)
    for name in overrides:
        if name not in names:
            raise ValueError(f"{flag_name}: unknown name {name!r}{_nearest(str(name), names)}")
    return overrides


def check_launch(environ: Mapping[str, str], num_processes: int) -> None:
    """Refuse a launch whose processes do not know of each other and would all do, and write, the same.

    Raises:
        ValueError: the launcher started `WORLD_SIZE` processes, but Accelerate counts fewer.
    """
    world_size = int(environ.get("WORLD_SIZE", "1"))
    if world_size != num_processes:
        raise ValueError(
            f"the launcher started {world_size} processes, but Accelerate sees {num_processes}: they would run as "
            f"independent copies. On CPUs start them with `ACCELERATE_USE_CPU=1 torchrun --nproc_per_node N ...`, on "
            f"GPUs with `accelerate launch --num_processes N ...`"
        )


def _recipe_of(argv: Sequence[str]) -> str | None:
    """The value of the last `--recipe` on the command line."""
    recipe = None
    for i, word in enumerate(argv):
        if word == "--recipe" and i + 1 < len(argv):
            recipe = argv[i + 1]
        elif word.startswith("--recipe="):
            recipe = word.partition("=")[2]
    return recipe


def _read_recipe(path: Path, hints: Mapping[str, Any]) -> dict[str, Any]:
    """The names and values of a recipe file, each of the type of its field."""
    if not path.is_file():
        raise ValueError(f"there is no recipe {path}; give the path of a YAML file")
    recipe = _read_yaml(str(path), path.read_text()) or {}
    if not isinstance(recipe, dict):
        raise ValueError(f"{path} holds no names and values; expected lines such as `mask_ratio: 0.75`")
    for name in recipe:
        if name not in hints or name == "recipe":
            raise ValueError(f"{path}: unknown key {name!r}{_nearest(str(name), list(hints))}")
    return {name: _typed(f"{path}: {name}", value, hints[name]) for name, value in recipe.items()}


def _read_yaml(where: str, text: str) -> Any:
    try:
        return _Yaml(text).get_single_data()
    except yaml.YAMLError as error:
        raise ValueError(f"{where} is no YAML: {' '.join(str(error).split())}") from error


def _typed(name: str, value: Any, hint: Any) -> Any:
    """The value of a recipe as a field of that type has it; raises `ValueError` where it is of another."""
    kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    for kind in kinds:
        if get_origin(kind) is Literal:
            # YAML reads an unquoted `no` or `off` as false
            chosen = ("yes" if value else "no") if isinstance(value, bool) else value
            if chosen in get_args(kind):
                return chosen
        elif isinstance(value, get_origin(kind) or kind) and isinstance(value, bool) == (kind is bool):
            return value
        elif kind is float and type(value) is int:
            return float(value)
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text (in quotes)", NoneType: "null"}
    *others, last = (
        "one of " + ", ".join(get_args(kind)) if get_origin(kind) is Literal else words.get(kind, "names and values")
        for kind in kinds
    )
    found = json.dumps(value) if value is None or isinstance(value, bool) else repr(value)
    raise ValueError(f"{name} is {found}, expected {' or '.join([', '.join(others), last] if others else [last])}")


def _nearest(name: str, names: Sequence[str], prefix: str = "") -> str:
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"; did you mean {prefix}{close[0]}?" if close else f"; known are {', '.join(sorted(names))}"


def _check_ranges(instance: Any) -> None:
    for name, hint in get_type_hints(type(instance), include_extras=True).items():
        value = getattr(instance, name)
        for limit in getattr(hint, "__metadata__", ()):
            if value is not None and not (limit.low <= value <= limit.high and math.isfinite(value)):
                above = "" if limit.high == math.inf else f" and at most {limit.high:g}"
                raise ValueError(f"--{name} must be at least {limit.low:g}{above}, got {value}")
