"""The names in a state folder, a contract with state folders and backups of earlier versions."""

import ast
from pathlib import Path

from worker.runtime.state_dir import StateDir

WORKER = Path(__file__).parents[2] / "worker"
NAMES = {
    "identity": "swarm.pem",
    "enrolment": "enrolment.json",
    "account_token": "account.token",
    "wallet": "wallet",
    "model_choice": "model.json",
    "form": "form.json",
    "rows": "rows.json",
    "budget": "budget.json",
    "memory_killed": "memory-killed",
    "checkpoints": "checkpoints",
    "ledger": "ledger.db",
    "groups": "groups",
    "peers": "peers.json",
    "status": "status.json",
    "rounds": "rounds.jsonl",
    "evaluations": "evaluations.jsonl",
    "answers": "answers",
    "hub": "hub",
    "lock": "lock",
}


def test_names_of_earlier_versions_stay() -> None:
    assert {name: getattr(StateDir, name) for name in NAMES} == NAMES


def test_paths_are_in_the_folder(tmp_path: Path) -> None:
    files = StateDir(tmp_path)
    assert {name: getattr(files, name) for name in NAMES} == {
        name: tmp_path / file for name, file in NAMES.items()
    }


def test_no_other_module_names_these_files() -> None:
    # Only names with a suffix: words such as "wallet" and "lock" occur everywhere.
    ours = {name for name in NAMES.values() if "." in name}
    found = []
    for file in sorted(WORKER.rglob("*.py")):
        # The keeper has a status in a folder of its own.
        if file.name in ("state_dir.py", "keeper_status.py"):
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Constant) and node.value in ours:
                found.append(f"{file.relative_to(WORKER)}:{node.lineno}: {node.value}")
    assert found == []
