"""Ten thousand guesses of each secret that anybody may send, and the owner meanwhile."""

import os
import secrets
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import requests
from account_service import ENROLMENT_TOKEN, serving, some_identity

from tests.account.hosting import hosted
from tests.account.people import ADA, code_of, signed_in
from tests.account.visitor import Visitor
from worker.account import device_flow, invitations
from worker.account.sessions import LETTERS, new_host_code
from worker.chain.account_client import DEVICE_GRANT, AccountClient
from worker.chain.device_login import Begun, DeviceLogin

GUESSES = int(os.environ.get("HIVEWRIGHT_GUESSES", "10000"))


@pytest.mark.nightly
@pytest.mark.timeout(1800)
def test_guesses_get_nowhere_and_the_owner_gets_in(service) -> None:
    owner = Visitor(service.url)
    owner.begin(ADA)
    code = code_of(service, ADA)
    thief = Visitor(service.url)
    thief.begin(ADA)
    cookies = "; ".join(f"{name}={value}" for name, value in thief.cookies.items())
    form = {"Origin": service.url, "Cookie": cookies}
    grant = device_flow.DEVICE_GRANT

    def guess(number: int) -> set[int]:
        token = {"Authorization": f"Bearer hwn_{number}"}
        rpc = {"jsonrpc": "2.0", "id": 1, "method": "eth_blockNumber", "params": []}
        device = {"grant_type": grant, "device_code": str(number)}
        answers = (
            requests.post(
                f"{service.url}/sign-in/code",
                data={"code": f"{number:08}"},
                headers=form,
                allow_redirects=False,
                timeout=60,
            ),
            requests.post(f"{service.url}/rpc", json=rpc, headers=token, timeout=60),
            requests.post(f"{service.url}/oauth/token", data=device, timeout=60),
        )
        return {answer.status_code for answer in answers}

    with ThreadPoolExecutor(8) as threads:
        statuses = set().union(*threads.map(guess, range(GUESSES)))
    assert statuses <= {400, 401, 403, 429}
    assert not thief.is_signed_in
    owner.answer(code)
    assert owner.is_signed_in


@pytest.mark.nightly
@pytest.mark.timeout(1800)
def test_guesser_with_a_thousand_addresses_gets_nowhere_and_the_owner_gets_in(
    chain, tmp_path
) -> None:
    """Each of its sign-ins waits for the code that the host gives to the owner."""
    with serving(hosted(chain.settings, tmp_path / "account", behind_proxy=True)) as service:
        owner, started = signed_in(service), time.monotonic()

        def guess(number: int) -> list[int]:
            client = f"198.18.{number // 250}.{number % 250 + 1}"
            thief = Visitor(service.url, **{"X-Forwarded-For": client})
            thief.headers["X-Forwarded-Proto"] = "https"
            thief.begin(ADA)
            code_of(service, ADA, "87654321")
            statuses = [thief.answer(f"{10 * number + i:08}").status_code for i in range(10)]
            assert not thief.is_signed_in
            return statuses

        with ThreadPoolExecutor(8) as threads:
            found = list(threads.map(guess, range(GUESSES // 10)))
        statuses = [status for each in found for status in each]
        minutes = (time.monotonic() - started) / 60
        assert set(statuses) == {403, 429}
        assert statuses.count(403) <= 31 + minutes
        owner.submit("/sign-out")
        owner.begin(ADA)
        owner.answer(code_of(service, ADA))
        assert owner.is_signed_in
        new = Visitor(service.url)
        new.begin(ADA)
        new.answer(code_of(service, ADA, new_host_code()))
        assert new.is_signed_in


@pytest.mark.nightly
@pytest.mark.timeout(1800)
def test_guesses_of_tokens_codes_and_cookies_get_nowhere_and_their_owners_get_in(
    chain, tmp_path, tmp_path_factory
) -> None:
    """From a thousand addresses, and by somebody with an account of their own."""
    ours, thiefs, new = (some_identity(tmp_path_factory.getbasetemp(), i) for i in range(3))
    with serving(hosted(chain.settings, tmp_path / "account", behind_proxy=True)) as service:
        accounts, started = service.service.accounts, time.monotonic()
        owner = signed_in(service)
        mallory = signed_in(service, "mallory@example.org", **{"X-Forwarded-For": "100.64.0.9"})
        secret = invitations.create(accounts.database, 1, time.time() + 86_400)
        assert enrol(service, ours, ENROLMENT_TOKEN, "198.19.0.1") == 200
        begun(service, new)
        csrf = mallory.csrf("/device")

        def guess(number: int) -> tuple[int, ...]:
            client = f"198.18.{number // 250 % 4}.{number % 250 + 1}"
            browser = {"X-Forwarded-For": client, "X-Forwarded-Proto": "https"}
            person = Visitor(service.url, **browser)
            asked = {"email": f"e{number}@example.org", "invitation": f"hwi_{number}"}
            cookie = {"Cookie": f"hivewright_session={secrets.token_urlsafe(32)}"}
            code = "".join(secrets.choice(LETTERS) for _ in range(8))
            return (
                enrol(service, thiefs, f"guess {number}", client),
                enrol(service, thiefs, f"hwi_{number}", client),
                person.post("/sign-in/email", follow=False, **asked).status_code,
                mallory.post("/device", csrf=csrf, code=code).status_code,
                Visitor(service.url, **cookie).get("/", follow=False).status_code,
            )

        with ThreadPoolExecutor(8) as threads:
            found = list(threads.map(guess, range(GUESSES)))
        minutes = (time.monotonic() - started) / 60
        by_token, by_invitation, at_sign_in, by_code, by_cookie = map(
            Counter, zip(*found, strict=True)
        )
        assert set(by_token) | set(by_invitation) | set(at_sign_in) <= {403, 429}
        assert set(by_code) <= {400, 429}
        assert set(by_cookie) == {303}
        assert by_token[403] <= 101 + 2 * minutes
        assert by_code[400] <= 11 + 2 * minutes
        assert accounts.node(thiefs.peer_id) is None
        assert accounts.nodes_of(accounts.by_email("mallory@example.org")) == []

        assert enrol(service, ours, ENROLMENT_TOKEN, "198.19.0.1") == 200
        waiting = begun(service, new)
        owner.submit("/device/allow", on="/device", code=waiting.user_code, answer="allow")
        grant = {"grant_type": DEVICE_GRANT, "device_code": waiting.device_code}
        assert requests.post(f"{service.url}/oauth/token", data=grant, timeout=60).ok
        invited = Visitor(service.url)
        invited.begin("new@example.org", invitation=secret)
        invited.answer(code_of(service, "new@example.org"))
        assert invited.is_signed_in


def enrol(service, node, token: str, client: str) -> int:
    body, headers = service.enrol_body(node, token), {"X-Forwarded-For": client}
    return requests.post(
        f"{service.url}/api/enrol", json=body, headers=headers, timeout=60
    ).status_code


def begun(service, node) -> Begun:
    chain = service.node_chain()
    challenge = AccountClient(chain, Path("/nowhere")).challenge()
    return DeviceLogin(service.url, chain).begin(node, "", False, challenge)
