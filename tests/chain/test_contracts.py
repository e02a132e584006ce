"""The contract on a real chain: it has RL Swarm's ABI, without its weak points."""

import json
import random
import subprocess
from collections import Counter
from pathlib import Path

import pytest
from eth_account import Account
from web3 import Web3
from web3.utils.abi import abi_to_signature

from worker.chain import contract
from worker.chain.client import Call
from worker.errors import ContractRefused

ROOT = Path(__file__).resolve().parents[2]
UPSTREAM = json.loads((Path(__file__).parent / "SwarmCoordinator-0.4.2.abi.json").read_text())
SIGNED_REWARD = "submitReward(uint256,uint256,int256,string)"
UNSIGNED_REWARD = "submitReward(uint256,uint256,uint256,string)"


def write(chain, signature, *arguments):
    """Build a write from its signature, as a foreign client would."""
    data = (
        Web3().eth.contract(abi=contract.coordinator_abi()).encode_abi(signature, list(arguments))
    )
    return Call(signature, bytes.fromhex(data[2:]), chain.deployment.contract)


def refused(chain, account, call) -> str:
    """Return the name of the error with which the contract refuses the call."""
    with pytest.raises(ContractRefused) as caught:
        chain.send(account, call)
    return caught.value.name


# ---- ABI and artifact


def entry_key(entry):
    outputs = [output["type"] for output in entry.get("outputs", [])]
    indexed = [argument.get("indexed") for argument in entry["inputs"]]
    return entry["type"], abi_to_signature(entry), outputs, entry.get("stateMutability"), indexed


def test_upstream_abi_is_contained():
    ours = [
        entry_key(entry)
        for entry in contract.coordinator_abi()
        if entry["type"] in ("function", "event", "error")
    ]
    missing = [entry_key(entry) for entry in UPSTREAM if entry_key(entry) not in ours]
    assert len(UPSTREAM) > 60
    assert missing == []


def test_every_error_has_advice():
    entries = (*contract.coordinator_abi(), *contract.market_abi())
    names = {entry["name"] for entry in entries if entry["type"] == "error"}
    assert names == set(contract.ADVICE)


def test_rebuild_gives_the_same_bytes(tmp_path, anvil_binary):
    subprocess.run([ROOT / "scripts/contracts", "build", tmp_path], check=True, timeout=240)
    built = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    carried = {
        file.name: file.read_bytes() for file in (ROOT / "worker/chain/artifacts").glob("*.json")
    }
    assert built == carried, "contracts/ changed: run `make contracts`"


# ---- who may do what


def test_initialise_twice_is_refused(chain):
    outsider = Account.create()
    assert (
        refused(chain, outsider, write(chain, "initialize(address)", outsider.address))
        == "InvalidInitialization"
    )


def test_implementation_can_not_be_taken_over(chain):
    slot = int.from_bytes(Web3.keccak(text="eip1967.proxy.implementation")) - 1
    stored = chain.coordinator.web3.eth.get_storage_at(chain.deployment.contract, slot)
    implementation = Web3.to_checksum_address(stored[-20:])
    outsider = Account.create()
    call = write(chain, "initialize(address)", outsider.address)
    call = Call(call.name, call.data, implementation)
    assert refused(chain, outsider, call) == "InvalidInitialization"


@pytest.mark.parametrize(
    ("signature", "arguments", "error"),
    [
        ("updateStageAndRound()", [], "OnlyStageManager"),
        ("advanceRound(uint256)", [0], "OnlyStageManager"),
        ("addBootnodes(string[])", [["/ip4/1.2.3.4/tcp/1"]], "OnlyBootnodeManager"),
        ("removeBootnode(uint256)", [0], "OnlyBootnodeManager"),
        ("withdrawBootnode(string)", ["x"], "OnlyBootnodeManager"),
        ("clearBootnodes()", [], "OnlyBootnodeManager"),
        (
            "grantRole(bytes32,address)",
            [Web3.keccak(text="OWNER_ROLE"), "0x" + "11" * 20],
            "OnlyOwner",
        ),
        (
            "revokeRole(bytes32,address)",
            [Web3.keccak(text="OWNER_ROLE"), "0x" + "11" * 20],
            "OnlyOwner",
        ),
        ("upgradeToAndCall(address,bytes)", ["0x" + "11" * 20, b""], "OnlyOwner"),
    ],
)
def test_outsider_is_refused(chain, signature, arguments, error):
    assert refused(chain, Account.create(), write(chain, signature, *arguments)) == error


