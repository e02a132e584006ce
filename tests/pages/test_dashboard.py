"""The dashboard's JSON about a real chain, without a browser."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import requests
from eth_abi import encode
from web3.types import RPCEndpoint, RPCResponse

from tests import preloaded
from tests.chain.conftest import Chain
from tests.pages.dashboards import Dashboard, showing, with_dashboard
from worker import settings
from worker.chain.coordinator import Coordinator
from worker.chain.embedded import anvil
from worker.chain.rpc import Rpc
from worker.dashboard import counts, history, reader
from worker.dashboard.reader import Reader
from worker.dashboard.store import FILE, Store, reading
from worker.errors import SettingsError, WorkerError
from worker.swarm.identity import animal_name

OF_ANOTHER = "the report is of another contract or version"
PEERS = ["QmFirst", "QmSecond", "QmThird"]


def two_rounds(chain: Chain) -> str:
    """Make two rounds of rewards and votes by three peers, and open a third; return the account."""
    account = chain.new_account(*PEERS)
    for round, rewards in enumerate([(100, 200, 600), (400, 500, 900)]):
        for peer_id, reward in zip(PEERS, rewards, strict=True):
            chain.send(account, chain.coordinator.submit_reward(round, 0, reward, peer_id))
            chain.send(account, chain.coordinator.submit_winners(round, ["QmThird"], peer_id))
        chain.advance()
    chain.send(account, chain.coordinator.submit_reward(2, 0, 1000, "QmThird"))
    return str(account.address)


def deployed(place: settings.Settings, url: str) -> Chain:
    """Return the contract on the anvil at `url`, deployed if it is missing."""
    there = place.model_copy(update={"chain": place.chain.model_copy(update={"rpc_url": (url,)})})
    deployment = anvil.deploy(there)
    coordinator = Coordinator(there.chain)
    coordinator.check()
    return Chain(there, deployment, anvil.load_owner(there.keeper), coordinator)


def looked(of: settings.Settings) -> Reader:
    found = Reader(of, Store(of.dashboard.state_dir))
    assert found.look(), found.content()["error"]
    return found


def test_swarm_is_told_as_the_chain_has_it(chain: Chain, dashboard: Dashboard) -> None:
    account = two_rounds(chain)
    bootnode = "/ip4/192.0.2.1/tcp/38331/p2p/QmBoot"
    chain.send(chain.owner, chain.coordinator.add_bootnodes([bootnode]))
    said = dashboard.says(lambda said: said["bootnodes"] and len(said["rounds"]) == 3)
    assert (said["round"], said["stage"], said["org_id"], said["error"]) == (
        2,
        0,
        "hivewright",
        None,
    )
    assert (said["chain_id"], said["contract"]) == (31337, chain.deployment.contract)
    assert abs(said["round_since"] - time.time()) < 60
    assert abs(said["updated_at"] - time.time()) < 10
    assert said["bootnodes"] == [bootnode]
    assert said["rounds"] == [
        {"round": 0, "mean_reward": 300.0, "num_peers": 3},
        {"round": 1, "mean_reward": 600.0, "num_peers": 3},
        {"round": 2, "mean_reward": 1000.0, "num_peers": 1},
    ]
    assert said["num_peers"] == 3
    # Best first.
    assert [peer["peer_id"] for peer in said["peers"]] == ["QmThird", "QmSecond", "QmFirst"]
    assert said["peers"][0] == {
        "peer_id": "QmThird",
        "name": animal_name("QmThird"),
        "account": account,
        "total_reward": 2500,
        "audited_reward": None,
        "wins": 4,
        "last_round": 2,
        "last_vote": 1,
        "rewards": [[0, 600], [1, 900], [2, 1000]],
        "audit": None,
    }
    assert said["audit"] is None


@pytest.fixture(scope="module")
def lonely(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Dashboard]:
    """Run a dashboard without a chain."""
    folder = tmp_path_factory.mktemp("lonely")
    away = settings.parse({"chain": {"deployment_file": str(folder / "deployment.json")}}, "test")
    with showing(with_dashboard(away, folder / "dashboard")) as shown:
        yield shown


def test_page_and_all_that_it_needs_come_from_here_alone(lonely: Dashboard) -> None:
    page = requests.get(f"{lonely.url}/", timeout=10)
    assert page.status_code == 200
    assert "default-src 'none'" in page.headers["Content-Security-Policy"]
    assert "'unsafe-inline'" not in page.headers["Content-Security-Policy"]
    for path in ("/page.js", "/page.css", "/base.css", "/icon.svg"):
        assert f'"{path}"' in page.text
        assert requests.get(lonely.url + path, timeout=10).status_code == 200
    assert "://" not in page.text


@pytest.mark.parametrize(
    ("method", "path", "status"), [("GET", "/%1b[31m", 404), ("POST", "/", 405)]
)
def test_what_is_not_there_is_an_error_in_json(
    lonely: Dashboard, method: str, path: str, status: int
) -> None:
    answer = requests.request(method, lonely.url + path, timeout=10)
    assert answer.status_code == status
    assert answer.json()["error"].isprintable()
    assert answer.headers["X-Content-Type-Options"] == "nosniff"


def test_looking_costs_the_chain_nothing_where_nothing_happens(
    chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    two_rounds(chain)
    asked: list[str] = []
    make_request = Rpc.make_request

    def noted(self: Rpc, method: RPCEndpoint, params: object) -> RPCResponse:
        asked.append(method)
        return make_request(self, method, params)

    monkeypatch.setattr(Rpc, "make_request", noted)
    found = looked(with_dashboard(chain.settings, tmp_path))
    asked.clear()
    assert found.look()
    assert asked
    assert set(asked) <= {"eth_chainId", "eth_blockNumber", "eth_getBlockByNumber"}
    chain.send(chain.new_account("QmNew"), chain.coordinator.submit_reward(2, 0, 5, "QmNew"))
    asked.clear()
    assert found.look()
    assert asked.count("eth_getLogs") == 4
    assert found.content()["num_peers"] == 4


def test_what_was_read_half_is_not_counted_twice(
    chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The chain fails at each of the calls in turn."""
    two_rounds(chain)
    found = Reader(with_dashboard(chain.settings, tmp_path), Store(tmp_path))
    asked: list[str] = []
    num_answers = 0
    make_request = Rpc.make_request

    def failing(self: Rpc, method: RPCEndpoint, params: object) -> RPCResponse:
        asked.append(method)
        if len(asked) > num_answers:
            raise WorkerError("no answer just now")
        return make_request(self, method, params)

    monkeypatch.setattr(Rpc, "make_request", failing)
    while not found.look():
        assert found.content()["error"] == "no answer just now"
        asked.clear()
        num_answers += 1
    assert num_answers > 10
    assert [each["mean_reward"] for each in found.content()["rounds"]] == [300.0, 600.0, 1000.0]


