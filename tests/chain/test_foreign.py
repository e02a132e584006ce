"""Compatibility: our client and keeper with a foreign contract, a foreign client with ours.

The foreign contract is foreign/ForeignCoordinator.sol; the foreign client is plain web3 with only
the ABI file.
"""

import inspect
import json
from contextlib import suppress
from pathlib import Path

import pytest
from account_service import account_settings, serving
from eth_account import Account
from settling import SettlingNode
from web3 import HTTPProvider, Web3
from web3.exceptions import ContractCustomError
from web3.utils.abi import abi_to_signature

from worker.chain import contract, peer_proof
from worker.chain.client import Call, NonceUsed, Unanswered, Underpriced
from worker.chain.coordinator import Coordinator, LogGone
from worker.chain.embedded import anvil
from worker.chain.keeper import Keeper
from worker.commands import doctor
from worker.errors import ContractRefused
from worker.swarm import identity

UPSTREAM, UPSTREAM_060 = (
    json.loads((Path(__file__).parent / f"SwarmCoordinator-{release}.abi.json").read_text())
    for release in ("0.4.2", "0.6.0")
)
NODE_A, NODE_B, NODE_C = (f"/ip4/127.0.0.1/tcp/{port}/p2p/QmBoot" for port in (1, 2, 3))
OWNER_ROLE, MANAGER_ROLE = Web3.keccak(text="OWNER_ROLE"), Web3.keccak(text="STAGE_MANAGER_ROLE")
# Reached only by a contract that is built or deployed wrongly.
UNREACHABLE_ERRORS = {"AddressEmptyCode", "NotInitializing", "StageOutOfBounds"}


def signatures(abi: list, kind: str) -> set[str]:
    return {abi_to_signature(entry) for entry in abi if entry["type"] == kind}


# ---- our client on a foreign contract


def test_foreign_contracts_have_the_abi_of_their_release_and_nothing_more(
    foreign_build, foreign_build_060
):
    for kind in ("function", "event", "error"):
        assert signatures(foreign_build["abi"], kind) == signatures(UPSTREAM, kind)
        assert signatures(foreign_build_060["abi"], kind) == signatures(UPSTREAM_060, kind)
        # Ours answers both.
        assert signatures(contract.coordinator_abi(), kind) >= signatures(UPSTREAM_060, kind)
        assert signatures(contract.coordinator_abi(), kind) >= signatures(UPSTREAM, kind)


@pytest.fixture
def used(monkeypatch) -> set[str]:
    """Record the names of the client's public methods that are called."""
    names: set[str] = set()

    def watched(name, method):
        def call(self, *arguments, **options):
            names.add(name)
            return method(self, *arguments, **options)

        return call

    for name, method in inspect.getmembers(Coordinator, inspect.isfunction):
        if not name.startswith("_"):
            monkeypatch.setattr(Coordinator, name, watched(name, method))
    return names