def test_granted_role_works_until_it_is_revoked(chain):
    manager = Account.create()
    role = Web3.keccak(text="STAGE_MANAGER_ROLE")
    chain.send(chain.owner, write(chain, "grantRole(bytes32,address)", role, manager.address))
    assert chain.coordinator.has_role("STAGE_MANAGER_ROLE", manager.address)
    chain.send(manager, write(chain, "updateStageAndRound()"))
    assert chain.coordinator.current_round() == 1
    chain.send(chain.owner, write(chain, "revokeRole(bytes32,address)", role, manager.address))
    assert refused(chain, manager, write(chain, "updateStageAndRound()")) == "OnlyStageManager"


def test_upgrade_by_the_owner_keeps_the_books(chain):
    account = chain.new_account("peer")
    chain.send(account, chain.coordinator.submit_reward(0, 0, 410, "peer"))
    code = bytes.fromhex(contract.artifact("SwarmCoordinator")["bytecode"][2:])
    new = chain.send(chain.owner, Call("create", code, None)).contract
    chain.send(chain.owner, write(chain, "upgradeToAndCall(address,bytes)", new, b""))
    assert chain.coordinator.submitted_reward(0, 0, "peer") == 410
    assert chain.coordinator.owner_of("peer") == account.address


def test_upgrade_to_something_else_is_refused(chain):
    call = write(chain, "upgradeToAndCall(address,bytes)", chain.deployment.contract, b"")
    assert refused(chain, chain.owner, call) == "ERC1967InvalidImplementation"


# ---- rounds


def test_round_advances_with_its_events(chain):
    for expected in (1, 2, 3):
        chain.advance()
        assert (chain.coordinator.current_round(), chain.coordinator.current_stage()) == (
            expected,
            0,
        )
    assert [event.arguments for event in chain.coordinator.events("RoundAdvanced")] == [
        {"newRoundNumber": number} for number in (1, 2, 3)
    ]
    assert len(list(chain.coordinator.events("StageAdvanced"))) == 3
    assert chain.coordinator.read("stageCount()") == 1


def test_advance_on_an_old_round_is_refused(chain):
    chain.send(chain.owner, chain.coordinator.advance_round(0))
    assert refused(chain, chain.owner, chain.coordinator.advance_round(0)) == "RoundMovedOn"
    assert refused(chain, chain.owner, chain.coordinator.advance_round(2)) == "RoundMovedOn"
    assert chain.coordinator.current_round() == 1


# ---- peers


def test_one_account_holds_many_peers(chain):
    account, other = chain.new_account("a", "b"), chain.new_account("c")
    assert chain.peers_of(account.address) == ["a", "b"]
    addresses = chain.coordinator.read("getEoa(string[])", ["c", "nobody", "a"])
    assert addresses == [other.address, contract.NO_ADDRESS, account.address]


def test_peer_id_is_registered_once(chain):
    account = chain.new_account("peer")
    assert (
        refused(chain, account, chain.coordinator.register_peer("peer"))
        == "PeerIdAlreadyRegistered"
    )
    assert (
        refused(chain, Account.create(), chain.coordinator.register_peer("peer"))
        == "PeerIdAlreadyRegistered"
    )
    assert chain.coordinator.owner_of("peer") == account.address


@pytest.mark.parametrize("peer_id", ["", "x" * 129])
def test_peer_id_of_odd_length_is_refused(chain, peer_id):
    assert (
        refused(chain, Account.create(), chain.coordinator.register_peer(peer_id))
        == "InvalidPeerId"
    )


