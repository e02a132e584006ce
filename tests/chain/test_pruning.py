"""What the embedded chain forgets, and what it must not: on a real anvil whose history is short."""

import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest
from account_service import eventually
from eth_account import Account

from worker import settings
from worker.chain.coordinator import Coordinator
from worker.chain.embedded import anvil, pruning
from worker.chain.keeper import Keeper
from worker.chain.transaction_queue import Sender
from worker.commands import audit
from worker.errors import ChainUnreachable

ROOT = Path(__file__).resolve().parents[2]
KEPT = 64
# `hivewright chain up` with a chain that may grow by no more than a few transactions.
IMPATIENT_CHAIN = """
import sys
from pathlib import Path
from worker import log, settings
from worker.chain.embedded import anvil, pruning
pruning._LEAST_GROWTH_MEGABYTES = 0.2
log.setup("INFO", "text")
anvil.up(settings.load(Path(sys.argv[1])))
"""


@pytest.fixture
def forgetful(place) -> settings.Settings:
    return place.model_copy(
        update={"anvil": place.anvil.model_copy(update={"history_blocks": KEPT})}
    )


def at(place: settings.Settings, url: str) -> Coordinator:
    anvil._address_file(place.anvil).write_text(url)
    anvil.deploy(place)
    client = Coordinator(place.chain)
    client.check()
    return client


def test_restart_forgets_old_transactions_and_no_book(forgetful, tmp_path):
    account, digest = Account.create(), "ab" * 32
    with anvil.running(forgetful.anvil, 31337) as (_, url):
        client, owner = at(forgetful, url), anvil.load_owner(forgetful.keeper)
        old = client.transact(account, client.register_peer("a"), 10)
        client.transact(account, client.submit_reward(0, 0, 410, "a", digest), 10)
        for round in range(KEPT):
            client.transact(owner, client.advance_round(round), 10)
        client.transact(account, client.submit_winners(3, ["b"], "a"), 10)
        new = client.transact(account, client.submit_reward(KEPT, 0, 500, "a", digest), 10)
        before, nonce = client.block_number(), client.nonce(account.address)
    size = pruning.megabytes(forgetful.anvil.state_file)
    with anvil.running(forgetful.anvil, 31337) as (_, url):
        assert pruning.megabytes(forgetful.anvil.state_file) < size
        client = at(forgetful, url)
        # The contract state is complete.
        assert (client.block_number(), client.nonce(account.address)) == (before, nonce)
        assert client.current_round() == KEPT
        assert client.read("getPeerId(address[])", [account.address])[0] == ["a"]
        assert [client.submitted_reward(round, 0, "a") for round in (0, 1, KEPT)] == [
            410,
            None,
            500,
        ]
        assert client.total_rewards(["a"]) == [910]
        assert client.votes(3, "a") == ["b"]
        # What is recent is whole too: a receipt that a settlement looks for, and what an audit
        # needs.
        assert client.receipt(new.tx_hash) == new
        assert client.reward_digest(new.tx_hash) == digest
        found = audit.submitted_rewards(client, 16)
        assert [(event.arguments["roundNumber"], event.tx_hash) for event in found] == [
            (KEPT, new.tx_hash)
        ]
        # Old receipts are gone, which is not an error.
        assert client.receipt(old.tx_hash) is None
        assert client.reward_digest(old.tx_hash) is None
        assert list(client.events("PeerRegistered")) == []
        # And it goes on.
        assert client.transact(account, client.register_peer("c"), 10).block == before + 1


def test_running_chain_forgets_transactions_of_itself(forgetful):
    account = Account.create()
    with anvil.running(forgetful.anvil, 31337) as (_, url):
        client = at(forgetful, url)
        hashes = [
            client.transact(account, client.register_peer(str(i)), 10).tx_hash
            for i in range(KEPT + 20)
        ]
        assert client.receipt(hashes[0]) is None
        assert client.receipt(hashes[-1]) is not None
        assert len(client.read("getPeerId(address[])", [account.address])[0]) == KEPT + 20


