"""tqdm's progress bar on a terminal or in a notebook; in a log file, one line every SECONDS."""

import sys
from collections.abc import Callable
from typing import Any

from tqdm.auto import tqdm
from tqdm.notebook import tqdm_notebook
from tqdm.std import tqdm as text_bar

SECONDS = 30.0  # between two lines in a log file


class _Lines(text_bar):
    """A progress bar that writes each update as a new line, for log files."""

    @staticmethod
    def status_printer(file) -> Callable[[str], None]:
        def write(status: str) -> None:
            if status:
                sys.stdout.flush()  # earlier output, which may go to the same file
                file.write(f"{status}\n")
                file.flush()

        return write

    def moveto(self, n: int) -> None:
        """Does nothing: every update is a new line."""

    def clear(self, nolock: bool = False) -> None:
        """Does nothing: written lines stay."""


def progress_bar(*args, **options: Any) -> text_bar:
    """A tqdm progress bar, with the arguments of `tqdm`; in a notebook a widget."""
    if sys.stderr.isatty() or issubclass(tqdm, tqdm_notebook):
        return tqdm(*args, **options)
    return _Lines(*args, **{"mininterval": SECONDS, "maxinterval": SECONDS, **options, "dynamic_ncols": False})