# ---- rewards


def test_reward_is_credited_once(chain):
    account = chain.new_account("a", "b")
    chain.send(account, chain.coordinator.submit_reward(0, 0, 410, "a"))
    chain.send(account, chain.coordinator.submit_reward(0, 0, -7, "b"))
    assert (
        refused(chain, account, chain.coordinator.submit_reward(0, 0, 999, "a"))
        == "RewardAlreadySubmitted"
    )
    assert [chain.coordinator.submitted_reward(0, 0, peer) for peer in ("a", "b", "c")] == [
        410,
        -7,
        None,
    ]
    assert chain.coordinator.read(
        "getRoundStageReward(uint256,uint256,address[])", 0, 0, [account.address]
    ) == [403]
    assert chain.coordinator.total_rewards(["a", "b", "c"]) == [410, -7, 0]


def test_reward_for_an_earlier_round_is_credited(chain):
    account = chain.new_account("a")
    chain.advance()
    for round, reward in ((0, 100), (1, 20)):
        chain.send(account, chain.coordinator.submit_reward(round, 0, reward, "a"))
    assert chain.coordinator.total_rewards(["a"]) == [120]


@pytest.mark.parametrize(
    ("round", "stage", "peer", "error"),
    [
        (2, 0, "a", "InvalidRoundNumber"),
        (1, 1, "a", "InvalidStageNumber"),
        (0, 1, "a", "InvalidStageNumber"),  # a past round takes no stage that it did not have
        (0, 2, "a", "InvalidStageNumber"),
        (0, 0, "nobody", "InvalidVoterPeerId"),
        (0, 0, "theirs", "InvalidVoterPeerId"),
    ],
)
def test_reward_that_does_not_fit_is_refused(chain, round, stage, peer, error):
    account = chain.new_account("a")
    chain.new_account("theirs")
    chain.advance()
    assert refused(chain, account, chain.coordinator.submit_reward(round, stage, 1, peer)) == error


@pytest.mark.parametrize("signature", [SIGNED_REWARD, UNSIGNED_REWARD])
def test_largest_reward_is_credited_and_one_more_refused(chain, signature):
    account = chain.new_account("a")
    call = write(chain, signature, 0, 0, 2**127, "a")
    assert refused(chain, account, call) == "RewardOutOfRange"
    chain.send(account, write(chain, signature, 0, 0, 2**127 - 1, "a"))
    assert chain.coordinator.total_rewards(["a"]) == [2**127 - 1]


def test_unsigned_reward_never_becomes_negative(chain):
    account = chain.new_account("a")
    for reward in (2**256 - 1, 2**255):
        assert (
            refused(chain, account, write(chain, UNSIGNED_REWARD, 0, 0, reward, "a"))
            == "RewardOutOfRange"
        )
    assert chain.coordinator.submitted_reward(0, 0, "a") is None


# ---- votes


def test_vote_counts_once_a_round(chain):
    voter = chain.new_account("voter")
    chain.send(voter, chain.coordinator.submit_winners(0, ["a", "b"], "voter"))
    assert (
        refused(chain, voter, chain.coordinator.submit_winners(0, ["c"], "voter"))
        == "WinnerAlreadyVoted"
    )
    assert chain.coordinator.votes(0, "voter") == ["a", "b"]
    assert chain.coordinator.wins_of(["a", "b", "c"]) == [1, 1, 0]
    assert chain.coordinator.read("getPeerVoteCount(uint256,string)", 0, "a") == 1
    assert chain.coordinator.read("uniqueVoters()") == 1
    assert chain.coordinator.read("uniqueVotedPeers()") == 2


def test_empty_vote_is_refused_and_costs_nothing(chain):
    voter = chain.new_account("voter")
    assert refused(chain, voter, chain.coordinator.submit_winners(0, [], "voter")) == "InvalidVote"
    assert chain.coordinator.read("getVoterVoteCount(string)", "voter") == 0
    chain.send(voter, chain.coordinator.submit_winners(0, ["a"], "voter"))