def stored(store: Store) -> list[tuple[int, float, int]]:
    with reading(store.file) as connection:
        rows = history.last_rounds(connection, 100)
    return [(row["round"], row["mean"], row["peers"]) for row in rows]


@pytest.mark.parametrize("damage", ["removed", "garbage"])
def test_lost_history_is_read_again_from_the_chain(
    chain: Chain, tmp_path: Path, damage: str
) -> None:
    two_rounds(chain)
    store = Store(tmp_path)
    found = Reader(with_dashboard(chain.settings, tmp_path), store)
    assert found.look()
    whole = [(2, 1000.0, 1), (1, 600.0, 3), (0, 300.0, 3)]
    assert stored(store) == whole
    store.file.unlink()
    if damage == "garbage":
        store.file.write_bytes(b"garbage" * 1000)
    assert found.look()
    assert stored(store) == whole
    # A dashboard that starts again continues, and counts nothing twice.
    store.close()
    again = Store(tmp_path)
    assert Reader(with_dashboard(chain.settings, tmp_path), again).look()
    assert stored(again) == whole


def test_blocks_that_the_chain_lost_are_taken_back(chain: Chain, tmp_path: Path) -> None:
    account = chain.new_account("QmFirst", "QmSecond")
    store = Store(tmp_path)
    found = Reader(with_dashboard(chain.settings, tmp_path), store)
    chain.send(account, chain.coordinator.submit_reward(0, 0, 400, "QmFirst"))
    assert found.look()
    rpc = chain.coordinator.web3.provider.make_request
    taken = rpc(RPCEndpoint("evm_snapshot"), [])["result"]
    chain.send(account, chain.coordinator.submit_reward(0, 0, 800, "QmSecond"))
    assert found.look()
    assert stored(store) == [(0, 600.0, 2)]
    assert rpc(RPCEndpoint("evm_revert"), [taken])["result"]
    chain.send(account, chain.coordinator.submit_reward(0, 0, 200, "QmSecond"))
    assert found.look()
    assert stored(store) == [(0, 300.0, 2)]