def test_our_client_drives_a_foreign_contract_through_every_call(foreign, used, caplog):
    caplog.set_level("INFO")
    client, send, owner = foreign.coordinator, foreign.send, foreign.owner
    client.check()
    assert client.version is None
    assert f"contract={foreign.deployment.contract} implementation=foreign-0.4.2" in caplog.text
    assert client.abilities.missing == []

    account = foreign.new_account("a", "b")
    assert (client.owner_of("a"), client.owner_of("c")) == (account.address, None)
    assert client.read("getPeerId(address[])", [account.address])[0] == ["a", "b"]
    assert (client.registered(["c", "a", "x"]), client.registered([])) == ({"a"}, set())
    with pytest.raises(ContractRefused, match="PeerIdAlreadyRegistered; the peer id is taken"):
        send(Account.create(), client.register_peer("a"))

    digest = "ab" * 32
    receipt = send(account, client.submit_reward(0, 0, 410, "a", digest))
    assert client.reward_digest(receipt.tx_hash) == digest
    assert [client.submitted_reward(0, 0, peer) for peer in ("a", "b", "c")] == [410, None, None]
    assert client.total_rewards(["a", "b"]) == [410, 0]
    for call, name in (
        (client.submit_reward(0, 0, 1, "a"), "RewardAlreadySubmitted"),
        (client.submit_reward(1, 0, 1, "a"), "InvalidRoundNumber"),
        (client.submit_reward(0, 1, 1, "a"), "InvalidStageNumber"),
        (client.submit_reward(0, 0, 1, "c"), "InvalidVoterPeerId"),
    ):
        with pytest.raises(ContractRefused, match=name):
            send(account, call)

    send(account, client.submit_winners(0, ["b"], "a"))
    with pytest.raises(ContractRefused, match="WinnerAlreadyVoted"):
        send(account, client.submit_winners(0, ["b"], "a"))
    assert (client.votes(0, "a"), client.votes(0, "b")) == (["b"], [])
    assert client.winner_leaderboard(0, 9) == [("b", 1)]
    assert client.wins_of(["b", "a"]) == [1, 0]

    send(owner, client.add_bootnodes([NODE_A, NODE_B, NODE_C]))
    send(owner, client.remove_bootnode(0))
    assert client.bootnodes() == [NODE_C, NODE_B]
    assert client.has_role("STAGE_MANAGER_ROLE", owner.address)
    assert not client.has_role("STAGE_MANAGER_ROLE", account.address)
    for _ in range(4):
        send(owner, client.update_stage_and_round())
    assert (client.current_round(), client.current_stage()) == (1, 1)
    (event,) = client.events("RoundAdvanced")
    assert (event.arguments, client.block_time(event.block) > 0) == ({"newRoundNumber": 1}, True)
    assert (len(str(client.block_hash(event.block))), client.block_hash(10**6)) == (66, None)
    assert client.read(
        "getRoundStageReward(uint256,uint256,address[])", 0, 0, [account.address]
    ) == [410]

    # This chain asks for nothing, so only what a node names as its minimum is offered, and five
    # times that at most.
    assert (client.allowed_price(), client.price_limit(3)) == (0, 15)
    assert client.raised_price(0, Underpriced("too low", 7)) == 7
    refused, gas = client.estimate_all(
        account.address, [client.register_peer("a"), client.register_peer("d")]
    )
    assert (type(refused), type(gas)) == (ContractRefused, int)
    nonce = client.nonce(account.address)
    calls = [client.register_peer(peer) for peer in ("d", "e")]
    signed = [
        client.sign(account, call, nonce=nonce + i, gas=gas, gas_price_wei=0)
        for i, call in enumerate(calls)
    ]
    assert client.send_all_raw([raw for _, raw in signed]) == [True, True]
    assert all(client.wait_for_receipt(tx_hash, 10).succeeded for tx_hash, _ in signed)

    # What only ours has is refused by name of the call; what is told apart is told apart before.
    for call in (client.advance_round(1), client.withdraw_bootnode(NODE_C)):
        with pytest.raises(ContractRefused, match=f"{call.name}: the contract refused"):
            send(owner, call)
    assert not peer_proof.is_checked(client)
    every = {
        name
        for name, _ in inspect.getmembers(Coordinator, inspect.isfunction)
        if not name.startswith("_")
    }
    assert every - used == set()


def test_deploy_leaves_a_foreign_contract_as_it_is(foreign, caplog):
    found = anvil.deploy(foreign.settings)
    assert found == foreign.deployment
    assert "contract not upgraded, it is foreign" in caplog.text


# ---- release 0.6.0


def test_release_060_is_told_apart_and_its_rewards_are_read_by_peer(foreign_060, caplog):
    client, send = foreign_060.coordinator, foreign_060.send
    assert (client.version, client.implementation) == (None, "foreign-0.6.0")
    assert client.abilities.missing == ["leaderboards (wins are read peer by peer)"]
    account = foreign_060.new_account("a", "b")
    tx_hash = send(account, client.submit_reward(0, 0, -410, "a", "ab" * 32)).tx_hash
    assert client.reward_digest(tx_hash) == "ab" * 32
    # 0.4.2 can't tell one account's peers apart without the log; this one can.
    assert [client.submitted_reward(0, 0, peer) for peer in ("a", "b", "c")] == [-410, None, None]
    send(account, client.submit_winners(0, ["b"], "a"))
    assert (client.wins_of(["a", "b"]), client.votes(0, "a")) == ([0, 1], ["b"])
    with pytest.raises(
        Unanswered,
        match=(
            r"winnerLeaderboard\(uint256,uint256\): the contract refused: .*\(foreign-0.6.0\);"
            r" check"
        ),
    ):
        client.winner_leaderboard(0, 9)


