"""The dashboard's page in a real browser, showing a real chain."""

from pathlib import Path

import pytest
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
DESKTOP, PHONE = {"width": 1200, "height": 900}, {"width": 400, "height": 800}
ROWS = "#peers tr"


def test_page_shows_rounds_peers_and_rewards(chain: Chain, dashboard: Dashboard, tab: Tab) -> None:
    account = two_rounds(chain)
    page = tab.page
    page.set_viewport_size(DESKTOP)
    page.goto(dashboard.url)
    tab.expect_count(ROWS, 3)
    tab.expect_count(".bar", 3)
    expect(page.locator("#peers .total").first).to_have_text("2.50")
    assert tab.text("#round") == "2"
    assert tab.text("#reporting") == "3"
    assert tab.text("#reporting-note") == "in round 1, 3 peers known"
    assert tab.text("#mean") == "0.60"
    assert tab.text("#mean-note") == "+0.30 on the round before"
    expect(page.locator("#contract")).to_have_attribute("title", chain.deployment.contract)
    assert tab.text("#fresh").startswith("live, read ")
    first = tab.text(ROWS)
    assert animal_name("QmThird") in first
    assert "QmThird" in first
    assert f"{account[:6]}…{account[-4:]}" in first
    assert tab.text(".audit") == ""
    # The line is of finished rounds, and the open round has a separate dot.
    assert page.locator(".dot").count() == 3
    assert page.locator(".dot.open").count() == 1
    page.locator("#curve svg").hover()
    assert tab.text("#tip") == "round 1\nmean 0.600\n3 peers"


def expect_all_rewards(tab: Tab) -> None:
    """Wait until the page shows every reward of `two_rounds`; it may be read in between them."""
    tab.expect_count(ROWS, 3)
    expect(tab.page.locator(ROWS).first).to_contain_text("2.50")


def test_page_fits_a_phone(chain: Chain, dashboard: Dashboard, tab: Tab) -> None:
    two_rounds(chain)
    tab.page.set_viewport_size(PHONE)
    tab.page.goto(dashboard.url)
    expect_all_rewards(tab)
    tab.expect_no_scrolling_sideways(PHONE["width"])
    assert tab.text("#peers .account") == ""
    assert animal_name("QmThird") in tab.text(ROWS)


def test_untrusted_text_never_becomes_markup(chain: Chain, dashboard: Dashboard, tab: Tab) -> None:
    account = chain.new_account(HOSTILE, "\u202egnihton")
    chain.send(account, chain.coordinator.submit_reward(0, 0, 10**30, HOSTILE))
    chain.send(chain.owner, chain.coordinator.add_bootnodes([HOSTILE, "x" * 10_000]))
    page = tab.page
    page.set_viewport_size(DESKTOP)
    page.goto(dashboard.url)
    tab.expect_count(ROWS, 2)
    tab.expect_count(".bar", 1)
    tab.expect_count("#bootnodes li", 2)
    page.locator("details summary").first.click()
    assert page.locator("#swarm img, #swarm script").count() == 0
    assert page.title() == "hivewright"
    expect(page.locator("#peers .peer").first).to_have_attribute("title", HOSTILE)
    assert HOSTILE in tab.text("#bootnodes")
    assert "\\u202egni" in tab.text("#peers")
    tab.expect_no_scrolling_sideways(DESKTOP["width"])


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
            expect(alert).to_be_hidden()
            assert tab.text("#waiting") == ""
        expect(alert).to_be_visible()
        said = tab.text("#alert")
        assert said.startswith("Chain unreachable since ")
        assert url in said
        assert said.endswith("What is below was known before that.")
        assert tab.text("#fresh").startswith("as of ")
        assert tab.text("#round-note") == "when last heard"
        assert tab.text("#round") == "2"
        assert tab.page.locator(ROWS).count() == 3
        with anvil.running(there.anvil, there.chain.id):
            expect(alert).to_be_hidden()
            assert tab.text("#fresh").startswith("live, read ")
            before.new_account("QmLate")
            tab.expect_count(ROWS, 4)
    expect(alert).to_contain_text("Dashboard unreachable since ")
    assert tab.text("#alert").startswith("Dashboard unreachable since ")
    assert tab.page.locator(ROWS).count() == 4


def test_many_peers_are_found_by_name(chain: Chain, dashboard: Dashboard, tab: Tab) -> None:
    names = [f"QmPeer{number:03}" for number in range(110)]
    chain.new_account(*names)
    page = tab.page
    page.goto(dashboard.url)
    more = page.locator("#more")
    expect(more).to_have_text("Show all 110", timeout=60_000)
    assert page.locator(ROWS).count() == 100
    more.click()
    assert page.locator(ROWS).count() == 110
    wanted = animal_name("QmPeer105")
    page.locator("#find").fill(wanted)
    assert wanted in tab.text("#peers")
    assert page.locator(ROWS).count() == names.count("QmPeer105")
    page.locator("#find").fill("nobody at all")
    assert tab.text("#nobody") == "No peer that is shown has this in its name, id or account."


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
        totals = cells(tab.page, ".total")
        assert [cell.inner_text() for cell in totals] == ["2.50*", "0.70*", "0.50"]
        is_marked = ["unaudited" in str(cell.get_attribute("class")).split() for cell in totals]
        assert is_marked == [True, True, False]
        assert [cell.get_attribute("title") or "" for cell in totals] == [
            *["with rewards that no audit has recomputed"] * 2,
            "",
        ]
        told = [cell.inner_text() for cell in cells(tab.page, ".audit")]
        assert told == ["1 audited1 unaudited", "unaudited", "1 audited"]


def cells(page: Page, selector: str) -> list[Locator]:
    """Return the cells of that class, one of each row."""
    return page.locator(f"{ROWS} {selector}").all()


def test_peers_are_sorted_by_any_column(chain: Chain, dashboard: Dashboard, tab: Tab) -> None:
    two_rounds(chain)
    page = tab.page
    page.set_viewport_size(DESKTOP)
    page.goto(dashboard.url)
    expect_all_rewards(tab)

    def order() -> list[str]:
        ids = page.locator("#peers .peer").all()
        return [str(each.get_attribute("title")) for each in ids]

    assert order() == ["QmThird", "QmSecond", "QmFirst"]
    page.get_by_role("button", name="Total reward").press("Enter")
    assert order() == ["QmFirst", "QmSecond", "QmThird"]
    page.get_by_role("button", name="Last round").click()
    assert order()[0] == "QmThird"
    header = page.locator("th:has([data-sort=round])")
    expect(header).to_have_attribute("aria-sort", "descending")
    page.get_by_role("button", name="Last round").click()
    expect(header).to_have_attribute("aria-sort", "ascending")
    assert order()[-1] == "QmThird"


def test_page_and_report_have_no_barriers(
    chain: Chain, dashboard: Dashboard, tab: Tab, tmp_path: Path
) -> None:
    two_rounds(chain)
    page = tab.page
    for viewport in (DESKTOP, PHONE):
        page.set_viewport_size(viewport)
        page.goto(dashboard.url)
        tab.expect_count(ROWS, 3)
        assert barriers(page) == []
    node_with_history(tmp_path)
    file = tmp_path / "report.html"
    training_report.write(file, "hivewright: gpu-1", [tmp_path], Settings())
    for width in (400, 768, 1280):
        page.set_viewport_size({"width": width, "height": 900})
        page.goto(file.as_uri())
        tab.expect_no_scrolling_sideways(width)
        assert barriers(page) == []
    page.screenshot(path=tmp_path / "report.png", full_page=True)
