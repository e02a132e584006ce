"""The page in a real browser, of a real chain."""

import json
from pathlib import Path

import pytest

from tests.chain.conftest import Chain
from tests.pages.browser import Page
from tests.pages.dashboards import Dashboard, showing, with_dashboard
from tests.pages.test_dashboard import deployed, report_of, two_rounds
from worker.chain.embedded import anvil
from worker.settings import Settings
from worker.swarm.identity import animal_name

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(180)]

HOSTILE = "<img/src=x onerror='document.title=1'><script>document.title=1</script>"


def test_page_shows_rounds_peers_and_rewards(
    chain: Chain, dashboard: Dashboard, page: Page
) -> None:
    account = two_rounds(chain)
    page.resize(1200, 900)
    page.open(dashboard.url)
    page.wait_for(
        "document.querySelectorAll('#peers tr').length === 3 &&"
        " document.querySelectorAll('.bar').length === 3"
    )
    page.wait_for("document.querySelector('#peers .total').innerText === '2.50'")
    assert page.text("#round") == "2"
    assert page.text("#reporting") == "3"
    assert page.text("#reporting-note") == "in round 1, 3 peers known"
    assert page.text("#mean") == "0.60"
    assert page.text("#mean-note") == "+0.30 on the round before"
    assert page.run("document.getElementById('contract').title") == chain.deployment.contract
    assert page.text("#fresh").startswith("live, read ")
    first = page.text("#peers tr")
    assert animal_name("QmThird") in first
    assert "QmThird" in first
    assert f"{account[:6]}…{account[-4:]}" in first
    assert page.text(".audit") == ""
    # The line is what is over, and the open round has a place of its own.
    assert page.run("document.querySelectorAll('.dot').length") == 3
    assert page.run("document.querySelectorAll('.dot.open').length") == 1
    page.point("#curve svg")
    assert page.text("#tip") == "round 1\nmean 0.600\n3 peers"
    # On a phone nothing stands out at the side.
    page.resize(400, 800)
    page.wait_for("document.documentElement.scrollWidth <= 400")
    assert page.text("#peers .account") == ""
    assert page.complaints() == []


def test_untrusted_text_never_becomes_markup(
    chain: Chain, dashboard: Dashboard, page: Page
) -> None:
    account = chain.new_account(HOSTILE, "\u202egnihton")
    chain.send(account, chain.coordinator.submit_reward(0, 0, 10**30, HOSTILE))
    chain.send(chain.owner, chain.coordinator.add_bootnodes([HOSTILE, "x" * 10_000]))
    page.open(dashboard.url)
    page.wait_for(
        "document.querySelectorAll('#peers tr').length === 2 &&"
        " document.querySelectorAll('.bar').length === 1"
    )
    page.wait_for("document.querySelectorAll('#bootnodes li').length === 2")
    page.run("document.querySelector('details').open = true")
    assert page.run("document.querySelectorAll('#swarm img, #swarm script').length") == 0
    assert page.run("document.title") == "hivewright"
    assert page.run("document.querySelector('#peers .peer').title") == HOSTILE
    assert HOSTILE in page.text("#bootnodes")
    assert "\\u202egni" in page.text("#peers")
    page.resize(1200, 900)
    page.wait_for("document.documentElement.scrollWidth <= 1200")
    assert page.complaints() == []


def test_chain_that_goes_away_leaves_what_is_known_and_a_line_that_says_so(
    place: Settings, tmp_path: Path, page: Page
) -> None:
    with anvil.running(place.anvil, place.chain.id) as (_, url):
        # Later it is at the same place.
        port = int(url.rpartition(":")[2])
        before = deployed(
            place.model_copy(update={"anvil": place.anvil.model_copy(update={"port": port})}), url
        )
        two_rounds(before)
    there = before.settings
    with showing(with_dashboard(there, tmp_path / "dashboard")) as shown:
        page.open(shown.url)
        page.wait_for("document.querySelector('#alert').checkVisibility()")
        # Nothing was ever known: no table that looks as if there were nobody.
        assert (
            page.text("#waiting")
            == "Nothing is known yet: the chain has not answered since the dashboard was started."
        )
        assert page.text("#swarm") == ""
        with anvil.running(there.anvil, there.chain.id):
            page.wait_for("document.querySelectorAll('#peers tr').length === 3")
            page.wait_for("!document.querySelector('#alert').checkVisibility()")
            assert page.text("#waiting") == ""
        page.wait_for("document.querySelector('#alert').checkVisibility()")
        said = page.text("#alert")
        assert said.startswith("Chain unreachable since ")
        assert url in said
        assert said.endswith("What is below was known before that.")
        assert page.text("#fresh").startswith("as of ")
        assert page.text("#round-note") == "when last heard"
        assert page.text("#round") == "2"
        assert page.run("document.querySelectorAll('#peers tr').length") == 3
        with anvil.running(there.anvil, there.chain.id):
            page.wait_for("!document.querySelector('#alert').checkVisibility()")
            assert page.text("#fresh").startswith("live, read ")
            before.new_account("QmLate")
            page.wait_for("document.querySelectorAll('#peers tr').length === 4")
    page.wait_for(
        "document.querySelector('#alert').innerText.startsWith('Dashboard unreachable since ')"
    )
    assert page.run("document.querySelectorAll('#peers tr').length") == 4


def test_many_peers_are_found_by_name(chain: Chain, dashboard: Dashboard, page: Page) -> None:
    names = [f"QmPeer{number:03}" for number in range(110)]
    chain.new_account(*names)
    page.open(dashboard.url)
    page.wait_for("document.querySelector('#more').innerText === 'Show all 110'", 60)
    assert page.run("document.querySelectorAll('#peers tr').length") == 100
    page.run("document.querySelector('#more').click()")
    assert page.run("document.querySelectorAll('#peers tr').length") == 110
    wanted = animal_name("QmPeer105")
    page.run(
        f"at('find').value = {json.dumps(wanted)}, at('find').dispatchEvent(new Event('input'))"
    )
    assert wanted in page.text("#peers")
    assert page.run("document.querySelectorAll('#peers tr').length") == names.count("QmPeer105")
    page.run("at('find').value = 'nobody at all', at('find').dispatchEvent(new Event('input'))")
    assert page.text("#nobody") == "No peer that is shown has this in its name, id or account."


def test_totals_with_unaudited_rewards_are_marked(chain: Chain, tmp_path: Path, page: Page) -> None:
    two_rounds(chain)
    file = tmp_path / "audit.json"
    sums = {
        "QmFirst": {"audited": 500, "unaudited": 0, "contradicted": 0},
        "QmThird": {"audited": 400, "unaudited": 2100, "contradicted": 0},
    }
    file.write_text(report_of(chain, sums))
    with showing(with_dashboard(chain.settings, tmp_path, audit_file=file)) as dashboard:
        page.open(dashboard.url)
        page.wait_for("document.querySelectorAll('#peers tr').length === 3")
        cells = (
            "[...document.querySelectorAll('#peers tr')].map(row =>"
            " row.querySelector('{}')).map(cell => {})"
        )
        assert page.run(cells.format(".total", "cell.innerText")) == ["2.50*", "0.70*", "0.50"]
        assert page.run(cells.format(".total", "cell.classList.contains('unaudited')")) == [
            True,
            True,
            False,
        ]
        assert page.run(cells.format(".total", "cell.title")) == [
            *["with rewards that no audit has recomputed"] * 2,
            "",
        ]
        told = page.run(cells.format(".audit", "cell.innerText"))
        assert told == ["1 audited1 unaudited", "unaudited", "1 audited"]
