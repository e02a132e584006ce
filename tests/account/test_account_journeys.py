"""People at the pages, from the first step to the last, in Debian's chromium: one service for all.

The provider, the mail server and the chain are real, on loopback.
"""

import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import requests
from account_service import Running, serving, some_identity
from aiosmtpd.controller import Controller
from playwright.sync_api import Browser, Page, expect

from tests.account.hosting import HOST, hosted
from tests.account.npm_tools import openid_provider
from tests.account.test_account_browser import PHONE, require_accessible
from tests.account.test_sign_in import Mailbox
from tests.chain.conftest import deployed
from tests.pages.browser import Tab
from worker.chain.account_client import DEVICE_GRANT, AccountClient
from worker.chain.device_login import Begun, DeviceLogin

MOST_TABS = 40
"""Presses of the tab key until a control must have the focus."""


@dataclass
class Place:
    """A service, and the mailbox of everybody."""

    running: Running
    mailbox: Mailbox

    @property
    def url(self) -> str:
        return self.running.url


@pytest.fixture(scope="module")
def place(rpc_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("journeys")
    ports = []
    for _ in range(2):
        with socket.create_server(("127.0.0.1", 0)) as free:
            ports.append(free.getsockname()[1])
    own, secret = f"http://localhost:{ports[0]}", folder / "client.secret"
    secret.write_text("provider's-secret\n")
    mailbox = Mailbox()
    mails = Controller(mailbox, hostname="127.0.0.1", port=ports[1])
    mails.start()
    with openid_provider(f"{own}/sign-in/openid/callback") as issuer:
        parsed = hosted(
            deployed(rpc_url, folder).settings,
            folder / "account",
            public_url=own,
            oidc_issuer=issuer,
            oidc_name="Test Provider",
            oidc_client_id="hivewright",
            oidc_client_secret_file=str(secret),
            smtp_host="127.0.0.1",
            smtp_port=ports[1],
            smtp_security="none",
        )
        with serving(parsed, ports[0]) as running:
            running.url = own
            yield Place(running, mailbox)
    mails.stop()


@pytest.fixture
def phone(tab: Tab) -> Tab:
    tab.page.set_viewport_size({"width": PHONE[0], "height": PHONE[1]})
    return tab


def require_fits(phone: Tab) -> None:
    """Fail if axe finds something in the page, or if it is wider than a phone."""
    require_accessible(phone)
    phone.expect_no_scrolling_sideways(PHONE[0])


def sign_in(place: Place, page: Page, email: str) -> None:
    """Sign in by e-mail, from the sign-in page on."""
    page.get_by_label("E-mail address").fill(email)
    page.get_by_role("button", name="Continue with e-mail").click()
    expect(page.get_by_text(email)).to_be_visible()
    page.get_by_label("Code").fill(place.mailbox.code())
    page.get_by_role("button", name="Sign in").click()


def test_person_signs_in_by_a_provider_and_by_mail_to_one_account(place: Place, phone: Tab) -> None:
    page, email = phone.page, "ada@example.org"
    page.goto(f"{place.url}/sign-in")
    page.get_by_text("Continue with Test Provider").click()
    page.locator("input[name=login]").fill(email)
    page.locator("input[name=password]").fill("x")
    page.locator("button[type=submit]").click()
    page.get_by_role("button", name="Continue").click()
    expect(page.get_by_role("heading", name="My nodes")).to_be_visible()
    account = place.running.service.accounts.by_email(email)
    assert account is not None
    page.goto(f"{place.url}/settings")
    page.get_by_role("button", name="Sign out", exact=True).click()
    page.get_by_label("E-mail address").fill(email)
    page.get_by_role("button", name="Continue with e-mail").click()
    expect(page.get_by_text("was sent to")).to_be_visible()
    require_fits(phone)
    page.get_by_label("Code").fill("00000000")
    page.get_by_role("button", name="Sign in").click()
    expect(page.get_by_text("That is not the code.")).to_be_visible()
    require_fits(phone)
    page.get_by_label("Code").fill(place.mailbox.code())
    page.get_by_role("button", name="Sign in").click()
    expect(page.get_by_text(account.address)).to_be_visible()


def begun(place: Place, folder: Path) -> Begun:
    """Begin the sign-in of a node, as `hivewright login` does."""
    chain = place.running.node_chain()
    challenge = AccountClient(chain, folder).challenge()
    return DeviceLogin(place.url, chain).begin(some_identity(folder), "gpu-0", False, challenge)


def test_link_of_a_terminal_leads_through_the_sign_in_to_the_node(
    place: Place, phone: Tab, tmp_path_factory: pytest.TempPathFactory
) -> None:
    page, email = phone.page, "bob@example.org"
    waiting = begun(place, tmp_path_factory.getbasetemp())
    page.goto(waiting.page_with_code)
    sign_in(place, page, email)
    expect(page.get_by_label("Code")).to_have_value(waiting.user_code)
    page.get_by_role("button", name="Continue").click()
    expect(page.get_by_text("gpu-0")).to_be_visible()
    require_fits(phone)
    page.get_by_role("button", name="Allow").click()
    expect(page.get_by_role("heading", name="Allowed")).to_be_visible()
    require_fits(phone)
    body = {"grant_type": DEVICE_GRANT, "device_code": waiting.device_code}
    answer = requests.post(f"{place.url}/oauth/token", data=body, timeout=20).json()
    account = place.running.service.accounts.by_email(email)
    assert place.running.service.accounts.caller(answer["access_token"])[1] == account
    page.get_by_role("link", name="My nodes").last.click()
    expect(page.get_by_text("1 of 10 nodes")).to_be_visible()


def test_pages_of_an_invitation_an_error_and_an_old_sign_in(place: Place, phone: Tab) -> None:
    page = phone.page
    page.goto(f"{place.url}/sign-in")
    sign_in(place, page, HOST)
    for path in ("/", "/host"):
        page.goto(place.url + path)
        page.get_by_role("button", name="Create an invitation").click()
        expect(page.locator("#new-invitation")).to_be_visible()
        require_fits(phone)
        page.get_by_role("button", name="Withdraw").click()
        expect(page.get_by_role("button", name="Withdraw")).to_have_count(0)
    page.goto(f"{place.url}/device")
    page.get_by_label("Code").fill("BBBB-BBBB")
    page.get_by_role("button", name="Continue").click()
    expect(page.get_by_role("alert")).to_contain_text("no node waits with this code")
    require_fits(phone)
    place.running.service.accounts.database.execute("UPDATE sessions SET fresh_at = 0")
    page.goto(f"{place.url}/settings")
    expect(page.get_by_role("link", name="Sign in again first")).to_be_visible()
    require_fits(phone)


def reach(page: Page, name: str) -> None:
    """Press the tab key until the control with this name has the focus, which must be seen."""
    control = page.get_by_label(name).or_(page.get_by_role("link", name=name, exact=True))
    for _ in range(MOST_TABS):
        page.keyboard.press("Tab")
        if control.first.evaluate("(each) => each === document.activeElement"):
            outline = control.first.evaluate("(each) => getComputedStyle(each).outlineStyle")
            assert outline != "none", name
            return
    raise AssertionError(f"{page.url}: {name} is out of reach of the tab key")


def test_tab_key_alone_reaches_everything(place: Place, tab: Tab) -> None:
    page = tab.page
    page.goto(f"{place.url}/sign-in")
    reach(page, "E-mail address")
    page.keyboard.type("cy@example.org")
    page.keyboard.press("Enter")
    expect(page.get_by_text("was sent to")).to_be_visible()
    reach(page, "Code")
    page.keyboard.type(place.mailbox.code())
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", name="My nodes")).to_be_visible()
    reach(page, "Link a node")
    page.keyboard.press("Enter")
    reach(page, "Code")
    page.keyboard.type("BBBB-BBBB")
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert")).to_contain_text("no node waits with this code")


def test_pages_work_without_javascript(place: Place, chromium: Browser) -> None:
    context = chromium.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(f"{place.url}/sign-in")
    expect(page.get_by_role("button", name="Continue with a passkey")).to_be_hidden()
    sign_in(place, page, "di@example.org")
    for path, heading in (
        ("/", "My nodes"),
        ("/transactions", "Transactions"),
        ("/device", "Link a node"),
        ("/settings", "Export the key"),
    ):
        page.goto(place.url + path)
        expect(page.get_by_role("heading", name=heading)).to_be_visible()
    expect(page.get_by_role("button", name="Add a passkey")).to_be_hidden()
    context.close()
