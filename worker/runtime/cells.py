"""Text of others in tables, progress lines and panels of rich: shown as it is, never as markup."""

from rich.console import Console
from rich.table import Table
from rich.text import Text

from worker.log import printable


def cell(text: object, style: str = "") -> Text:
    """Return `text` for a cell or a line, in one style, its control characters made visible."""
    return Text(printable(str(text)), style=style)


def add_row(table: Table, *values: object) -> None:
    """Add a row; what is not a cell yet becomes one."""
    table.add_row(*(value if isinstance(value, Text) else cell(value) for value in values))


def say(console: Console, text: str, style: str = "") -> None:
    """Print one line, as it is, not wrapped."""
    console.print(cell(text, style), soft_wrap=True, highlight=False)
