"""Lines and tables on standard output."""

import sys

from rich.console import Console
from rich.table import Table
from rich.text import Text

from askewq.text import printable

# Into a file or a pipe every row of a table is one line. Where nobody reads any more, as after
# `askewq ... | head`, the console ends the command, without a traceback.
_WIDTH = None if sys.stdout.isatty() else 200
console = Console(highlight=False, soft_wrap=True, emoji=False, width=_WIDTH)


def say(*lines: str) -> None:
    """Print lines as they are, but for what a terminal would obey."""
    for line in lines:
        console.print(printable(line), markup=False)


def note(text: str) -> None:
    """Say something that is out of the ordinary."""
    say(f"note: {text}")


def row(table: Table, *cells: str) -> None:
    """Add a row of such texts to a table."""
    table.add_row(*(Text(printable(cell)) for cell in cells))
