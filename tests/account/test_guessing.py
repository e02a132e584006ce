"""Ten thousand guesses of each secret that anybody may send, and the owner meanwhile."""

import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import requests

from tests.account.people import ADA, code_of
from tests.account.visitor import Visitor
from worker.account import device_flow

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
