"""Rollouts in a WireGuard mesh that are refused, since hosts would lose each other."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from deploys import mesh, operator
from deploys.fleet import queries, wireguard_guard
from deploys.fleet.pyinfra_process import Answers, Pyinfra
from deploys.inventory.schema import Deployment
from worker.errors import SettingsError

COMMIT = "a" * 40


class Fleet:
    """Hosts that were deployed together with these data."""

    def __init__(self, folder: Path, deployed: dict[str, dict[str, Any]]) -> None:
        self.secrets = folder / "secrets"
        self.keys = {name: f"{name}=" for name in deployed}
        members = mesh.members(
            {name: Deployment(**data) for name, data in deployed.items()}, self.data(deployed)
        )
        self.parts: dict[str, dict[str, Any]] = {
            name: {
                "public_key": self.keys[name],
                "digest": self.digest(member, members),
                "runs": True,
                "peers": {other: key for other, key in self.keys.items() if other != name},
            }
            for name, member in members.items()
        }
        self.silent: set[str] = set()

    def data(self, fleet: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        own = {"secrets_dir": str(self.secrets), "tailscale_serve": {"443": 3000}}
        return {name: data | own | {"ssh_hostname": name} for name, data in fleet.items()}

    def digest(self, of: mesh.Member, members: dict[str, mesh.Member]) -> str:
        return mesh.digest(mesh.configuration(of, members.values(), self.keys))

    def refusal(
        self, monkeypatch: pytest.MonkeyPatch, fleet: dict[str, dict[str, Any]]
    ) -> str | None:
        bare = {"public_key": None, "digest": None, "runs": False, "peers": {}}

        def ask(_: Pyinfra, facts: Sequence[str], hosts: Sequence[str], seconds: int) -> Answers:
            parts = {name: self.parts.get(name, bare) for name in hosts if name not in self.silent}
            states = {name: {"commit": COMMIT if name in self.parts else None} for name in parts}
            return Answers([parts, states], dict.fromkeys(self.silent, "gone"))

        monkeypatch.setattr(queries, "ask", ask)
        listed = [
            {"name": name, "groups": ["workers"], "data": data}
            for name, data in self.data(fleet).items()
        ]
        try:
            wireguard_guard.require_settled(Pyinfra("inventory/x.py"), listed)
        except SettingsError as error:
            return str(error)
        return None


MESH: dict[str, dict[str, Any]] = {name: {"wireguard": True} for name in ("a", "b", "c")}


def test_unchanged_mesh_is_let_through_and_its_keys_are_known_to_each_host_s_own_deploy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also from a machine that has not deployed this fleet: without keys all lose their peers."""
    fleet = Fleet(tmp_path, MESH)
    assert fleet.refusal(monkeypatch, MESH) is None
    assert operator.public_keys(fleet.secrets) == {"a": "a=", "b": "b=", "c": "c="}


@pytest.mark.parametrize(
    ("now", "named"),
    [
        (MESH | {"d": {"wireguard": True}}, "d"),
        (MESH | {"b": {"wireguard": False}}, "a, c"),
        (MESH | {"b": {"wireguard": True, "wireguard_address": "10.86.0.9"}}, "a, b, c"),
        (MESH | {"b": {"wireguard": True, "wireguard_endpoint": "192.0.2.7"}}, "a, c"),
        (MESH | {"b": {"wireguard": True, "wireguard_hub": True}}, "a, b, c"),
        ({name: data for name, data in MESH.items() if name != "b"}, "a, c"),
    ],
)
def test_change_of_the_mesh_is_refused_with_what_to_do(
    now: dict[str, dict[str, Any]], named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refusal = Fleet(tmp_path, MESH).refusal(monkeypatch, now)
    assert refusal is not None
    assert refusal.startswith(f"WireGuard: {named}: connected otherwise than the inventory says")
    assert refusal.endswith(f"pyinfra -y --data release_ref={COMMIT} inventory/x.py deploy.py")


def test_key_that_was_made_anew_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fleet = Fleet(tmp_path, MESH)
    fleet.parts["b"]["public_key"] = "B2="
    refusal = fleet.refusal(monkeypatch, MESH)
    assert refusal is not None
    assert refusal.startswith("WireGuard: a, c: ")


def test_host_that_does_not_answer_is_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if this side never knew its key: the others do."""
    fleet = Fleet(tmp_path, MESH)
    fleet.silent = {"b"}
    assert fleet.refusal(monkeypatch, MESH) is None
    assert operator.public_keys(fleet.secrets) == {"a": "a=", "c": "c="}


def test_fleet_without_a_mesh_is_not_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fleet = Fleet(tmp_path, {})
    assert fleet.refusal(monkeypatch, {"a": {}}) is None
    assert not fleet.secrets.exists()
