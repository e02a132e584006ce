"""Show untrusted text literally in rich's tables, progress lines and panels, never as markup."""

from rich.console import Console
from rich.table import Table
from rich.text import Text

from worker.log import printable


def cell(text: object, style: str = "") -> Text:
    """Return `text` as a cell or line in one style, with control characters escaped."""
    return Text(printable(str(text)), style=style)


def add_row(table: Table, *values: object) -> None:
    """Add a row; values that are not cells yet become cells."""
    cells = [value if isinstance(value, Text) else cell(value) for value in values]
    table.add_row(*cells)


def say(
    console: Console,
    text: str,
    style: str = "",
) -> None:
    """Print one line literally, without wrapping."""
    console.print(cell(text, style), soft_wrap=True, highlight=False)
