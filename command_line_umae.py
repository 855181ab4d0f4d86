"""The command `umae`, and the command lines of the programs: flags from dataclasses, recipes of the same names.

Beside the package rather than in it, whose import takes seconds that `--help` and typing errors need not wait for.
"""

import argparse
import gc
import importlib
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

from arguments_umae import PROGRAMS, field_names, nearest

# Of the command: what it does, and the module with its `main`; those without one are programs, see `arguments_umae`
VERBS = {
    "pretrain": ("pre-train on images, without labels", None),
    "probe": ("evaluate a frozen encoder: linear heads, k-NN, attentive probe", None),
    "finetune": ("fine-tune an encoder on labelled images", None),
    "evaluate": ("evaluate a classifier as it is, without training", "umae.evaluation.classification"),
    "features": ("write the features of images to files", "umae.evaluation.feature_files"),
    "diagnose": ("measure how far features have collapsed", "umae.evaluation.diagnosis"),
    "demo": ("open a page in the browser to try a model, or two side by side", None),
    "study": ("compare settings: a grid of runs, their evaluations, a table and figures", None),
    "report": ("write one page that compares runs and probes", "umae.sharing.report"),
    "convert": (
        "convert checkpoints of MAE, U-MAE, ViTMAE and ViT, and ours to ONNX, timm and back",
        "umae.convert.command",
    ),
    "shrink": ("copy a folder of images with the large ones made smaller, which loads faster", None),
    "push": ("share a folder on the Hugging Face Hub", "umae.sharing.hub"),
    "push-space": ("share a page that `umae demo` has exported as a Space", "umae.sharing.spaces"),
}


def main(argv: Sequence[str] | None = None) -> None:
    """The command `umae VERB ...`."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: umae VERB ... (umae VERB --help lists its arguments)\n")
        print("\n".join(f"  {verb:<10} {text}" for verb, (text, _) in VERBS.items()))
        return
    verb, *rest = argv
    if verb not in VERBS:
        raise SystemExit(f"umae: unknown verb {verb!r}{nearest(verb, list(VERBS))}")
    module = VERBS[verb][1]
    with one_line_refusals(f"umae {verb}", PROGRAMS[verb][0] if module is None else ()):
        if module is None:
            run_program(verb, rest, f"umae {verb}")
        else:
            imported(module).main(rest)


def run_program(name: str, argv: Sequence[str], title: str | None = None) -> Any:
    """Parse the command line of a program, then import and run it.

    Args:
        name: one of PROGRAMS.
        title: what `--help` calls it; by default the file that was started.
    """
    types, arguments = PROGRAMS[name]
    instances = arguments(given_flags(types, argv, title))  # slips of the pen are answered before the long import
    return imported(f"umae.programs.{name}").run(*instances)


def imported(name: str) -> Any:
    """The module. Python does not look for garbage among what is imported, which takes seconds: not meanwhile, and not
    later, in this process and in those that load images, nor at the end."""
    if name not in sys.modules:
        was_enabled = gc.isenabled()
        gc.disable()
        try:
            importlib.import_module(name)
        finally:
            if was_enabled:
                gc.enable()
        gc.freeze()
    return sys.modules[name]


class _OneLine(argparse.HelpFormatter):
    """A flag and its help on one line; HfArgumentParser's second spelling of each (`--mask-ratio`) works unsaid."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=36, width=120)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        choices = " " + "|".join(map(str, action.choices)) if action.choices else ""
        # More choices than the column takes are named by the help
        return action.option_strings[0] + (choices if len(choices) < 20 else "")


def given_flags(types: Sequence[type], argv: Sequence[str], title: str | None = None) -> dict[str, Any]:
    """The values on a command line by the names of their flags, without those that are left at their defaults.

    Raises:
        ValueError: an unknown flag; the nearest name is given.
        SystemExit: argparse's own refusals (status 2) and `--help` (status 0).
    """
    alone = {arg.name: arg.metadata["metavar"] for kind in types for arg in fields(kind) if "metavar" in arg.metadata}
    usage = " ".join(["%(prog)s", *alone.values(), "[--flag value ...] (--help lists the flags)"])
    HfArgumentParser = imported("transformers.hf_argparser").HfArgumentParser  # takes a second or two
    parser = HfArgumentParser(types, prog=title, allow_abbrev=False, usage=usage, formatter_class=_OneLine)
    for action in parser._actions:
        action.required, action.default = False, argparse.SUPPRESS
    given, unknown = parser.parse_known_args(list(argv))
    for name in alone:
        if unknown and not unknown[0].startswith("-") and name not in given:
            setattr(given, name, unknown.pop(0))
    if unknown:
        name = unknown[0].split("=")[0]
        raise ValueError(f"unknown argument {name}{nearest(name.lstrip('-'), field_names(types), '--')}")
    return vars(given)


@contextmanager
def one_line_refusals(title: str, types: Sequence[type] = ()) -> Iterator[None]:
    """End the program with one line and status 1 where the input is wrong or training has failed.

    Args:
        types: the dataclasses of the program's flags. The package names parameters; where the program has a flag for
            one, `output_dir`, the line says `--output_dir`. Names without an underscore are words and stay as they are.
    """
    try:
        yield
    except (ValueError, FloatingPointError, OSError) as error:
        raise SystemExit(f"{title}: {_with_dashes(str(error), types)}") from error


def _with_dashes(text: str, types: Sequence[type]) -> str:
    names = field_names(types)
    if text.split(" ")[0].removesuffix(":") in names:  # what the line is about, whatever it is called
        text = f"--{text}"
    names = [name for name in names if "_" in name]
    if not names:
        return text
    # Neither quoted nor a part of a path
    return re.sub(rf"(?<![\w/.'\"`-])({'|'.join(names)})(?![\w/'\"`]|\.\w)", r"--\1", text)


if __name__ == "__main__":
    main()
