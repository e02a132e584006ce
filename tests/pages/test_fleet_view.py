"""The fleet on the dashboard: real endpoints, processes that do not answer or lie, and the page."""

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import requests
from playwright.sync_api import expect

from tests.chain.conftest import Chain
from tests.pages.browser import Tab
from tests.pages.dashboards import showing, with_dashboard
from worker.dashboard import history
from worker.dashboard.fleet_view import FleetView
from worker.dashboard.store import Store, reading


def test_each_process_is_told_with_its_figures_or_its_reason(targets: Path) -> None:
    view = FleetView(targets)
    view.look()
    worker, keeper = view.content()["processes"]
    assert (worker["name"], worker["round"], worker["state"]) == ("gpu-1", 12, "connected")
    assert (worker["reward"], worker["external_share"]) == (0.5, 0.25)
    assert worker["warnings"] == ("clock (severe)",)
    assert worker["host"] == r"<b>evil</b>\x1b"
    assert (worker["error"], worker["version"]) == (None, "0.1.0")
    assert view.content()["brier"] == {"bf": 0.25}
    assert worker["as_of"] > 1e9
    assert (keeper["error"], keeper["round"], keeper["as_of"]) == ("Connection refused", None, None)


def test_process_that_stops_answering_keeps_its_figures(targets: Path) -> None:
    view = FleetView(targets)
    view.look()
    (first, *_) = view._processes.values()
    view._processes = {"127.0.0.1:1": first}
    groups = [{"targets": ["127.0.0.1:1"], "labels": {"host": "a", "service": "worker"}}]
    targets.write_text(json.dumps(groups))
    view.look()
    (worker,) = view.content()["processes"]
    assert (worker["round"], worker["error"]) == (12, "Connection refused")


@pytest.mark.parametrize("text", ["{", "[1]", '[{"targets": []}]', "null", '{"a": 1}'])
def test_targets_that_are_none_are_said(tmp_path: Path, text: str) -> None:
    view = FleetView(tmp_path / "targets.json")
    view.look()
    assert str(view.content()["error"]).startswith("no targets yet")
    (tmp_path / "targets.json").write_text(text)
    view.look()
    assert view.content()["error"] == "the targets can't be read"


@contextmanager
def answering(*answers: bytes) -> Iterator[str]:
    """Serve these bodies, one for each connection, the last one forever; yield the address."""
    server = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        left = list(answers)
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            with connection:
                connection.recv(4096)
                body = left.pop(0) if len(left) > 1 else left[0]
                try:
                    connection.sendall(b"HTTP/1.0 200 OK\r\n\r\n" + body)
                except OSError:
                    continue

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield f"127.0.0.1:{server.getsockname()[1]}"
    finally:
        server.shutdown(socket.SHUT_RDWR)
        server.close()
        thread.join()


def view_of(tmp_path: Path, address: str, store: Store | None = None) -> FleetView:
    groups = [{"targets": [address], "labels": {"host": "a", "service": "worker", "slot": "0"}}]
    (tmp_path / "targets.json").write_text(json.dumps(groups))
    return FleetView(tmp_path / "targets.json", store)


@pytest.mark.parametrize(
    ("body", "error"),
    [
        (b"hivewright_round 1\n" * 600_000, "the answer has more than 1,000,000 bytes"),
        (b"\xff\xfe", "the answer is not text in UTF-8"),
        (b"hivewright_round{", ""),
    ],
)
def test_answer_of_a_lying_node_is_refused(tmp_path: Path, body: bytes, error: str) -> None:
    with answering(body) as address:
        view = view_of(tmp_path, address)
        view.look()
        (row,) = view.content()["processes"]
    assert row["round"] is None
    assert row["error"] is not None
    assert row["error"].startswith(error)


def metrics(state: str, round: int, reward: str, more: str = "") -> bytes:
    text = f"""hivewright_state{{node="gpu-1",state="{state}"}} 1
hivewright_round{{node="gpu-1"}} {round}
hivewright_round_finished_time_seconds{{node="gpu-1"}} {1000 + round}
hivewright_external_share{{node="gpu-1"}} 0.5
hivewright_family_reward_mean{{node="gpu-1",family="gcd",level="1"}} {reward}
hivewright_round_groups_rejected{{node="gpu-1",reason="<b>reward</b>"}} 2
{more}
"""
    return text.encode()


