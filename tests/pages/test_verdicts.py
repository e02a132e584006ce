"""The last audit's report as the dashboard reads it: new, damaged, foreign, gone."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from worker.dashboard.verdicts import Verdicts

CONTRACT = "0x" + "Aa" * 20
FIGURES = {"audited": 2, "unaudited": 1, "contradicted": 0}


def report(**changes: Any) -> str:
    content = {"version": 1, "contract": CONTRACT, "updated_at": 9.0, "peers": {"QmA": FIGURES}}
    return json.dumps({**content, "sums": {"QmA": {**FIGURES, "audited": 700}}, **changes})


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "audit.json"


def test_report_is_read_and_followed(file: Path) -> None:
    verdicts = Verdicts(file)
    verdicts.look(CONTRACT)
    assert verdicts.told() == {"updated_at": None, "error": "no report yet"}
    assert verdicts.audited_reward("QmA") is None
    file.write_text(report())
    verdicts.look(CONTRACT)
    assert verdicts.of("QmA") == FIGURES
    assert verdicts.of("QmB") is None
    assert (verdicts.audited_reward("QmA"), verdicts.audited_reward("QmB")) == (700, 0)
    assert verdicts.told() == {"updated_at": 9.0, "error": None}
    file.unlink()
    verdicts.look(CONTRACT)
    assert verdicts.told() == {"updated_at": None, "error": "no report yet"}
    assert verdicts.of("QmA") is None


def test_report_of_an_earlier_version_has_no_sums(file: Path) -> None:
    file.write_text(report(sums={}))
    verdicts = Verdicts(file)
    verdicts.look(CONTRACT)
    assert (verdicts.of("QmA"), verdicts.audited_reward("QmA")) == (FIGURES, None)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "[" * 100_000, report(peers={"QmA": {}}), report(peers={"QmA": 1})],
)
def test_damaged_report_counts_as_none(file: Path, text: str) -> None:
    file.write_text(text)
    verdicts = Verdicts(file)
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(1000)  # web3 raises it; the command line sets it back
    try:
        verdicts.look(CONTRACT)
    finally:
        sys.setrecursionlimit(limit)
    assert verdicts.told() == {"updated_at": None, "error": "the report can't be read"}


@pytest.mark.parametrize("changes", [{"contract": "0x" + "bb" * 20}, {"version": 2}])
def test_foreign_report_counts_as_none(file: Path, changes: dict[str, Any]) -> None:
    file.write_text(report(**changes))
    verdicts = Verdicts(file)
    verdicts.look(CONTRACT)
    assert verdicts.told()["error"] == "the report is of another contract or version"
