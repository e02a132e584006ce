"""The pages in Debian's chromium, at the widths of a desktop and a phone."""

import time

import pytest
from playwright.sync_api import expect

from tests.account.npm_tools import modules
from tests.account.people import ADA, code_of
from worker.account import invitations, releases

PAGES = ("/", "/transactions", "/settings", "/device", "/host")
DESKTOP, PHONE = (1280, 900), (360, 740)
HOST = "host@example.org"


@pytest.fixture
def url(service):
    """Return the address by its name: passkeys are bound to names."""
    return service.url.replace("127.0.0.1", "localhost")


def sign_in(service, url, tab, email: str) -> None:
    tab.page.goto(url + "/sign-in")
    tab.page.get_by_label("E-mail address").fill(email)
    tab.page.get_by_role("button", name="Continue with e-mail").click()
    tab.page.get_by_label("Code").fill(code_of(service, email))
    tab.page.get_by_role("button", name="Sign in").click()
    expect(tab.page.get_by_role("heading", name="My nodes")).to_be_visible()


def require_accessible(tab) -> None:
    """Fail with what axe finds in the page."""
    tab.page.evaluate((modules() / "axe-core/axe.min.js").read_text())
    found = tab.page.evaluate("axe.run()")["violations"]
    assert [(each["id"], each["nodes"][0]["html"]) for each in found] == [], tab.page.url


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_page_is_accessible_and_fits(service, url, tab, scheme) -> None:
    tab.page.emulate_media(color_scheme=scheme)
    tab.page.goto(url + "/sign-in")
    require_accessible(tab)
    accounts = service.service.accounts
    accounts.create(ADA, 3)
    accounts.link(accounts.operator, "Qm" + "a" * 44, "a node with a rather long name")
    for peer, holder, taker in (("QmOff1", ADA, HOST), ("QmGone1", HOST, ADA)):
        ends = [
            accounts.operator if email == HOST else accounts.by_email(email)
            for email in (holder, taker)
        ]
        accounts.link(ends[0], peer, f"a node of {holder}")
        releases.keep(accounts, peer, *ends, None)
    accounts.note_sent(accounts.operator, "Qm" + "a" * 44, "submitReward", "0x" + "ab" * 32, 3)
    sign_in(service, url, tab, HOST)
    for size in (DESKTOP, PHONE):
        tab.page.set_viewport_size({"width": size[0], "height": size[1]})
        for path in PAGES:
            tab.page.goto(url + path)
            require_accessible(tab)
            tab.page.evaluate(
                "document.querySelectorAll('details').forEach((each) => { each.open = true; })"
            )
            require_accessible(tab)
            tab.expect_no_scrolling_sideways(size[0])


def test_keyboard_alone_signs_in(service, url, tab) -> None:
    tab.page.goto(url + "/")
    expect(tab.page.get_by_role("heading", name="Sign in")).to_be_visible()
    tab.page.get_by_label("E-mail address").focus()
    tab.page.keyboard.type(ADA)
    tab.page.keyboard.press("Enter")
    expect(tab.page.get_by_label("Code")).to_be_visible()
    tab.page.get_by_label("Code").focus()
    tab.page.keyboard.type(code_of(service, ADA))
    tab.page.keyboard.press("Enter")
    expect(tab.page.get_by_role("heading", name="My nodes")).to_be_visible()


def test_link_of_an_invitation_fills_it_in(service, url, tab) -> None:
    secret = invitations.create(service.service.accounts.database, 2, time.time() + 60)
    tab.page.goto(f"{url}/sign-in#invitation={secret}")
    expect(tab.page.get_by_label("Invitation")).to_have_value(secret)
    assert secret not in tab.page.url
    tab.page.get_by_label("E-mail address").fill(ADA)
    tab.page.get_by_role("button", name="Continue with e-mail").click()
    tab.page.get_by_label("Code").fill(code_of(service, ADA))
    tab.page.get_by_role("button", name="Sign in").click()
    expect(tab.page.get_by_text("0 of 2 nodes, round 0")).to_be_visible()


def test_passkey_signs_in_to_the_same_account(service, url, tab) -> None:
    session = tab.page.context.new_cdp_session(tab.page)
    session.send("WebAuthn.enable")
    options = {
        "protocol": "ctap2",
        "transport": "internal",
        "hasResidentKey": True,
        "hasUserVerification": True,
        "isUserVerified": True,
        "automaticPresenceSimulation": True,
    }
    session.send("WebAuthn.addVirtualAuthenticator", {"options": options})
    sign_in(service, url, tab, ADA)
    tab.page.goto(url + "/settings")
    tab.page.get_by_role("button", name="Add a passkey").click()
    expect(tab.page.get_by_text("Passkey added")).to_be_visible()
    tab.page.get_by_role("button", name="Sign out", exact=True).click()
    tab.page.get_by_role("button", name="Continue with a passkey").click()
    expect(tab.page.get_by_role("heading", name="My nodes")).to_be_visible()
    expect(tab.page.get_by_text(service.service.accounts.by_email(ADA).address)).to_be_visible()
    # A passkey that was removed lets nobody in.
    tab.page.goto(url + "/settings")
    tab.page.get_by_role("button", name="Remove").click()
    tab.page.get_by_role("button", name="Sign out", exact=True).click()
    tab.page.get_by_role("button", name="Continue with a passkey").click()
    expect(tab.page.get_by_text("belongs to no account here")).to_be_visible()


def test_sign_in_page_is_small(service, url, tab) -> None:
    sizes = {}
    tab.page.on("response", lambda answer: sizes.update({answer.url: len(answer.body())}))
    tab.page.goto(url + "/sign-in", wait_until="networkidle")
    assert {place.removeprefix(url) for place in sizes} == {
        "/sign-in",
        "/base.css",
        "/page.css",
        "/page.js",
        "/icon.svg",
    }
    assert sum(sizes.values()) < 50_000
