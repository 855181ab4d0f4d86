"""tqdm's progress bar on a terminal; elsewhere, in a log file, a line now and then."""

import sys
from collections.abc import Callable
from typing import Any

from tqdm.auto import tqdm
from tqdm.notebook import tqdm_notebook
from tqdm.std import tqdm as text_bar

SECONDS = 30.0  # between two lines of a log file


class _Lines(text_bar):
    """A bar whose states are lines of their own, since a log file keeps all of them."""

    @staticmethod
    def status_printer(file) -> Callable[[str], None]:
        def write(status: str) -> None:
            if status:
                sys.stdout.flush()  # what was printed before, into the same file
                file.write(f"{status}\n")
                file.flush()

        return write

    def moveto(self, n: int) -> None:
        """There is no line above to go back to."""

    def clear(self, nolock: bool = False) -> None:
        """A line that is written stays."""


def progress_bar(*args, **options: Any) -> text_bar:
    """As `tqdm`, with the same arguments; in a notebook its widget."""
    if sys.stderr.isatty() or issubclass(tqdm, tqdm_notebook):
        return tqdm(*args, **options)
    return _Lines(*args, **{"mininterval": SECONDS, "maxinterval": SECONDS, **options, "dynamic_ncols": False})
