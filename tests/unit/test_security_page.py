"""Every test that docs/security.md names exists."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
_NAMED = re.compile(r"`([a-z_]+/test_\w+\.py)(?:::(test_\w+))?`")


def test_page_names_tests_that_exist() -> None:
    named = _NAMED.findall((ROOT / "docs/security.md").read_text())
    assert len(named) > 40
    for file, test in named:
        path = ROOT / "tests" / file
        assert path.is_file(), file
        assert not test or f"def {test}(" in path.read_text(), f"{file}::{test}"
