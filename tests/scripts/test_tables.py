"""The tables that `make docs` writes into pages."""

import runpy
from pathlib import Path

import pytest

with_table = runpy.run_path(str(Path(__file__).parents[2] / "scripts/tables"))["with_table"]

PAGE = "# Page\n\n| a | b |\n| - | - |\n| 1 | 2 |\n\nText.\n\n| c |\n| - |\n"


def test_table_with_the_same_head_is_replaced_and_nothing_else() -> None:
    new = "| a | b |\n| - | - |\n| 3 | 4 |\n| 5 | 6 |"
    assert with_table(PAGE, new) == PAGE.replace("| 1 | 2 |", "| 3 | 4 |\n| 5 | 6 |")
    assert with_table(PAGE, "| c |\n| - |\n| 7 |") == f"{PAGE}| 7 |\n"


def test_page_without_the_table_or_with_two_is_refused() -> None:
    for page in ("# Page\n", PAGE + PAGE):
        with pytest.raises(
            ValueError, match=r"tables that begin with .\| a \| b \|.; expected one"
        ):
            with_table(page, "| a | b |\n| - | - |")
