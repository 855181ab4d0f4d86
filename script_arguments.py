"""Command lines from dataclasses: one field a flag, recipes of the same names, errors that help.

Beside the scripts rather than in the package, whose import takes seconds that `--help` need not wait for.
"""

import argparse
import dataclasses
import difflib
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_type_hints

import yaml
from transformers.hf_argparser import HfArgumentParser


@dataclasses.dataclass(frozen=True)
class Between:
    """The range of a number, for annotations: `Annotated[int, Between(1)]` is at least 1, and never NaN or infinite."""

    low: float
    high: float = math.inf


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


def parse_arguments(types: Sequence[type], argv: Sequence[str]) -> tuple:
    """One instance of every dataclass in `types`. Flags override the recipe (`--recipe file.yaml`), which overrides
    the defaults.

    Raises:
        ValueError: an unknown flag or recipe key (the nearest name is given), or a number out of its range.
        SystemExit: argparse's own refusals (status 2) and `--help` (status 0).
    """
    usage = "%(prog)s [--flag value ...] (--help lists the flags)"
    parser = HfArgumentParser(types, allow_abbrev=False, usage=usage, formatter_class=_OneLine)
    names = [field.name for one in types for field in dataclasses.fields(one)]
    *_, unknown = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True, look_for_args_file=False)
    if unknown:
        name = unknown[0].split("=")[0]
        raise ValueError(f"unknown argument {name}{_nearest(name.lstrip('-'), names, '--')}")
    recipe = _recipe_of(argv)
    if recipe is not None:
        argv = [*_recipe_flags(Path(recipe), names), *argv]
    parsed = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
    for instance in parsed:
        _check_ranges(instance)
    return parsed


@contextmanager
def one_line_refusals(program: str) -> Iterator[None]:
    """End the program with one line and status 1 where the input is wrong or training has failed."""
    try:
        yield
    except (ValueError, FloatingPointError) as error:
        raise SystemExit(f"{program}: {error}") from error


def parse_overrides(text: str | None, names: Sequence[str], flag_name: str) -> dict[str, Any]:
    """`hidden_size=192,pooling=mean` -> {"hidden_size": 192, "pooling": "mean"}, values read as YAML.

    Raises:
        ValueError: a part without `=`, or a name that is not in `names` (the nearest is given).
    """
    overrides = {}
    for part in filter(None, (text or "").split(",")):
        name, equals, value = part.partition("=")
        name = name.strip()
        if not equals or name not in names:
            raise ValueError(f"{flag_name}: {part!r} is not name=value with a known name{_nearest(name, names)}")
        overrides[name] = yaml.safe_load(value)
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


def _recipe_flags(path: Path, names: Sequence[str]) -> list[str]:
    """A recipe file as the flags that it stands for."""
    if not path.is_file():
        raise ValueError(f"there is no recipe {path}; give the path of a YAML file")
    recipe = yaml.safe_load(path.read_text()) or {}
    if not isinstance(recipe, dict):
        raise ValueError(f"{path} holds no names and values; expected lines such as `mask_ratio: 0.75`")
    words = []
    for name, value in recipe.items():
        if name not in names or name == "recipe":
            raise ValueError(f"{path}: unknown key {name!r}{_nearest(str(name), names)}")
        if isinstance(value, dict):  # config_overrides, written as a block
            value = ",".join(f"{key}={inner}" for key, inner in value.items())
        words.append(f"--{name}={str(value).lower() if isinstance(value, bool) else value}")
    return words


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