def test_rounds_become_curves_and_changes_become_events(tmp_path: Path) -> None:
    quarantined = (
        'hivewright_peer_quarantined_time_seconds{peer_id="QmLiar",reason="reward:2, for 60 s"} 5'
    )
    answers = [
        metrics("connected", 7, "0.5"),
        metrics("connected", 7, "0.5"),
        metrics("training-alone", 8, "0.25", quarantined),
        metrics("training-alone", 9, "NaN", quarantined),
    ]
    store = Store(tmp_path)
    with answering(*answers) as address:
        view = view_of(tmp_path, address, store)
        for _ in answers:
            view.look()
        view_of(tmp_path, address, store).look()  # after a restart: the same round again
    with reading(store.file) as connection:
        assert history.curves(connection, "family") == {
            "round": [7, 8],
            "series": {"gcd": [0.5, 0.25]},
        }
        rejected = history.curves(connection, "rejected")["series"]
        assert rejected == {"<b>reward</b>": [2, 2, 2]}
        counted = "SELECT num FROM curves WHERE name = 'rejected/<b>reward</b>' AND width = 1"
        assert [num for (num,) in connection.execute(counted)] == [1, 1, 1]
        events = [
            (row["subject"], row["text"]) for row in history.events(connection, 0, ["fleet"]).rows
        ]
    assert events == [
        ("a worker 0", "peer quarantined: QmLiar: reward:2, for 60 s"),
        ("a worker 0", "state connected, now training-alone"),
    ]


REASON = "a rollout's gate refused it: gpu-1: worker@0 ended with code 1, 3 restarts: <b>boom</b>"


def rolled_back(deployed_at: float, at: float) -> bytes:
    more = f'''hivewright_rolled_back_time_seconds{{release="0123abcd",reason="{REASON}"}} {at}
hivewright_deployed_time_seconds {deployed_at}'''
    return metrics("connected", 7, "0.5", more)


def test_host_that_went_back_is_one_event_with_the_reason(tmp_path: Path) -> None:
    """Also for a dashboard that was started later, or whose history was lost."""
    with answering(rolled_back(90, 100), rolled_back(90, 100), rolled_back(300, 100)) as address:
        store = Store(tmp_path)
        view = view_of(tmp_path, address, store)
        rows = []
        for _ in range(3):
            view.look()
            rows.append(view.content()["processes"][0]["rollback"])
        with reading(store.file) as connection:
            first = history.events(connection, 0, ["fleet"]).rows
    last = {"at": 100.0, "release": "0123abcd", "reason": REASON}
    # It is history as soon as another release is deployed.
    assert rows == [last, last, None]
    (event,) = [row for row in first if "went back" in row["text"]]
    assert (event["at"], event["subject"]) == (100.0, "a")
    assert event["text"] == f"went back from release 0123abcd: {REASON}"