def test_keeper_goes_on_when_the_log_of_the_registrations_is_gone(forgetful):
    with anvil.running(forgetful.anvil, 31337) as (_, url):
        client, owner, account = (
            at(forgetful, url),
            anvil.load_owner(forgetful.keeper),
            Account.create(),
        )
        for peer in ("a", "b"):
            client.transact(account, client.register_peer(peer), 10)
        for round in range(KEPT):
            client.transact(owner, client.advance_round(round), 10)
        assert list(client.events("PeerRegistered")) == []
        for peer in ("a", "b"):
            client.transact(account, client.submit_reward(KEPT, 0, 1, peer), 10)
        values = forgetful.keeper.model_copy(update={"min_peers": 2, "poll_seconds": 0.05})
        off = forgetful.audit.model_copy(update={"every_rounds": 0})
        Keeper(forgetful.model_copy(update={"keeper": values, "audit": off})).look()
        assert client.current_round() == KEPT + 1


def test_chain_that_has_grown_restarts_at_the_same_address_and_loses_nothing(forgetful, tmp_path):
    file, log, address = tmp_path / "grown.yaml", tmp_path / "chain.log", tmp_path / "chain/address"
    file.write_text(settings.dump(forgetful))
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-c", IMPATIENT_CHAIN, file], cwd=ROOT, stdout=output, stderr=output
        )
    try:
        eventually(address.exists)
        url, account = address.read_text(), Account.create()
        client = at(forgetful, url)
        with closing(Sender(client, account, tmp_path / "journal.db")) as sender:
            number = 0
            deadline = time.monotonic() + 200
            while log.read_text().count("chain restarts: its state has grown") < 2:
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                number += send_if_there(sender, client, f"peer-{number}")
            eventually(
                lambda: send_if_there(sender, client, f"peer-{number}")
            )  # its answer may have been lost
            eventually(lambda: is_done(sender))
            assert number > KEPT
            peers = {f"peer-{i}" for i in range(number + 1)}
            eventually(
                lambda: set(client.read("getPeerId(address[])", [account.address])[0]) == peers
            )
            assert client.nonce(account.address) == number + 1
        assert address.read_text() == url
    finally:
        process.terminate()
        assert process.wait(30) == 0, log.read_text()


def send_if_there(sender: Sender, client: Coordinator, peer: str) -> bool:
    try:
        sender.send(client.register_peer(peer))
    except ChainUnreachable:
        return False
    return True


def is_done(sender: Sender) -> bool:
    try:
        return sender.tend() == 0
    except ChainUnreachable:
        return False


@pytest.mark.parametrize(("megabytes", "seconds"), [(0, 1), (1, 1), (60, 18), (300, 90)])
def test_dumps_of_a_large_state_are_further_apart(tmp_path, megabytes, seconds):
    file = tmp_path / "state.json"
    with file.open("wb") as sparse:
        sparse.truncate(megabytes * 1_000_000)
    assert pruning.dump_seconds(file) == seconds
    assert pruning.dump_seconds(tmp_path / "none") == 1


@pytest.mark.parametrize(
    "text", ["{broken", '{"best_block_number":3}', '{"a":1,"blocks":[{}],"transactions":[]}']
)
def test_state_in_another_form_stays_as_it_is_and_that_is_logged(tmp_path, caplog, text):
    file = tmp_path / "state.json"
    file.write_text(text)
    pruning.cut(file, 64)
    assert file.read_text() == text
    assert (
        f"history not pruned: the state file is not in our anvil's form file={file}" in caplog.text
    )


def test_fast_growth_is_logged_once_each_time_and_slow_growth_never(tmp_path, monkeypatch, caplog):
    file, now = tmp_path / "state.json", [0.0]
    monkeypatch.setattr(pruning, "_WORRY_MEGABYTES", 0.5)
    monkeypatch.setattr(pruning.time, "monotonic", lambda: now[0])
    file.write_bytes(bytes(100_000))
    growth = pruning.Growth(file)

    def look(size: int, minutes: float) -> list[str]:
        caplog.clear()
        file.write_bytes(bytes(size))
        now[0] += 60 * minutes
        growth.look()
        return caplog.messages

    assert look(400_000, 5) == []
    (said,) = look(1_100_000, 5)
    assert said.startswith(f"the chain grows fast: state file {file} from 0 to 1 MB in 10 minutes")
    assert look(1_200_000, 1) == []
    # An hour later counting begins again: that much in two hours is slow.
    assert look(1_500_000, 61) == []
    assert look(1_900_000, 61) == []