def test_known_transaction_spares_the_search_of_the_log(foreign_060, monkeypatch):
    client, account = foreign_060.coordinator, foreign_060.new_account("a")
    tx_hash = foreign_060.send(account, client.submit_reward(0, 0, 410, "a")).tx_hash
    other = foreign_060.send(account, client.register_peer("b")).tx_hash
    with monkeypatch.context() as patch:
        patch.setattr(Coordinator, "fetch_log", lambda *_: pytest.fail("the log was searched"))
        assert client.submitted_reward(0, 0, "a", tx_hash) == 410
    assert client.submitted_reward(0, 0, "a", other) == 410


def test_reward_whose_log_is_gone_is_neither_missing_nor_guessed(foreign_060, monkeypatch):
    client, account = foreign_060.coordinator, foreign_060.new_account("a")
    foreign_060.send(account, client.submit_reward(0, 0, 410, "a"))
    monkeypatch.setattr(Coordinator, "events", lambda *_, **__: iter(()))
    with pytest.raises(
        LogGone, match=r"RewardSubmitted: 0x.* \(foreign-0.6.0\) has a reward of a for round 0"
    ):
        client.submitted_reward(0, 0, "a")


def test_contract_without_any_way_to_ask_is_read_by_its_log(foreign_060, monkeypatch):
    """Missing views of an unknown release cost neither rewards nor their confirmation."""
    client, account = foreign_060.coordinator, foreign_060.new_account("a", "b")
    foreign_060.send(account, client.submit_reward(0, 0, 410, "a"))
    monkeypatch.setattr(Coordinator, "_answers", lambda *_: False)
    client.check()
    assert client.implementation == "foreign-unknown"
    assert [client.submitted_reward(0, 0, peer) for peer in ("a", "b", "c")] == [410, None, None]


def test_rewards_of_many_rounds_are_settled_on_release_060(foreign_060, tmp_path):
    """In an earlier version the first was never confirmed, and all later ones waited."""
    with serving(account_settings(foreign_060.settings, tmp_path / "account")) as service:
        node = SettlingNode(foreign_060, service, tmp_path / "node", tmp_path)
        node.earn(0, 1, 2)
        for _ in range(2):
            foreign_060.advance()
        node.settle()
    assert node.states() == [("confirmed", "confirmed")] * 3
    assert foreign_060.coordinator.total_rewards([node.peer_id]) == [100 + 101 + 102]


def test_doctor_reports_the_release(foreign_060, tmp_path):
    patient = doctor.Patient(foreign_060.settings, None)
    found, *_ = doctor._chain(patient)
    assert found.verdict == "ok"
    assert "not ours: like release 0.6.0 of RL Swarm, without leaderboards" in found.cause


def test_keeper_ends_the_rounds_of_release_060(foreign_060):
    account = foreign_060.new_account("a")
    for round in (0, 1):
        foreign_060.send(account, foreign_060.coordinator.submit_reward(round, 0, 100, "a"))
        keeper(foreign_060).look()
        assert foreign_060.coordinator.current_round() == round + 1


def test_client_of_release_060_reads_our_contract(chain):
    """That client confirms rewards by peer, with the uint256 form of submitReward."""
    outsider = ForeignClient(chain.deployment.rpc_url, chain.deployment.contract, UPSTREAM_060)
    anna = Account.create()
    outsider.write(anna, "registerPeer(string)", "a")
    has_submitted = "hasSubmittedRoundStageReward(uint256,uint256,string)"
    assert outsider.read(has_submitted, 0, 0, "a") is False
    outsider.write(anna, "submitReward(uint256,uint256,uint256,string)", 0, 0, 7, "a")
    assert [outsider.read(has_submitted, 0, 0, peer) for peer in ("a", "b")] == [True, False]


# ---- our keeper on a foreign contract


def keeper(foreign, **values) -> Keeper:
    section = foreign.settings.keeper.model_copy(update=values)
    return Keeper(foreign.settings.model_copy(update={"keeper": section}))


