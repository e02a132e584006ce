"""The dashboard's page in a real browser, showing a real chain."""

from pathlib import Path
from typing import Literal

import pytest
import requests
from playwright.sync_api import Locator, Page, expect

from tests.chain.conftest import Chain
from tests.commands.test_training_report import node_with_history
from tests.pages.accessibility import barriers
from tests.pages.browser import Tab
from tests.pages.dashboards import Dashboard, showing, with_dashboard
from tests.pages.test_dashboard import deployed, report_of, two_rounds
from worker.chain.embedded import anvil
from worker.commands import training_report
from worker.settings import Settings
from worker.swarm.identity import animal_name

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(180)]

HOSTILE = "<img/src=x onerror='document.title=1'><script>document.title=1</script>"
DESKTOP = {"width": 1200, "height": 900}
ROWS = "#peers tr"
WIDTHS: tuple[tuple[int, Literal["light", "dark"]], ...] = (
    (360, "dark"),
    (800, "light"),
    (1280, "light"),
)


def test_page_shows_rounds_peers_and_rewards(chain: Chain, dashboard: Dashboard, tab: Tab) -> None:
    account = two_rounds(chain)
    page = tab.page
    page.set_viewport_size(DESKTOP)
    page.goto(dashboard.url)
    expect_all_rewards(tab)
    assert tab.text("#round") == "2"
    assert tab.text("#reporting") == "3"
    assert tab.text("#reporting-note") == "in round 1, 3 ever seen"
    assert tab.text("#mean") == "0.60"
    assert tab.text("#mean-note") == "+0.30 on the round before"
    expect(page.locator("#contract")).to_have_attribute("title", chain.deployment.contract)
    assert tab.text("#fresh").startswith("live, read ")
    first = tab.text(ROWS)
    assert animal_name("QmThird") in first
    assert "QmThird" in first
    assert f"{account[:6]}…{account[-4:]}" in first
    assert tab.text(".audit") == ""
    expect(page.locator(".chart canvas").first).to_be_visible()
    page.get_by_text("The newest rounds as a table").click()
    rows = page.locator("#rounds tbody tr").all_inner_texts()
    assert [row.split() for row in rows] == [
        ["2", "(open)", "1.000", "1"],
        ["1", "0.600", "3"],
        ["0", "0.300", "3"],
    ]


def expect_all_rewards(tab: Tab) -> None:
    """Wait until the page shows every reward of `two_rounds`; it may be read in between them.

    The contract's sums, such as 2.50, may be known before the log has the last reward, 1.00.
    """
    tab.expect_count(ROWS, 3)
    expect(tab.page.locator(ROWS).first).to_contain_text("2.50")
    expect(tab.page.locator(f"{ROWS} .last-rewards").first).to_contain_text("1.00")


def test_page_of_a_peer_has_its_history(chain: Chain, dashboard: Dashboard, tab: Tab) -> None:
    account = two_rounds(chain)
    page = tab.page
    page.set_viewport_size(DESKTOP)
    page.goto(dashboard.url)
    expect_all_rewards(tab)
    page.get_by_role("link", name=animal_name("QmThird")).click()
    expect(page.locator("h1")).to_have_text(animal_name("QmThird"))
    facts = tab.text("#facts")
    for text in ("QmThird", account, "2.50", "1.00 in round 2", "in round 1"):
        assert text in facts
    rows = page.locator("#transactions tbody tr").all_inner_texts()
    kinds = [row.split("\t")[2] for row in rows]
    assert kinds == ["reward", "vote", "reward", "vote", "reward", "registration"]
    assert all("UTC" in row for row in rows)
    expect(page.locator(".chart canvas")).to_be_visible()
    page.goto(f"{dashboard.url}/peer?id=QmNobody")
    expect(page.locator("h1")).to_have_text("Unknown peer")


def test_pages_of_a_swarm_without_rewards_say_so(chain: Chain, dashboard: Dashboard) -> None:
    chain.new_account("QmSilent")
    dashboard.says(lambda said: said["num_peers"] == 1)
    for path in ("/", "/peers", "/peer?id=QmSilent", "/chain", "/events", "/owner"):
        answer = requests.get(dashboard.url + path, timeout=10)
        assert answer.status_code == 200, path
        if path == "/":
            assert "no reward yet" in answer.text
        elif path.startswith("/peer"):
            assert animal_name("QmSilent") in answer.text