def test_double_name_in_a_vote_is_refused(chain):
    voter = chain.new_account("voter")
    assert (
        refused(chain, voter, chain.coordinator.submit_winners(0, ["a", "b", "a"], "voter"))
        == "InvalidVote"
    )


def test_vote_for_oneself_is_recorded_but_is_no_win(chain):
    voter = chain.new_account("voter")
    chain.send(voter, chain.coordinator.submit_winners(0, ["voter", "a"], "voter"))
    assert chain.coordinator.votes(0, "voter") == ["voter", "a"]
    assert chain.coordinator.wins_of(["voter"]) == [0]
    assert chain.coordinator.winner_leaderboard(0, 10) == [("a", 1)]
    assert (
        refused(chain, voter, chain.coordinator.submit_winners(0, ["a"], "voter"))
        == "WinnerAlreadyVoted"
    )


@pytest.mark.parametrize(
    ("round", "peer", "error"), [(1, "voter", "InvalidRoundNumber"), (0, "x", "InvalidVoterPeerId")]
)
def test_vote_that_does_not_fit_is_refused(chain, round, peer, error):
    voter = chain.new_account("voter")
    assert refused(chain, voter, chain.coordinator.submit_winners(round, ["a"], peer)) == error


def test_leaderboards_agree_with_a_count(chain):
    rng = random.Random(5)
    peers = [f"peer-{number}" for number in range(12)]
    account = chain.new_account(*peers)
    wins: Counter[str] = Counter()
    votes: Counter[str] = Counter()
    for round in range(6):
        for voter in rng.sample(peers, 8):
            winners = rng.sample(peers, rng.choice([1, 1, 2, 5]))
            chain.send(account, chain.coordinator.submit_winners(round, winners, voter))
            votes[voter] += 1
            wins.update(winner for winner in winners if winner != voter)
            board = chain.coordinator.winner_leaderboard(0, 100)
            assert dict(board) == dict(wins)
            assert [count for _, count in board] == sorted(wins.values(), reverse=True)
        chain.advance()
    assert chain.coordinator.wins_of(peers) == [wins[peer] for peer in peers]
    for peer in peers:
        assert chain.coordinator.read("getVoterVoteCount(string)", peer) == votes[peer]
    names, counts = chain.coordinator.read("voterLeaderboard(uint256,uint256)", 0, 100)
    assert dict(zip(names, counts, strict=True)) == dict(votes)
    assert counts == sorted(votes.values(), reverse=True)
    whole = chain.coordinator.winner_leaderboard(0, 100)
    assert chain.coordinator.winner_leaderboard(2, 5) == whole[2:5]
    assert (
        chain.coordinator.winner_leaderboard(5, 2)
        == chain.coordinator.winner_leaderboard(50, 90)
        == []
    )


def test_leaderboard_of_hundreds_of_peers_stays_cheap(chain):
    """The gas of a page depends on its length, and that of a vote not on the number of peers."""
    account = chain.new_account("a", "b", "c", "d", "e", "f")
    for voter in "abcde":
        peers = [f"12D3KooW{voter}{number:043d}" for number in range(100)]
        chain.send(account, chain.coordinator.submit_winners(0, peers, voter))
    vote = chain.send(account, chain.coordinator.submit_winners(0, [peers[50]], "f"))
    assert vote.gas_used < 400_000
    assert chain.coordinator.winner_leaderboard(0, 1) == [(peers[50], 2)]
    for start, end, gas in ((400, 500, 2_500_000), (0, 500, 12_000_000), (490, 500, 300_000)):
        page = write(chain, "winnerLeaderboard(uint256,uint256)", start, end)
        assert chain.coordinator.estimate_gas(account.address, page) < gas
    assert len(chain.coordinator.winner_leaderboard(0, 600)) == 500
