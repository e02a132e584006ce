"""Upgrades in place: a good one keeps the contract's state, and a bad one is refused."""

import copy
import json
import shutil
import subprocess
from pathlib import Path

import pytest
from eth_account import Account

from worker.chain import contract, peer_proof, storage_layout, upgrade
from worker.chain.client import NonceUsed
from worker.chain.coordinator import Coordinator
from worker.chain.embedded import anvil
from worker.errors import ChainError

ROOT = Path(__file__).resolve().parents[2]
RELEASES = {
    f"hivewright/{number}": json.loads(
        (Path(__file__).parent / f"releases/{number}.json").read_text()
    )
    for number in (1, 2)
}
FIRST_RELEASE = RELEASES["hivewright/1"]


@pytest.fixture
def released(chain, monkeypatch, request) -> Coordinator:
    """Deploy an older release (by default the first), with a peer that earned in round 0."""
    release = RELEASES[getattr(request, "param", "hivewright/1")]
    shutil.rmtree(chain.settings.keeper.state_dir)
    with monkeypatch.context() as patch:
        first = {**contract.artifact("SwarmCoordinator"), **release}
        carried = contract.artifact
        patch.setattr(
            contract,
            "artifact",
            lambda name: first if name == "SwarmCoordinator" else carried(name),
        )
        patch.setattr(upgrade, "bring_up_to_date", lambda *arguments: None)
        anvil.deploy(chain.settings)
    client = Coordinator(chain.settings.chain)
    client.check()
    account = Account.create()
    for call in (
        client.register_peer("other"),
        client.register_peer("peer"),
        client.submit_reward(0, 0, 410, "peer"),
        client.submit_winners(0, ["a", "b"], "peer"),
    ):
        client.transact(account, call, 10)
    client.transact(anvil.load_owner(chain.settings.keeper), client.advance_round(0), 10)
    return client


def carry(monkeypatch, changed: dict) -> None:
    """Let this package carry another build of the coordinator."""
    carried = contract.artifact
    monkeypatch.setattr(
        contract, "artifact", lambda name: changed if name == "SwarmCoordinator" else carried(name)
    )


def books(client: Coordinator) -> dict:
    return {
        "round": client.current_round(),
        "reward": client.submitted_reward(0, 0, "peer"),
        "total": client.total_rewards(["peer", "other"]),
        "votes": client.votes(0, "peer"),
        "board": client.winner_leaderboard(0, 9),
        "owner": client.owner_of("peer"),
        "peers": client.read("getPeerId(address[])", [client.owner_of("peer")])[0],
    }


@pytest.mark.parametrize("released", RELEASES, indirect=True)
def test_deploy_upgrades_a_released_version_and_keeps_its_books(chain, released, capsys):
    before, version = books(released), released.version
    assert peer_proof.is_checked(released) == (version != "hivewright/1")
    deployed = anvil.deploy(chain.settings)
    captured = capsys.readouterr()
    assert (
        f"upgraded {deployed.contract} from {version} to {contract.carried_version()}"
        in captured.err
    )
    assert (
        json.loads(captured.out.splitlines()[-1])["contract"]
        == deployed.contract
        == released.deployment.contract
    )
    client = Coordinator(chain.settings.chain)
    client.check()
    assert client.version == contract.carried_version()
    assert books(client) == before
    # What came with the new version works on what was there before.
    has_submitted = "hasSubmittedRoundStageReward(uint256,uint256,string)"
    assert [client.read(has_submitted, 0, 0, peer) for peer in ("peer", "other")] == [True, False]
    new, old = Account.create(), peer_proof.binding(client, "peer")
    assert (old.account, old.is_proven, old.moves) == (before["owner"], False, 0)
    client.transact(new, client.register_peer("third"), 10)


def test_deploy_again_upgrades_nothing(chain, capsys):
    transactions = chain.coordinator.nonce(chain.owner.address)
    anvil.deploy(chain.settings)
    assert chain.coordinator.nonce(chain.owner.address) == transactions
    assert capsys.readouterr().err == ""


def test_upgrade_waits_for_its_turn_with_the_keeper_s_key(chain, released, monkeypatch):
    """A nonce that the keeper of the running swarm took with the same key is not the end."""
    taken = []
    transact = Coordinator.transact

    def take_the_first(self, account, call, seconds, nonce=None):
        if not taken:
            taken.append(call)
            raise NonceUsed("taken")
        return transact(self, account, call, seconds, nonce)

    monkeypatch.setattr(Coordinator, "transact", take_the_first)
    anvil.deploy(chain.settings)
    assert taken
    client = Coordinator(chain.settings.chain)
    client.check()
    assert client.version == contract.carried_version()


def test_contract_of_another_owner_is_left(chain, released, caplog):
    key = chain.settings.keeper.state_dir / anvil.OWNER_KEY_FILE
    key.unlink()
    anvil.deploy(chain.settings)  # nobody's key: nothing to say
    anvil.load_owner(chain.settings.keeper, create=True)
    anvil.deploy(chain.settings)
    assert "contract not upgraded, this account is not its owner account=" in caplog.text
    released.check()
    assert released.version == "hivewright/1"