@pytest.mark.timeout(300)
def test_all_pages_fit_three_widths_without_barriers(
    chain: Chain, tmp_path: Path, tab: Tab, targets: Path
) -> None:
    two_rounds(chain)
    of = with_dashboard(
        chain.settings, tmp_path / "dashboard", show_fleet=True, targets_file=targets
    )
    page = tab.page
    with showing(of) as dashboard:
        dashboard.says(lambda said: len(said["rounds"]) == 3)
        for path in ("/", "/peers", "/peer?id=QmThird", "/fleet", "/chain", "/events", "/owner"):
            page.goto(dashboard.url + path)
            for width, scheme in WIDTHS:
                page.set_viewport_size({"width": width, "height": 900})
                page.emulate_media(color_scheme=scheme)
                tab.expect_no_scrolling_sideways(width)
                if width != 800:
                    assert barriers(page) == [], (path, width, scheme)


def test_page_is_complete_without_javascript(chain: Chain, dashboard: Dashboard, tab: Tab) -> None:
    two_rounds(chain)
    dashboard.says(lambda said: len(said["rounds"]) == 3 and said["rounds"][2]["num_peers"])
    browser = tab.page.context.browser
    assert browser is not None
    page = browser.new_context(java_script_enabled=False).new_page()
    page.goto(dashboard.url)
    assert page.locator(ROWS).count() == 3
    assert "1.000" in str(page.locator("#rounds").text_content())
    page.get_by_role("link", name="Peers", exact=True).click()
    page.get_by_role("searchbox").fill(animal_name("QmFirst"))
    page.get_by_role("button", name="Find").press("Enter")
    expect(page.locator(ROWS)).to_have_count(1)
    assert "find=" in page.url


def test_untrusted_text_never_becomes_markup(chain: Chain, dashboard: Dashboard, tab: Tab) -> None:
    account = chain.new_account(HOSTILE, "\u202egnihton")
    chain.send(account, chain.coordinator.submit_reward(0, 0, 10**30, HOSTILE))
    chain.send(chain.owner, chain.coordinator.add_bootnodes([HOSTILE, "x" * 10_000]))
    page = tab.page
    page.set_viewport_size(DESKTOP)
    page.goto(dashboard.url)
    tab.expect_count(ROWS, 2)
    tab.expect_count("#bootnodes li", 2)
    page.locator("footer summary").click()
    assert page.locator("#main img, #main script").count() == 0
    assert page.title() == "Swarm · hivewright"
    expect(page.locator("#peers .peer").first).to_have_attribute("title", HOSTILE)
    assert HOSTILE in tab.text("#bootnodes")
    assert "\\u202egni" in tab.text("#peers")
    tab.expect_no_scrolling_sideways(DESKTOP["width"])
    page.get_by_role("link", name=animal_name(HOSTILE)).click()
    expect(page.locator("h1")).to_have_text(animal_name(HOSTILE))
    assert HOSTILE in tab.text("#facts")
    page.goto(f"{dashboard.url}/peers?find={HOSTILE}")
    expect(page.get_by_role("searchbox")).to_have_value(HOSTILE)
    assert page.title() == "Peers · hivewright"


def test_chain_that_goes_away_leaves_what_is_known_and_a_line_that_says_so(
    place: Settings, tmp_path: Path, tab: Tab
) -> None:
    with anvil.running(place.anvil, place.chain.id) as (_, url):
        # Later it is at the same place.
        port = int(url.rpartition(":")[2])
        section = place.anvil.model_copy(update={"port": port})
        before = deployed(place.model_copy(update={"anvil": section}), url)
        two_rounds(before)
    there = before.settings
    alert = tab.page.locator("#alert")
    with showing(with_dashboard(there, tmp_path / "dashboard")) as shown:
        tab.page.goto(shown.url)
        expect(alert).to_be_visible()
        # Nothing was ever known: an empty table would look like a swarm without peers.
        assert (
            tab.text("#waiting")
            == "Nothing is known yet: the chain has not answered since the dashboard was started."
        )
        assert tab.text("#swarm") == ""
        with anvil.running(there.anvil, there.chain.id):
            tab.expect_count(ROWS, 3)
            expect(alert).to_have_count(0)
        expect(alert).to_be_visible()
        expect_last_known(tab, url)
    expect(tab.page.locator("#lost")).to_contain_text("Dashboard unreachable since ")
    assert tab.page.locator(ROWS).count() == 3
    # A dashboard that starts without a chain shows its history.
    with showing(with_dashboard(there, tmp_path / "dashboard")) as shown:
        tab.page.goto(shown.url)
        expect_last_known(tab, url)


