"""Untrusted text in tables: markup, emoji codes and terminal escapes are shown literally."""

import ast
import io
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

from rich.console import Console
from rich.table import Table

from worker.commands import audit, reports
from worker.runtime.cells import add_row, cell, say

ROOT = Path(__file__).resolve().parents[2]
HOSTILE = "dial [/ip4/1.2.3.4/tcp/1] [red]x[/red] [link=file:///etc]y[/link] :bomb: \x1b[2J"
SHOWN = HOSTILE.replace("\x1b", "\\x1b")


def printed(draw) -> str:
    out = io.StringIO()
    draw(Console(file=out, width=200))
    return out.getvalue()


def test_cells_and_lines_show_what_is_there():
    table = Table()
    table.add_column("reason")
    add_row(table, HOSTILE)
    add_row(table, cell(HOSTILE, "red"))
    assert printed(lambda console: console.print(table)).count(SHOWN) == 2
    assert printed(lambda console: say(console, HOSTILE)) == SHOWN + "\n"


def test_audit_with_markup_in_its_reasons_is_printed(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    own = {
        "round": 3,
        "peer_id": "[/peer]",
        "claimed": 500,
        "verdict": "unaudited",
        "reason": HOSTILE,
    }
    finding = audit.Finding(**(dict.fromkeys(field.name for field in fields(audit.Finding)) | own))
    audit._print(SimpleNamespace(findings={(3, 0): finding}), tmp_path)
    assert SHOWN in capsys.readouterr().out


def test_ledger_with_markup_in_its_reasons_is_printed():
    from worker.chain.ledger import Row

    own = {"round": 1, "reward": 500, "winners": (), "reward_reason": HOSTILE}
    row = Row(**(dict.fromkeys(field.name for field in fields(Row)) | own))
    assert SHOWN in printed(lambda console: console.print(reports._ledger_table([row])))


def test_nobody_hands_rich_text_that_it_would_read_as_markup():
    """Rows are made by add_row, lines by say: strings that are put together are never markup."""
    wrong = []
    for file in [*(ROOT / "worker").rglob("*.py"), *(ROOT / "deploys").rglob("*.py")]:
        text = file.read_text()
        if "rich" not in text or file.name == "cells.py":
            continue
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and node.module == "rich.markup":
                wrong.append(f"{file}:{node.lineno}: rich.markup; use worker.runtime.cells")
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            if node.func.attr in ("add_row", "from_markup"):
                wrong.append(f"{file}:{node.lineno}: {node.func.attr}; use worker.runtime.cells")
            prints = node.func.attr == "print" and "console" in ast.unparse(node.func).lower()
            if prints and any(isinstance(what, ast.JoinedStr | ast.Constant) for what in node.args):
                wrong.append(f"{file}:{node.lineno}: a string; use say of worker.runtime.cells")
    assert wrong == []