def test_text_of_peers_is_one_harmless_line(chain: Chain, tmp_path: Path) -> None:
    call = chain.coordinator.register_peer("")
    for peer_id in (
        b"\x1b[31mred",
        "\u202eevil\n".encode(),
        b"\xff\xfe!!",
        b"<b>bold</b>",
        "é".encode() * 64,
    ):
        # Text and bytes are encoded alike.
        chain.send(chain.owner, replace(call, data=call.data[:4] + encode(["bytes"], [peer_id])))
    content = looked(with_dashboard(chain.settings, tmp_path)).content()
    shown = {peer["peer_id"] for peer in content["peers"]}
    assert shown == {"\\x1b[31mred", "\\u202eevil\\n", "\\xff\\xfe!!", "<b>bold</b>", "é" * 64}


def test_bounded_however_many_peers_and_rounds_there_are(
    chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(counts, "MAX_PEERS", 3)
    monkeypatch.setattr(counts, "NUM_LAST_REWARDS", 2)
    for module in (counts, reader):
        monkeypatch.setattr(module, "MAX_ROUNDS", 2)
    monkeypatch.setattr(reader, "MAX_PEERS_SHOWN", 2)
    two_rounds(chain)
    chain.new_account(*(f"QmSilent{number}" for number in range(10)))
    found = looked(with_dashboard(chain.settings, tmp_path))
    # Those that report stay, whoever else registers.
    assert set(found._tally.peers) == set(PEERS)
    assert [each["round"] for each in found.content()["rounds"]] == [1, 2]
    assert [(peer["peer_id"], peer["rewards"]) for peer in found.content()["peers"]] == [
        ("QmThird", [(1, 900), (2, 1000)]),
        ("QmSecond", [(1, 500)]),
    ]
    # The contract state has sums over more rounds than the log that is kept.
    assert [peer["total_reward"] for peer in found.content()["peers"]] == [2500, 700]


def test_chain_that_has_forgotten_is_known_by_its_books(
    place: settings.Settings, tmp_path: Path
) -> None:
    """The chain keeps a short history, and the contract's state in full."""
    num_kept = 64
    forgetful = place.model_copy(
        update={"anvil": place.anvil.model_copy(update={"history_blocks": num_kept})}
    )
    with anvil.running(forgetful.anvil, forgetful.chain.id) as (_, url):
        there = deployed(forgetful, url)
        account = two_rounds(there)
        found = looked(with_dashboard(there.settings, tmp_path))
        for _ in range(num_kept):
            there.advance()
        last = there.coordinator.current_round() - 1
        there.send(
            there.new_account("QmNew"), there.coordinator.submit_reward(last, 0, 300, "QmNew")
        )
        # A reader that was in time continues from there.
        assert found.look()
        assert found.content()["num_peers"] == 4
        assert len(found.content()["rounds"]) == 4
    with anvil.running(forgetful.anvil, forgetful.chain.id) as (_, url):
        anew = looked(with_dashboard(deployed(forgetful, url).settings, tmp_path)).content()
    assert anew["rounds"] == [{"round": last, "mean_reward": 300.0, "num_peers": 1}]
    # Of those whose log is gone, the one that others voted for.
    assert [(each["peer_id"], each["total_reward"], each["wins"]) for each in anew["peers"]] == [
        ("QmThird", 2500, 4),
        ("QmNew", 300, 0),
    ]
    assert anew["peers"][0]["account"] == account


def test_verdicts_of_an_audit_are_told(
    chain: Chain, tmp_path: Path, usual_recursion_limit: None
) -> None:
    two_rounds(chain)
    file = tmp_path / "audit.json"
    found = looked(with_dashboard(chain.settings, tmp_path, audit_file=file))
    assert found.content()["audit"] == {"updated_at": None, "error": "no report yet"}
    counts = {"audited": 2, "unaudited": 0, "contradicted": 1}
    report = {
        "version": 1,
        "chain_id": 31337,
        "contract": chain.deployment.contract,
        "updated_at": 5.0,
        "counts": counts,
        "peers": {"QmThird": counts},
        "rewards": [],
    }
    for text, audit, of_third in [
        (json.dumps(report), {"updated_at": 5.0, "error": None}, counts),
        ("[" * 100_000, {"updated_at": None, "error": "the report can't be read"}, None),
        (json.dumps(report | {"contract": "0x"}), {"updated_at": None, "error": OF_ANOTHER}, None),
        (json.dumps(report), {"updated_at": 5.0, "error": None}, counts),
    ]:
        file.write_text(text)
        found.look()
        assert found.content()["audit"] == audit
        assert [peer["audit"] for peer in found.content()["peers"]] == [of_third, None, None]


def test_foreign_contract_is_shown_too(foreign: Chain, tmp_path: Path) -> None:
    account = foreign.new_account(*PEERS)
    for peer_id in PEERS[:1]:
        foreign.send(account, foreign.coordinator.submit_reward(0, 0, 400, peer_id))
    foreign.send(account, foreign.coordinator.submit_winners(0, ["QmSecond"], "QmFirst"))
    content = looked(with_dashboard(foreign.settings, tmp_path)).content()
    assert content["rounds"] == [{"round": 0, "mean_reward": 400.0, "num_peers": 1}]
    assert [(peer["peer_id"], peer["wins"]) for peer in content["peers"]] == [
        ("QmFirst", 0),
        ("QmSecond", 1),
        ("QmThird", 0),
    ]


def test_contract_without_leaderboards_costs_none_of_the_wins(
    foreign_060: Chain, tmp_path: Path
) -> None:
    """On release 0.6.0."""
    account = foreign_060.new_account(*PEERS)
    foreign_060.send(account, foreign_060.coordinator.submit_reward(0, 0, 400, "QmFirst"))
    foreign_060.send(
        account, foreign_060.coordinator.submit_winners(0, ["QmSecond", "QmNobody"], "QmFirst")
    )
    found = looked(with_dashboard(foreign_060.settings, tmp_path))
    assert [
        (peer["peer_id"], peer["total_reward"], peer["wins"]) for peer in found.content()["peers"]
    ] == [
        ("QmFirst", 400, 0),
        ("QmSecond", 0, 1),
        ("QmThird", 0, 0),
    ]
    foreign_060.send(account, foreign_060.coordinator.submit_winners(0, ["QmSecond"], "QmThird"))
    assert found.look()
    assert [peer["wins"] for peer in found.content()["peers"]] == [0, 2, 0]


def report_of(chain: Chain, sums: dict[str, dict[str, int]]) -> str:
    counts = {
        peer: {name: int(value > 0) for name, value in of.items()} for peer, of in sums.items()
    }
    report = {
        "version": 1,
        "chain_id": 31337,
        "contract": chain.deployment.contract,
        "updated_at": 5.0,
        "counts": {},
        "peers": counts,
        "sums": sums,
        "rewards": [],
    }
    return json.dumps(report)


def test_peers_are_ranked_by_audited_rewards_where_the_host_says_so(
    chain: Chain, tmp_path: Path
) -> None:
    two_rounds(chain)
    file = tmp_path / "audit.json"
    of = with_dashboard(chain.settings, tmp_path, audit_file=file, count_unaudited=False)
    unknown = looked(of).content()
    assert unknown["ranked_by"] == "audited_reward"
    assert {peer["audited_reward"] for peer in unknown["peers"]} == {None}  # no report: not 0
    file.write_text(
        report_of(
            chain,
            {
                "QmFirst": {"audited": 500, "unaudited": 0, "contradicted": 0},
                "QmThird": {"audited": 400, "unaudited": 2100, "contradicted": 0},
            },
        )
    )
    audited = looked(of).content()["peers"]
    assert [
        (peer["peer_id"], peer["audited_reward"], peer["total_reward"]) for peer in audited
    ] == [
        ("QmFirst", 500, 500),
        ("QmThird", 400, 2500),
        ("QmSecond", 0, 700),
    ]
    counted = looked(with_dashboard(chain.settings, tmp_path, audit_file=file)).content()
    assert (counted["ranked_by"], counted["peers"][0]["peer_id"]) == ("total_reward", "QmThird")


def test_audited_rewards_are_stored_though_no_block_comes(chain: Chain, tmp_path: Path) -> None:
    two_rounds(chain)
    file = tmp_path / "audit.json"
    of = with_dashboard(chain.settings, tmp_path, audit_file=file, count_unaudited=False)
    found = looked(of)
    sums = {"QmFirst": {"audited": 500, "unaudited": 0, "contradicted": 0}}
    file.write_text(report_of(chain, sums))
    for _ in range(2):
        assert found.look()
    with reading(tmp_path / FILE) as connection:
        part = history.peers(connection, "audited", False, "", 0, "audited_reward")
    assert [(row["peer_id"], row["audited"]) for row in part.rows] == [
        ("QmFirst", 500),
        ("QmSecond", 0),
        ("QmThird", 0),
    ]


def test_audited_rewards_alone_need_a_report() -> None:
    with pytest.raises(SettingsError, match="count_unaudited is false and audit_file is not set"):
        settings.parse({"dashboard": {"count_unaudited": False}}, "test")


def test_without_a_chain_it_serves_and_says_so(lonely: Dashboard) -> None:
    said = lonely.says(lambda said: said["error"])
    assert "deployment.json (chain.deployment_file): not there yet" in said["error"]
    assert (said["updated_at"], said["round"], said["peers"]) == (None, None, [])
    assert time.time() - 600 < said["error_since"] <= time.time()


def run(*, folder: Path, **of: object) -> subprocess.CompletedProcess[str]:
    (folder / "dashboard.yaml").write_text(json.dumps(of))
    command = [sys.executable, "-m", "worker", "dashboard", "--settings", folder / "dashboard.yaml"]
    return preloaded.run(command, "worker.dashboard.server", timeout=120)


def test_at_an_address_of_its_own_it_answers_on_its_machine_too(
    chain: Chain, tmp_path: Path
) -> None:
    """`tailscale_serve` forwards to 127.0.0.1."""
    with showing(with_dashboard(chain.settings, tmp_path / "dashboard", host="127.0.0.2")) as shown:
        assert shown.url.startswith("http://127.0.0.2:")
        for url in (shown.url, shown.url.replace("127.0.0.2", "127.0.0.1")):
            assert requests.get(f"{url}/api/swarm", timeout=10).status_code == 200


def test_what_can_not_be_is_one_line(tmp_path: Path, lonely: Dashboard) -> None:
    port = int(lonely.url.rpartition(":")[2])
    chain = {"rpc_url": "http://127.0.0.1:1"}
    for of, code, message in [
        (
            {"chain": chain, "dashboard": {"port": port}},
            4,
            f"port {port} (dashboard.port): already in use",
        ),
        (
            {"chain": chain, "dashboard": {"prot": 1}},
            2,
            "dashboard.prot: not a known key; did you mean dashboard.port?",
        ),
        (
            {"dashboard": {"state_dir": str(tmp_path)}},
            2,
            "all empty; the dashboard shows what a chain says; set one",
        ),
        (
            {"chain": chain, "dashboard": {"port": 0, "state_dir": str(lonely.folder)}},
            4,
            "in use by process",
        ),
        (
            {"chain": chain, "dashboard": {"port": 0, "state_dir": "/proc/x"}},
            4,
            "/proc/x (dashboard.state_dir)",
        ),
    ]:
        done = run(folder=tmp_path, **of)
        assert done.returncode == code, done.stderr
        assert message in done.stderr.splitlines()[-1]
        assert "Traceback" not in done.stderr
