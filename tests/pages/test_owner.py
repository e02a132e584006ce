"""The pages of a dashboard that only its owner sees, and the owner's way in."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
from playwright.sync_api import expect

from tests.pages.accessibility import barriers
from tests.pages.browser import Tab
from tests.pages.dashboards import Dashboard, showing, with_dashboard
from worker import settings
from worker.dashboard.owner import FILE, Owner
from worker.dashboard.reader import Reader
from worker.dashboard.store import Store
from worker.dashboard.views import Views
from worker.errors import ResourceError
from worker.telemetry.answer_log import Answer, AnsweredGroup, AnswerLog

EVIL = "<script>document.title=1</script>\x1b[31m\nsecond line"
PEER = "QmPeer" + "x" * 40


@pytest.fixture
def dashboard(tmp_path: Path) -> Iterator[Dashboard]:
    """Run a dashboard without a chain, next to a node with answers of two rounds."""
    node = tmp_path / "worker-0"
    node.mkdir()
    log = AnswerLog(node, 10, 10)
    for round in (1, 2):
        groups = [
            AnsweredGroup(
                *(round, "gcd", 1, "plain", peer_id, True, f"question of round {round}", "42"),
                (Answer(EVIL, 0.0), Answer("42", 1.0)),
            )
            for peer_id in (None, PEER)
        ]
        log.write(round, groups)
    of = settings.parse({"chain": {"rpc_url": "http://127.0.0.1:1"}}, "test")
    with showing(with_dashboard(of, tmp_path / "dashboard", node_dirs=(node,))) as shown:
        yield shown


def token_of(dashboard: Dashboard) -> str:
    return (dashboard.folder / FILE).read_text().strip()


def sign_in(dashboard: Dashboard, token: str, origin: str | None = None) -> requests.Response:
    return requests.post(
        f"{dashboard.url}/owner",
        data={"token": token},
        headers={"Origin": origin or dashboard.url},
        allow_redirects=False,
        timeout=10,
    )


def test_token_is_made_once_and_private(tmp_path: Path) -> None:
    Owner(tmp_path)
    token = (tmp_path / FILE).read_text()
    Owner(tmp_path)
    assert (tmp_path / FILE).read_text() == token
    assert (tmp_path / FILE).stat().st_mode & 0o777 == 0o600
    (tmp_path / FILE).write_text("short")
    with pytest.raises(ResourceError, match="has 5 characters; expected at least 32"):
        Owner(tmp_path)


def test_private_pages_need_the_token(dashboard: Dashboard) -> None:
    page = f"{dashboard.url}/answers"
    assert requests.get(page, timeout=10).status_code == 403
    for cookie in ("", "wrong", token_of(dashboard)):
        cookies = {"hivewright_owner": cookie}
        assert requests.get(page, cookies=cookies, timeout=10).status_code == 403
    for token in ("", "wrong", token_of(dashboard)[:-1]):
        answer = sign_in(dashboard, token)
        assert (answer.status_code, answer.cookies.get_dict()) == (403, {})
    assert sign_in(dashboard, token_of(dashboard), "http://evil.example").status_code == 403
    answer = sign_in(dashboard, token_of(dashboard))
    assert answer.status_code == 303
    cookie = answer.headers["Set-Cookie"]
    assert all(word in cookie for word in ("HttpOnly", "SameSite=Strict", "Secure"))
    assert token_of(dashboard) not in cookie
    value = cookie.partition("=")[2].partition(";")[0]
    shown = requests.get(page, cookies={"hivewright_owner": value}, timeout=10)
    assert shown.status_code == 200
    assert "question of round 2" in shown.text


def test_folder_that_the_dashboard_does_not_see_is_named(tmp_path: Path) -> None:
    """A node without answers is another thing."""
    place = tmp_path / "worker-0"
    of = settings.from_flat(
        {"dashboard_state_dir": str(tmp_path / "d"), "dashboard_node_dirs": [str(place)]}, "test"
    )
    store = Store(None)
    views = Views(of, Reader(of, store), store, None)

    def said() -> tuple[str | None, int]:
        (node,) = views.answers({}, is_owner=True)["nodes"]
        return node["error"], len(node["groups"])

    assert said() == (
        f"{place}/answers: not there, or not readable for this dashboard; the node"
        " makes it with its first round",
        0,
    )
    (place / "answers").mkdir(parents=True)
    assert said() == (None, 0)


@pytest.mark.e2e
@pytest.mark.timeout(180)
def test_owner_sees_a_sample_of_answers(dashboard: Dashboard, tab: Tab) -> None:
    page = tab.page
    page.goto(f"{dashboard.url}/owner")
    page.get_by_label("Token").fill(token_of(dashboard))
    page.get_by_label("Token").press("Enter")
    page.get_by_role("link", name="Answers").click()
    groups = page.locator("details.group")
    expect(groups).to_have_count(4)
    expect(groups.first).to_contain_text("round 2, gcd level 1, its own, mean reward 0.50")
    expect(groups.nth(1)).to_contain_text("of peer QmPeerxx…xxxxxx")
    for number in range(4):
        groups.nth(number).locator("summary").press("Enter")
    expect(groups.first).to_contain_text("question of round 2")
    expect(groups.first).to_contain_text("<script>document.title=1</script>\\x1b[31m")
    assert page.title() == "Answers · hivewright"
    for width in (360, 800, 1280):
        page.set_viewport_size({"width": width, "height": 900})
        tab.expect_no_scrolling_sideways(width)
        assert barriers(page) == []
