"""Ten thousand guesses of each secret that anybody may send, and the owner meanwhile."""

import os
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import requests
from account_service import serving

from tests.account.hosting import hosted
from tests.account.people import ADA, code_of, signed_in
from tests.account.visitor import Visitor
from worker.account import device_flow
from worker.account.sessions import new_host_code

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