def expect_last_known(tab: Tab, url: str) -> None:
    expect(tab.page.locator("#alert")).to_contain_text("Chain unreachable since ")
    said = tab.text("#alert")
    assert url in said
    assert said.endswith("What is below was known before that.")
    assert tab.text("#fresh").startswith("as of ")
    assert tab.text("#round-note") == "when last heard"
    assert tab.text("#round") == "2"
    assert tab.page.locator(ROWS).count() == 3


def test_many_peers_are_found_by_name(chain: Chain, dashboard: Dashboard, tab: Tab) -> None:
    chain.new_account(*(f"QmPeer{number:03}" for number in range(110)))
    dashboard.says(lambda said: said["num_peers"] == 110, seconds=60)
    page = tab.page
    page.goto(f"{dashboard.url}/peers")
    assert page.locator(ROWS).count() == 50
    assert "page 1 of 3" in tab.text(".paging")
    page.get_by_role("link", name="Next").click()
    page.get_by_role("link", name="Next").click()
    tab.expect_count(ROWS, 10)
    wanted = animal_name("QmPeer105")
    page.get_by_role("searchbox").fill(wanted)
    page.get_by_role("searchbox").press("Enter")
    tab.expect_count(ROWS, 1)
    assert "QmPeer105" in tab.text("#peers")
    page.get_by_role("searchbox").fill("nobody at all")
    page.get_by_role("button", name="Find").click()
    expect(page.locator("#nobody")).to_have_text("No peer has this in its name, id or account.")


def test_totals_with_unaudited_rewards_are_marked(chain: Chain, tmp_path: Path, tab: Tab) -> None:
    two_rounds(chain)
    file = tmp_path / "audit.json"
    sums = {
        "QmFirst": {"audited": 500, "unaudited": 0, "contradicted": 0},
        "QmThird": {"audited": 400, "unaudited": 2100, "contradicted": 0},
    }
    file.write_text(report_of(chain, sums))
    with showing(with_dashboard(chain.settings, tmp_path, audit_file=file)) as dashboard:
        tab.page.goto(dashboard.url)
        tab.expect_count(ROWS, 3)
        expect(tab.page.locator(f"{ROWS} .audit").last).to_have_text("1 audited")
        totals = cells(tab.page, ".total")
        assert [cell.inner_text() for cell in totals] == ["2.50*", "0.70*", "0.50"]
        is_marked = ["unaudited" in str(cell.get_attribute("class")).split() for cell in totals]
        assert is_marked == [True, True, False]
        assert [cell.get_attribute("title") or "" for cell in totals] == [
            *["with rewards that no audit has recomputed"] * 2,
            "",
        ]
        told = [cell.inner_text() for cell in cells(tab.page, ".audit")]
        assert told == ["1 audited 1 unaudited", "unaudited", "1 audited"]


def cells(page: Page, selector: str) -> list[Locator]:
    """Return the cells of that class, one of each row."""
    return page.locator(f"{ROWS} {selector}").all()


def test_peers_are_sorted_by_any_column(chain: Chain, dashboard: Dashboard, tab: Tab) -> None:
    two_rounds(chain)
    page = tab.page
    page.set_viewport_size(DESKTOP)
    page.goto(f"{dashboard.url}/peers")
    expect_all_rewards(tab)

    def expect_order(*expected: str) -> None:
        for place, peer_id in enumerate(expected):
            expect(page.locator("#peers .peer").nth(place)).to_have_attribute("title", peer_id)

    expect_order("QmThird", "QmSecond", "QmFirst")
    page.get_by_role("link", name="Total reward").press("Enter")
    expect_order("QmFirst", "QmSecond", "QmThird")
    page.get_by_role("link", name="Last round").click()
    expect_order("QmThird")
    header = page.locator("th.last-round")
    expect(header).to_have_attribute("aria-sort", "descending")
    page.get_by_role("link", name="Last round").click()
    expect(header).to_have_attribute("aria-sort", "ascending")
    expect(page.locator("#peers .peer").last).to_have_attribute("title", "QmThird")


def test_report_has_no_barriers(tab: Tab, tmp_path: Path) -> None:
    page = tab.page
    node_with_history(tmp_path)
    file = tmp_path / "report.html"
    training_report.write(file, "hivewright: gpu-1", [tmp_path], Settings())
    for width in (400, 768, 1280):
        page.set_viewport_size({"width": width, "height": 900})
        page.goto(file.as_uri())
        tab.expect_no_scrolling_sideways(width)
        assert barriers(page) == []
    page.screenshot(path=tmp_path / "report.png", full_page=True)