def test_keeper_ends_a_foreign_round_with_all_its_stages(foreign):
    account = foreign.new_account("a")
    for round in (0, 1):
        foreign.send(account, foreign.coordinator.submit_reward(round, 0, 100, "a"))
        keeper(foreign).look()
        assert (foreign.coordinator.current_round(), foreign.coordinator.current_stage()) == (
            round + 1,
            0,
        )


def test_two_keepers_with_one_key_end_a_foreign_round_once(foreign, monkeypatch):
    """The second reads the round before the first ends it, and sends afterwards."""
    foreign.new_account("a")
    first, second = keeper(foreign), keeper(foreign)
    for one in (first, second):
        one.look()
    seen, ended = second._coordinator.current_round, []

    def seen_too_early() -> int:
        found = seen()
        if not ended:
            ended.append(first._advance(0))
        return found

    monkeypatch.setattr(second._coordinator, "current_round", seen_too_early)
    with suppress(NonceUsed):  # or it was, byte by byte, the transaction that the first had sent
        second._advance(0)
    assert ended == [True]
    assert (foreign.coordinator.current_round(), foreign.coordinator.current_stage()) == (1, 0)


def test_bootnodes_of_a_foreign_contract_are_withdrawn_by_index(foreign):
    foreign.send(
        foreign.owner, foreign.coordinator.add_bootnodes(["/ip4/9.9.9.9/tcp/1/p2p/QmOthers"])
    )
    for wanted in ((NODE_A, NODE_B, NODE_C), (NODE_C,), ()):
        keeper(foreign, publish_bootnodes=wanted, min_peers=9).look()
        assert sorted(foreign.coordinator.bootnodes()) == sorted(
            [*wanted, "/ip4/9.9.9.9/tcp/1/p2p/QmOthers"]
        )


# ---- a foreign client on our contract


class ForeignClient:
    """A client for RL Swarm: web3 and its ABI file. It records the functions it used."""

    def __init__(self, rpc_url: str, address: str, abi: list = UPSTREAM) -> None:
        self.web3 = Web3(HTTPProvider(rpc_url, request_kwargs={"timeout": 10}))
        self.contract = self.web3.eth.contract(address=Web3.to_checksum_address(address), abi=abi)
        self.used: set[str] = set()
        self.seen: set[str] = set()
        names = [entry for entry in UPSTREAM if entry["type"] == "error"]
        self.errors = {
            "0x" + Web3.keccak(text=abi_to_signature(entry))[:4].hex(): entry["name"]
            for entry in names
        }

    def _function(self, signature: str, *arguments):
        self.used.add(signature)
        return self.contract.get_function_by_signature(signature)(*arguments)

    def read(self, signature: str, *arguments):
        return self._function(signature, *arguments).call()

    def write(self, account, signature: str, *arguments, value: int = 0) -> list[str]:
        """Send the call, wait, and return the names of its events by the ABI file."""
        built = self._function(signature, *arguments).build_transaction(
            {
                "from": account.address,
                "nonce": self.web3.eth.get_transaction_count(account.address),
                "gas": 2_000_000,
                "gasPrice": 0,
                "value": value,
            }
        )
        sent = self.web3.eth.send_raw_transaction(account.sign_transaction(built).raw_transaction)
        receipt = self.web3.eth.wait_for_transaction_receipt(sent, timeout=20, poll_latency=0.05)
        assert receipt["status"] == 1
        names = []
        for event in self.contract.events:
            found = [
                entry
                for entry in receipt["logs"]
                if entry["topics"][0] == Web3.keccak(text=event.signature)
            ]
            names += [event().process_log(entry)["event"] for entry in found]
        self.seen.update(names)
        return sorted(names)

    def refused(self, account, signature: str, *arguments, value: int = 0) -> str:
        """Return the ABI file's name for the error."""
        with pytest.raises(ContractCustomError) as caught:
            self._function(signature, *arguments).call({"from": account.address, "value": value})
        name = self.errors[caught.value.data[:10]]
        self.seen.add(name)
        return name


REWARD = "submitReward(uint256,uint256,int256,string)"
VOTE = "submitWinners(uint256,string[],string)"