def test_newer_version_is_left(chain, monkeypatch, caplog):
    """A host that was rolled back does not roll the swarm's contract back."""
    carry(
        monkeypatch,
        {**contract.artifact("SwarmCoordinator"), **FIRST_RELEASE, "runtime_sha256": "00"},
    )
    anvil.deploy(chain.settings)
    assert (
        "contract not upgraded, it is newer version=hivewright/3 ours=hivewright/1" in caplog.text
    )


def test_unknown_implementation_is_not_upgraded(chain, monkeypatch):
    """The storage layout of an unknown build of the same version is not known."""
    (chain.settings.keeper.state_dir / upgrade.NOTE_FILE).unlink()
    monkeypatch.setattr(upgrade, "releases", lambda name: [])
    carry(monkeypatch, {**contract.artifact("SwarmCoordinator"), "runtime_sha256": "00"})
    with pytest.raises(
        ChainError,
        match=r"runs hivewright/3 .* its storage layout is not known, and an upgrade might",
    ):
        anvil.deploy(chain.settings)


@pytest.fixture(scope="session")
def changed(tmp_path_factory, anvil_binary) -> dict:
    """Return a real build of our contract with a variable inserted before the others."""
    folder = tmp_path_factory.mktemp("changed")
    for file in (ROOT / "contracts/src").iterdir():
        text = file.read_text()
        if file.name == "Administration.sol":
            text = text.replace(
                "    uint256 public currentRound;",
                "    uint256 public news;\n    uint256 public currentRound;",
            )
        (folder / file.name).write_text(text)
    command = [ROOT / "scripts/contracts", "build", folder, folder / "SwarmCoordinator.sol"]
    subprocess.run(command, check=True, timeout=240)
    return json.loads((folder / "SwarmCoordinator.json").read_text())


def test_upgrade_that_breaks_the_layout_is_refused(chain, changed, monkeypatch):
    before = upgrade.implementation(chain.coordinator)
    transactions = chain.coordinator.nonce(chain.owner.address)
    carry(monkeypatch, changed)
    with pytest.raises(ChainError) as caught:
        anvil.deploy(chain.settings)
    assert (
        "would break its storage layout and was not made: variable currentRound was t_uint256 at"
        " slot 0, byte 0, " in str(caught.value)
    )
    assert "now t_uint256 at slot 1, byte 0" in str(caught.value)
    assert upgrade.implementation(chain.coordinator) == before
    assert chain.coordinator.nonce(chain.owner.address) == transactions


# ---- layouts


@pytest.mark.parametrize(
    ("name", "release"),
    [
        pytest.param(name, release, id=f"{name}-{release['version']}")
        for name in ("SwarmCoordinator", "PredictionMarket")
        for release in upgrade.releases(name)
    ],
)
def test_carried_layout_keeps_that_of_every_release(name, release):
    carried = contract.artifact(name)
    assert storage_layout.breaks(release["storage_layout"], carried["storage_layout"]) == []
    if release["version"] == carried["version"]:
        expected = release["runtime_sha256"]
        assert carried["runtime_sha256"] == expected, (
            "a released version changed: give it a new version()"
        )


def test_first_release_is_what_it_was(chain, released):
    digests = {release["version"]: release["runtime_sha256"] for release in upgrade.releases()}
    assert upgrade.implementation(released).digest == digests["hivewright/1"]


def change(path: tuple, value) -> dict:
    """Return the layout in this package with one thing changed; `value` None: removed."""
    changed = copy.deepcopy(contract.artifact("SwarmCoordinator")["storage_layout"])
    place = changed
    for part in path[:-1]:
        place = (
            next(item for item in place if item["label"] == part)
            if isinstance(place, list)
            else place[part]
        )
    if value is None:
        place.remove(next(item for item in place if item["label"] == path[-1]))
    else:
        place[path[-1]] = value
    return changed


@pytest.mark.parametrize(
    ("path", "value", "found"),
    [
        (("variables", "currentStage"), None, "variable currentStage is gone"),
        (("variables", "_numbers", "slot"), 99, "variable _numbers was t_mapping"),
        (
            ("variables", "currentRound", "type"),
            "t_uint128",
            "variable currentRound was t_uint256 at slot 0, byte 0, now",
        ),
        (
            ("variables", "currentRound", "offset"),
            16,
            "slot 0, byte 0, now t_uint256 at slot 0, byte 16",
        ),
        (("structs", "t_struct(Peer)_storage", "bytes"), 128, "struct Peer took 96 bytes, now 128"),
        (
            ("structs", "t_struct(Peer)_storage", "members", "account"),
            None,
            "struct Peer: member account is gone",
        ),
        (
            ("structs", "t_struct(Reward)_storage", "members", "submitted", "offset"),
            30,
            "struct Reward: member submitted",
        ),
    ],
)
def test_broken_layout_is_named(path, value, found):
    old = contract.artifact("SwarmCoordinator")["storage_layout"]
    (problem,) = storage_layout.breaks(old, change(path, value))
    assert found in problem


def test_layout_may_grow_into_the_gap():
    old = contract.artifact("SwarmCoordinator")["storage_layout"]
    assert storage_layout.breaks(old, change(("variables", "__gap"), None)) == []
    grown = copy.deepcopy(old)
    gap = next(variable for variable in grown["variables"] if variable["label"] == "__gap")
    grown["variables"].append({**gap, "label": "news", "type": "t_uint256"})
    gap["slot"] += 1
    assert storage_layout.breaks(old, grown) == []