def test_time_of_a_rollback_that_is_none_does_no_harm(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with answering(rolled_back(1, float("nan")), rolled_back(1, 1e15)) as address:
        view = view_of(tmp_path, address, store)
        view.look()
        assert view.content()["processes"][0]["rollback"] is None
        view.look()
    with reading(store.file) as connection:
        (event,) = history.events(connection, 0, ["fleet"]).rows
    assert event["at"] <= time.time()


@pytest.mark.e2e
@pytest.mark.timeout(180)
def test_curve_that_appears_later_is_drawn_and_stays_drawn(
    chain: Chain, tmp_path: Path, tab: Tab
) -> None:
    """A page that was loaded before the first figure; it is not loaded again."""
    chain.new_account("QmFirst")
    file = tmp_path / "targets.json"
    file.write_text("[]")
    of = with_dashboard(chain.settings, tmp_path / "d", show_fleet=True, targets_file=file)
    page = tab.page
    rounds = [metrics("connected", number, "0.5") for number in (1, 2)]
    more = metrics("connected", 3, "0.75")
    with answering(*rounds, more) as address, showing(of) as shown:
        shown.says(lambda said: said["num_peers"] == 1)
        page.goto(shown.url)
        expect(page.locator("#swarm")).to_be_visible()
        page.evaluate("window.isTheSame = true")
        expect(page.locator("#by-family")).to_be_hidden()
        groups = [{"targets": [address], "labels": {"host": "a", "service": "worker"}}]
        file.write_text(json.dumps(groups))
        canvas = page.locator("#by-family canvas")
        expect(canvas).to_be_visible()
        canvas.evaluate("each => { each.isTheSame = true; }")
        page.locator("#by-family details summary").click()
        page.locator("h1").first.evaluate("each => document.activeElement.blur()")
        expect(page.locator("#by-family details tbody td").nth(1)).to_have_text("0.75")
        assert canvas.count() == 1
        assert canvas.evaluate("each => each.isTheSame")
        assert page.locator("#by-family details").first.get_attribute("open") is not None
        assert page.evaluate("window.isTheSame")
        assert page.locator("#by-brier").is_hidden()


QUEUE = """hivewright_queue_transactions{state="waiting"} 2
hivewright_queue_transactions{state="sent"} 1
hivewright_queue_failed_total 3
hivewright_queue_time_seconds 1000
hivewright_queue_oldest_time_seconds 400
hivewright_queue_error_time_seconds{error="submitReward: <b>refused</b>"} 500
"""


@pytest.mark.e2e
@pytest.mark.timeout(180)
def test_chain_page_shows_the_queue_of_the_account_service(
    chain: Chain, tmp_path: Path, tab: Tab
) -> None:
    file = tmp_path / "targets.json"
    with answering(QUEUE.encode()) as address:
        groups = [
            {"targets": [address], "labels": {"host": "hub", "service": "account"}},
            {"targets": ["127.0.0.1:1"], "labels": {"host": "other", "service": "account"}},
        ]
        file.write_text(json.dumps(groups))
        of = with_dashboard(chain.settings, tmp_path / "d", show_fleet=True, targets_file=file)
        with showing(of) as shown:
            shown.says(lambda said: said["processes"], what="fleet")
            tab.page.set_viewport_size({"width": 1280, "height": 900})
            tab.page.goto(f"{shown.url}/chain")
            rows = tab.page.locator("#queues tbody tr")
            expect(rows).to_have_count(2)
            cells = [cell.inner_text() for cell in rows.first.locator("td").all()]
            assert cells[:4] == ["hub", "2", "1", "3"]
            assert cells[4].startswith("1970-01-01 00:06 UTC, ")
            assert cells[5] == "1970-01-01 00:08 UTC: submitReward: <b>refused</b>"
            assert cells[6] == "1970-01-01 00:16 UTC"
            expect(rows.last).to_contain_text("never, no answer: Connection refused")
            hidden = with_dashboard(chain.settings, tmp_path / "hidden", targets_file=file)
        with showing(hidden) as shown:
            assert "refused" not in requests.get(f"{shown.url}/chain", timeout=10).text


@pytest.mark.e2e
@pytest.mark.timeout(180)
def test_page_shows_the_fleet(chain: Chain, targets: Path, tmp_path: Path, tab: Tab) -> None:
    chain.new_account("QmFirst")
    of = with_dashboard(
        chain.settings, tmp_path / "dashboard", show_fleet=True, targets_file=targets
    )
    with showing(of) as shown:
        tab.page.set_viewport_size({"width": 1280, "height": 900})
        tab.page.goto(f"{shown.url}/fleet")
        tab.expect_count("#processes tr", 2)
        expect(tab.page.locator("#fleet-note")).to_have_text("2 processes, 1 without an answer")
        assert "<b>evil</b>" in tab.text("#processes tr")
        assert "25 %" in tab.text("#processes tr")
        rows = shown.says(lambda said: said["processes"], what="fleet")["processes"]
        assert [row["error"] for row in rows] == [None, "Connection refused"]
        tab.page.goto(shown.url)
        for name, figure in (("family", "gcd 0.50"), ("brier", "bf 0.25")):
            section = tab.page.locator(f"#by-{name}")
            section.locator("summary").click()
            row = section.locator("details tbody tr").first  # the chart's legend is a table too
            for text in figure.split():
                expect(row).to_contain_text(text)


def test_fleet_is_not_shown_unless_the_owner_says_so(
    chain: Chain, targets: Path, tmp_path: Path
) -> None:
    of = with_dashboard(chain.settings, tmp_path / "dashboard", targets_file=targets)
    with showing(of) as shown:
        assert requests.get(f"{shown.url}/api/fleet", timeout=10).json() is None
        assert requests.get(f"{shown.url}/fleet", timeout=10).status_code == 403
        assert requests.get(f"{shown.url}/api/curve?of=family", timeout=10).status_code == 404
        assert "/fleet" not in requests.get(shown.url, timeout=10).text