def test_foreign_client_drives_our_contract_through_every_call(chain):
    outsider = ForeignClient(chain.deployment.rpc_url, chain.deployment.contract)
    read, write, refused = outsider.read, outsider.write, outsider.refused
    owner, anna, bert = chain.owner, Account.create(), Account.create()

    # Peers.
    assert write(anna, "registerPeer(string)", "a") == ["PeerRegistered"]
    assert write(anna, "registerPeer(string)", "b") == ["PeerRegistered"]
    assert refused(bert, "registerPeer(string)", "a") == "PeerIdAlreadyRegistered"
    assert read("getEoa(string[])", ["a", "x"]) == [anna.address, "0x" + "00" * 20]
    assert read("getPeerId(address[])", [anna.address, bert.address]) == [["a", "b"], []]

    # Rewards.
    assert write(anna, REWARD, 0, 0, -7, "a") == ["CumulativeRewardsUpdated", "RewardSubmitted"]
    assert refused(anna, REWARD, 0, 0, 1, "a") == "RewardAlreadySubmitted"
    assert refused(anna, REWARD, 1, 0, 1, "a") == "InvalidRoundNumber"
    assert refused(anna, REWARD, 0, 1, 1, "a") == "InvalidStageNumber"
    assert refused(bert, REWARD, 0, 0, 1, "b") == "InvalidVoterPeerId"
    assert read("getTotalRewards(string[])", ["a", "b"]) == [-7, 0]
    assert read("getRoundStageReward(uint256,uint256,address[])", 0, 0, [anna.address]) == [-7]
    assert read("hasSubmittedRoundStageReward(uint256,uint256,address)", 0, 0, anna.address)
    assert not read("hasSubmittedRoundStageReward(uint256,uint256,address)", 0, 0, bert.address)

    # Votes.
    assert refused(anna, VOTE, 0, ["b", "b"], "a") == "InvalidVote"
    assert write(anna, VOTE, 0, ["b", "unregistered"], "a") == ["WinnerSubmitted"]
    assert refused(anna, VOTE, 0, ["b"], "a") == "WinnerAlreadyVoted"
    assert read("getVoterVotes(uint256,string)", 0, "a") == ["b", "unregistered"]
    assert read("getVoterVoteCount(string)", "a") == 1
    assert read("getPeerVoteCount(uint256,string)", 0, "b") == 1
    assert read("getTotalWins(string)", "b") == 1
    assert (read("uniqueVoters()"), read("uniqueVotedPeers()")) == (1, 2)
    assert read("voterLeaderboard(uint256,uint256)", 0, 10) == [["a"], [1]]
    assert read("winnerLeaderboard(uint256,uint256)", 0, 10) == [["b", "unregistered"], [1, 1]]

    # Bootnodes.
    assert refused(bert, "addBootnodes(string[])", [NODE_A]) == "OnlyBootnodeManager"
    assert write(owner, "addBootnodes(string[])", [NODE_A, NODE_B, NODE_C]) == ["BootnodesAdded"]
    assert write(owner, "removeBootnode(uint256)", 0) == ["BootnodeRemoved"]
    assert refused(owner, "removeBootnode(uint256)", 2) == "InvalidBootnodeIndex"
    assert (read("getBootnodes()"), read("getBootnodesCount()")) == ([NODE_C, NODE_B], 2)
    assert write(owner, "clearBootnodes()") == ["AllBootnodesCleared"]

    # Rounds.
    assert (read("currentRound()"), read("currentStage()"), read("stageCount()")) == (0, 0, 1)
    assert refused(bert, "updateStageAndRound()") == "OnlyStageManager"
    assert write(owner, "updateStageAndRound()") == ["RoundAdvanced", "StageAdvanced"]
    assert read("currentRound()") == 1

    # Roles.
    assert (read("OWNER_ROLE()"), read("STAGE_MANAGER_ROLE()")) == (OWNER_ROLE, MANAGER_ROLE)
    assert read("BOOTNODE_MANAGER_ROLE()") == Web3.keccak(text="BOOTNODE_MANAGER_ROLE")
    assert refused(bert, "grantRole(bytes32,address)", OWNER_ROLE, bert.address) == "OnlyOwner"
    assert write(owner, "grantRole(bytes32,address)", MANAGER_ROLE, bert.address) == ["RoleGranted"]
    assert read("hasRole(bytes32,address)", MANAGER_ROLE, bert.address)
    assert write(owner, "revokeRole(bytes32,address)", MANAGER_ROLE, bert.address) == [
        "RoleRevoked"
    ]
    assert not read("hasRole(bytes32,address)", MANAGER_ROLE, bert.address)

    drive_upgrades(chain, outsider)
    assert signatures(UPSTREAM, "function") - outsider.used == set()
    names = {entry["name"] for entry in UPSTREAM if entry["type"] in ("event", "error")}
    assert names - outsider.seen == UNREACHABLE_ERRORS


