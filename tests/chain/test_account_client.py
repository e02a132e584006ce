import stat
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from account_service import (
    ENROLMENT_TOKEN,
    account_settings,
    eventually,
    faulty,
    serving,
    some_identity,
)

from worker import cli, settings
from worker.chain import account_client, peer_proof
from worker.chain.account_client import AccountClient
from worker.chain.coordinator import Coordinator
from worker.chain.registration import enrol
from worker.errors import (
    ChainError,
    ChainUnreachable,
    ContractRefused,
    IdentityError,
    SecretError,
    SettingsError,
)
from worker.runtime.state_dir import StateDir
from worker.swarm import identity


@pytest.fixture
def service(chain, tmp_path):
    with serving(account_settings(chain.settings, tmp_path / "account")) as running:
        yield running


@pytest.fixture
def node(tmp_path_factory):
    return some_identity(tmp_path_factory.getbasetemp())


def answering(status: int, body: bytes):
    """A server that gives every request this one answer."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    return HTTPServer(("127.0.0.1", 0), Handler)


def test_enrol_stores_the_token_and_registers_the_peer(chain, service, node, tmp_path) -> None:
    owner = enrol(node, ENROLMENT_TOKEN, service.node_chain(), tmp_path / "node")
    assert owner == service.service.address == chain.coordinator.owner_of(node.peer_id)
    file = tmp_path / "node/account.token"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert file.read_text().startswith(node.peer_id)


def test_enrol_again_changes_nothing_and_needs_no_enrolment_token(
    chain, service, node, tmp_path
) -> None:
    enrol(node, ENROLMENT_TOKEN, service.node_chain(), tmp_path)
    before = (tmp_path / "account.token").stat().st_mtime_ns
    nonce = chain.coordinator.nonce(service.service.address)
    for token in (ENROLMENT_TOKEN, None, "one that was changed meanwhile"):
        assert enrol(node, token, service.node_chain(), tmp_path) == service.service.address
    assert (tmp_path / "account.token").stat().st_mtime_ns == before
    assert chain.coordinator.nonce(service.service.address) == nonce


def test_enrol_replaces_a_token_that_is_good_no_more(service, node, tmp_path) -> None:
    (tmp_path / "account.token").write_text("stale\n")
    assert enrol(node, ENROLMENT_TOKEN, service.node_chain(), tmp_path) == service.service.address


def test_enrol_without_any_token_says_what_is_missing(service, node, tmp_path) -> None:
    with pytest.raises(
        SecretError, match=r"account\.token.*No such file.*chain.enrolment_token_file"
    ):
        enrol(node, None, service.node_chain(), tmp_path)


def test_enrol_with_a_wrong_enrolment_token_is_refused_by_name(
    chain, service, node, tmp_path
) -> None:
    with pytest.raises(IdentityError, match="HTTP 403: EnrolmentTokenWrong"):
        enrol(node, "guess", service.node_chain(), tmp_path)
    assert not (tmp_path / "account.token").exists()
    assert chain.coordinator.owner_of(node.peer_id) is None


def test_enrol_proves_that_the_node_holds_its_key(chain, service, node, tmp_path) -> None:
    ours = enrol(node, ENROLMENT_TOKEN, service.node_chain(), tmp_path)
    assert peer_proof.binding(chain.coordinator, node.peer_id) == peer_proof.Binding(ours, True, 0)


def test_enrol_takes_the_peer_from_a_squatter(chain, service, node, tmp_path) -> None:
    chain.new_account(node.peer_id)
    ours = enrol(node, ENROLMENT_TOKEN, service.node_chain(), tmp_path)
    assert ours == service.service.address == chain.coordinator.owner_of(node.peer_id)


def test_judge_address_of_a_service_is_a_url_or_an_error() -> None:
    assert account_client._url_in({}, "judge_url", "here") is None
    assert account_client._url_in({"judge_url": None}, "judge_url", "here") is None
    assert account_client._url_in({"judge_url": "https://j"}, "judge_url", "here") == "https://j"
    for wrong in ("", "ftp://j", 7, ["https://j"]):
        with pytest.raises(ChainError, match="here: judge_url: got "):
            account_client._url_in({"judge_url": wrong}, "judge_url", "here")


def test_enrol_again_proves_what_was_registered_without_a_proof(
    chain, service, node, tmp_path
) -> None:
    service.enrolled(node, tmp_path).register_peer(node.peer_id)
    eventually(lambda: chain.coordinator.owner_of(node.peer_id))
    enrol(node, None, service.node_chain(), tmp_path)
    eventually(lambda: peer_proof.binding(chain.coordinator, node.peer_id).is_proven)


def test_peer_that_another_account_proved_is_refused_with_both_accounts_and_moved_on_demand(
    chain, service, node, tmp_path
) -> None:
    other = chain.new_account()
    shown = peer_proof.of_registration(node, chain.deployment, other.address)
    chain.send(other, peer_proof.call(chain.coordinator, node.peer_id, shown))
    with pytest.raises(IdentityError) as caught:
        enrol(node, ENROLMENT_TOKEN, service.node_chain(), tmp_path)
    assert f"registered by {other.address}" in str(caught.value)
    assert f"this node's account is {service.service.address}" in str(caught.value)
    assert "move the peer (`hivewright enrol --move`)" in str(caught.value)
    for _ in range(2):
        assert (
            enrol(node, None, service.node_chain(), tmp_path, move=True) == service.service.address
        )
    assert peer_proof.binding(chain.coordinator, node.peer_id) == peer_proof.Binding(
        service.service.address, True, 1
    )


def test_command_moves_the_peer_of_a_former_account(chain, service, tmp_path) -> None:
    node = identity.create(tmp_path / "node" / StateDir.identity)
    former = chain.new_account()
    shown = peer_proof.of_registration(node, chain.deployment, former.address)
    chain.send(former, peer_proof.call(chain.coordinator, node.peer_id, shown))
    (tmp_path / "token").write_text(ENROLMENT_TOKEN)
    raw = {
        "node": {"state_dir": str(tmp_path / "node")},
        "chain": {
            "account_url": service.url,
            "enrolment_token_file": str(tmp_path / "token"),
            "poll_seconds": 0.1,
        },
    }
    (tmp_path / "worker.yaml").write_text(settings.dump(settings.parse(raw, "test")))
    command = ["enrol", "--settings", str(tmp_path / "worker.yaml")]
    for options, code in (([], 3), (["--move"], 0), ([], 0)):
        with pytest.raises(SystemExit) as ended:
            cli.main([*command, *options])
        assert ended.value.code == code
    assert chain.coordinator.owner_of(node.peer_id) == service.service.address


def test_enrol_on_a_foreign_contract_does_without_a_proof_and_says_so(
    foreign, node, tmp_path, caplog
) -> None:
    with serving(account_settings(foreign.settings, tmp_path / "account")) as running:
        ours = enrol(node, ENROLMENT_TOKEN, running.node_chain(), tmp_path)
        assert foreign.coordinator.owner_of(node.peer_id) == ours
        assert (
            f"contract checks no proofs: peer {node.peer_id} is registered without one"
            in caplog.text
        )
        # A node that thinks otherwise is registered all the same.
        other = some_identity(tmp_path, 1)
        shown = peer_proof.of_registration(other, foreign.deployment, ours)
        running.enrolled(other, tmp_path / "other").register_peer(other.peer_id, shown)
        eventually(lambda: foreign.coordinator.owner_of(other.peer_id) == ours)


def test_peer_of_others_on_a_foreign_contract_is_refused(foreign, node, tmp_path) -> None:
    outsider = foreign.new_account(node.peer_id)
    refusal = pytest.raises(IdentityError, match=f"registered by {outsider.address}")
    with serving(account_settings(foreign.settings, tmp_path / "account")) as running, refusal:
        enrol(node, ENROLMENT_TOKEN, running.node_chain(), tmp_path)


def test_writes_reach_the_chain(chain, service, node, tmp_path) -> None:
    client = service.enrolled(node, tmp_path)
    for tx_hash in (
        client.register_peer(node.peer_id),
        client.submit_reward(0, 0, -17, node.peer_id),
        client.submit_winner(0, ["somebody"], node.peer_id),
    ):
        assert chain.coordinator.wait_for_receipt(tx_hash, 10).succeeded
    assert chain.coordinator.submitted_reward(0, 0, node.peer_id) == -17
    assert chain.coordinator.votes(0, node.peer_id) == ["somebody"]


def test_refusals_of_the_contract_keep_their_names(service, node, tmp_path) -> None:
    client = service.enrolled(node, tmp_path)
    with pytest.raises(ContractRefused) as caught:
        client.submit_reward(0, 0, 1, node.peer_id)
    assert caught.value.name == "InvalidVoterPeerId"
    assert "HTTP 400: InvalidVoterPeerId; " in str(caught.value)


def test_swarm_tells_chain_contract_and_account(chain, service, tmp_path) -> None:
    info = AccountClient(service.node_chain(), tmp_path).swarm()
    assert (info.chain_id, info.contract, info.org_id) == (
        31337,
        chain.deployment.contract,
        "hivewright",
    )
    assert info.account == service.service.address


def test_another_org_id_is_a_settings_error(service, node, tmp_path) -> None:
    client = service.enrolled(node, tmp_path, org_id="else")
    with pytest.raises(
        SettingsError, match=r"User not found; check chain.account_url and chain.org_id .else."
    ):
        client.register_peer(node.peer_id)


def test_coordinator_reads_the_chain_through_the_account_service_with_its_token(
    chain, service, node, tmp_path
) -> None:
    chain.advance()
    without = Coordinator(settings.chain_of_node(service.node_chain(), tmp_path))
    with pytest.raises(
        ChainUnreachable, match=r"HTTP 401: answers only with a node's token; `hivewright enrol`"
    ):
        without.current_round()
    service.enrolled(node, tmp_path)
    assert without.current_round() == 1


def test_no_account_url_is_a_settings_error(tmp_path) -> None:
    with pytest.raises(SettingsError, match=r"chain\.account_url: not set"):
        AccountClient(settings.Chain(), tmp_path)


def test_service_that_is_away_is_unreachable(tmp_path) -> None:
    with pytest.raises(
        ChainUnreachable, match=r"127.0.0.1:9/api/swarm \(chain.account_url\): no connection"
    ):
        AccountClient(settings.Chain(account_url="http://127.0.0.1:9"), tmp_path).swarm()


@pytest.mark.parametrize("kind", ["drop", "lose", "error"])
def test_bad_network_is_unreachable(service, node, tmp_path, kind) -> None:
    service.enrolled(node, tmp_path)
    with faulty(service.url, lambda _: kind) as proxy:
        client = AccountClient(service.node_chain(account_url=proxy.url), tmp_path)
        with pytest.raises(ChainUnreachable):
            client.register_peer(node.peer_id)


@pytest.mark.parametrize(
    ("status", "body", "error", "message"),
    [
        (200, b"<html>", ChainError, "the answer is not a JSON object"),
        (200, b"[1]", ChainError, "the answer is not a JSON object"),
        (200, b"[" * 100_000, ChainError, "the answer is not a JSON object"),
        (200, b"{}", ChainError, "hash is None; expected a transaction hash"),
        (200, b'{"hash": "0x12"}', ChainError, "hash is 0x12; expected a transaction hash"),
        (302, b"", ChainError, "HTTP 302"),
        (400, b'{"error": "bad body"}', ContractRefused, "HTTP 400: bad body"),
        (400, b'{"error": "\\u001b[31mX"}', ContractRefused, r"HTTP 400: \\x1b\[31mX"),
        (429, b"", ChainUnreachable, "HTTP 429"),
        (502, b"<html>", ChainUnreachable, "HTTP 502"),
        (
            503,
            b'{"error": "ChainUnreachable", "detail": "x"}',
            ChainUnreachable,
            "ChainUnreachable: x",
        ),
    ],
)
@pytest.mark.usefixtures("usual_recursion_limit")
def test_odd_answers_become_errors_of_ours(node, tmp_path, status, body, error, message) -> None:
    (tmp_path / "account.token").write_text("t\n")
    server = answering(status, body)
    thread = threading.Thread(target=server.handle_request, daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{server.server_address[1]}"
    chain = settings.Chain(account_url=url, org_id="hivewright")
    with pytest.raises(error, match=message) as caught:
        AccountClient(chain, tmp_path).register_peer(node.peer_id)
    assert type(caught.value) is error
    assert "\n" not in str(caught.value)
    thread.join(10)
    server.server_close()