def drive_upgrades(chain, outsider: ForeignClient) -> None:
    read, write, refused, owner = outsider.read, outsider.write, outsider.refused, chain.owner
    upgrade = "upgradeToAndCall(address,bytes)"
    slot = int.from_bytes(Web3.keccak(text="eip1967.proxy.implementation")) - 1
    stored = outsider.web3.eth.get_storage_at(chain.deployment.contract, slot)
    implementation = Web3.to_checksum_address(stored[-20:])
    behind = ForeignClient(chain.deployment.rpc_url, implementation)
    assert read("UPGRADE_INTERFACE_VERSION()") == "5.0.0"
    assert behind.read("proxiableUUID()") == slot.to_bytes(32)
    outsider.used |= behind.used
    assert refused(owner, "initialize(address)", owner.address) == "InvalidInitialization"
    (made,) = outsider.contract.events.Initialized().get_logs(from_block=0)
    assert made["args"]["version"] == 1
    outsider.seen.add("Initialized")
    assert refused(owner, "proxiableUUID()") == "UUPSUnauthorizedCallContext"
    assert write(owner, upgrade, implementation, b"") == ["Upgraded"]
    outsider.web3.provider.make_request("anvil_setBalance", [owner.address, hex(10**18)])
    assert refused(owner, upgrade, implementation, b"", value=1) == "ERC1967NonPayable"
    assert refused(owner, upgrade, implementation, bytes(4)) == "FailedCall"
    assert refused(owner, upgrade, chain.deployment.contract, b"") == "ERC1967InvalidImplementation"
    assert (
        refused(owner, upgrade, contract_with_another_slot(chain), b"")
        == "UUPSUnsupportedProxiableUUID"
    )


def contract_with_another_slot(chain) -> str:
    """Deploy code that answers 1 to every call, including proxiableUUID()."""
    code = "0x600a600c600039600a6000f3" + "600160005260206000f3"
    return chain.send(chain.owner, Call("create", bytes.fromhex(code[2:]), None)).contract


def test_foreign_client_does_not_notice_proofs(chain, tmp_path):
    """A proven and moved peer reads like any other, with each new holder in known events."""
    outsider = ForeignClient(chain.deployment.rpc_url, chain.deployment.contract)
    node = identity.create(tmp_path / "swarm.pem")
    squatter, anna, bert = Account.create(), Account.create(), Account.create()
    outsider.write(squatter, "registerPeer(string)", node.peer_id)
    outsider.write(squatter, REWARD, 0, 0, 5, node.peer_id)
    shown = peer_proof.of_registration(node, chain.deployment, anna.address)
    chain.send(anna, peer_proof.call(chain.coordinator, node.peer_id, shown))
    assert outsider.read("getEoa(string[])", [node.peer_id]) == [anna.address]
    assert outsider.read("getPeerId(address[])", [squatter.address, anna.address]) == [
        [],
        [node.peer_id],
    ]
    assert outsider.refused(squatter, REWARD, 0, 0, 6, node.peer_id) == "InvalidVoterPeerId"
    assert (
        outsider.refused(squatter, "registerPeer(string)", node.peer_id)
        == "PeerIdAlreadyRegistered"
    )
    moved = peer_proof.of_move(
        node,
        chain.deployment,
        bert.address,
        peer_proof.binding(chain.coordinator, node.peer_id).moves,
    )
    chain.send(bert, peer_proof.call(chain.coordinator, node.peer_id, moved))
    chain.advance()
    assert outsider.write(bert, REWARD, 1, 0, 7, node.peer_id) == [
        "CumulativeRewardsUpdated",
        "RewardSubmitted",
    ]
    assert outsider.read("getTotalRewards(string[])", [node.peer_id]) == [7]
    holders = [
        entry["args"]["eoa"]
        for entry in outsider.contract.events.PeerRegistered().get_logs(from_block=0)
    ]
    assert holders == [squatter.address, anna.address, bert.address]
