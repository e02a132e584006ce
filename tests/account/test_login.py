import argparse
import base64
import re
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import requests
from account_service import some_identity

from tests.account.people import ADA, BOB, code_of, signed_in
from tests.account.visitor import Visitor, texts
from worker import settings
from worker.account import device_flow
from worker.chain.account_client import AccountClient
from worker.chain.device_login import DeviceLogin
from worker.chain.enrolment_proof import Challenge, message, purpose_of_login
from worker.commands import login
from worker.errors import IdentityError, ResourceError


@pytest.fixture(autouse=True)
def _quick(monkeypatch) -> None:
    monkeypatch.setattr(device_flow, "_POLL_SECONDS", 1)


@pytest.fixture
def node(tmp_path_factory):
    return some_identity(tmp_path_factory.getbasetemp())


@pytest.fixture
def ada(service):
    visitor = signed_in(service)
    visitor.account = service.service.accounts.by_email(ADA)
    return visitor


def begun(service, node, name: str = "", move: bool = False):
    return DeviceLogin(service.url, service.node_chain()).begin(
        node, name, move, challenge_of(service)
    )


def challenge_of(service) -> Challenge | None:
    return AccountClient(service.node_chain(), Path("/nowhere")).challenge()


def ask(service, device_code: str) -> tuple[int, dict]:
    body = {"grant_type": device_flow.DEVICE_GRANT, "device_code": device_code}
    answer = requests.post(service.url + "/oauth/token", data=body, timeout=20)
    return answer.status_code, answer.json()


def test_node_without_a_browser_signs_in_and_is_enrolled(
    chain, service, ada, tmp_path, capsys
) -> None:
    raw = {"node": {"state_dir": str(tmp_path / "node"), "name": "gpu-0"}}
    parsed = settings.parse(raw, "test")
    options = argparse.Namespace(url=service.url, move=False)
    thread = threading.Thread(target=login.run, args=(parsed, options), daemon=True)
    thread.start()
    said = ""
    while "waiting" not in said:
        thread.join(0.2)
        said += capsys.readouterr().out
    code = re.search(r"\b[A-Z]{4}-[A-Z]{4}\b", said)[0]
    assert f"{service.url}/device" in said
    page = texts(ada.submit("/device", on="/device", code=code.lower().replace("-", " ")))
    assert "gpu-0" in page
    assert ada.account.address in page
    done = ada.submit("/device/allow", on="/device", code=code, answer="allow")
    assert "Allowed" in texts(done)
    thread.join(60)
    assert not thread.is_alive()
    (node,) = service.service.accounts.nodes_of(ada.account)
    assert chain.peers_of(ada.account.address) == [node.peer_id]
    assert "enrolled" in capsys.readouterr().out


def test_answers_are_those_of_the_standard(service, node, ada) -> None:
    """RFC 8628: pending, too often, refused, over."""
    waiting = begun(service, node)
    assert ask(service, waiting.device_code)[1]["error"] == "authorization_pending"
    assert ask(service, "unknown")[1]["error"] == "expired_token"
    wrong = requests.post(service.url + "/oauth/token", data={"grant_type": "x"}, timeout=20)
    assert wrong.json()["error"] == "unsupported_grant_type"
    ada.submit("/device/allow", on="/device", code=waiting.user_code, answer="deny")
    assert ask(service, waiting.device_code)[1]["error"] == "access_denied"


def test_asking_too_often_is_slowed_down(service, node, monkeypatch) -> None:
    monkeypatch.setattr(device_flow, "_POLL_SECONDS", 60)
    waiting = begun(service, node)
    assert ask(service, waiting.device_code)[1]["error"] == "authorization_pending"
    assert ask(service, waiting.device_code)[1]["error"] == "slow_down"


def test_question_that_comes_too_early_writes_nothing(service, node, monkeypatch) -> None:
    monkeypatch.setattr(device_flow, "_POLL_SECONDS", 60)
    waiting = begun(service, node)
    ask(service, waiting.device_code)
    database = service.service.accounts.database
    before = database.execute("SELECT asked_at FROM devices")
    assert ask(service, waiting.device_code)[1]["error"] == "slow_down"
    assert database.execute("SELECT asked_at FROM devices") == before


def test_wrong_codes_of_one_address_are_limited_and_right_ones_are_not(service, node) -> None:
    waiting = begun(service, node)
    answers = [ask(service, f"wrong {number}") for number in range(22)]
    assert [status for status, _ in answers] == [400] * 20 + [429] * 2
    assert answers[-1][1]["error"] == "slow_down"
    assert ask(service, waiting.device_code)[1]["error"] == "authorization_pending"


def test_node_that_asks_again_has_one_code(service, node, monkeypatch) -> None:
    """So one key can't use up the room for others."""
    monkeypatch.setattr(device_flow, "_MOST_OPEN", 1)
    first, second = begun(service, node), begun(service, node)
    assert ask(service, first.device_code)[1]["error"] == "expired_token"
    assert ask(service, second.device_code)[1]["error"] == "authorization_pending"


def test_token_is_given_once(service, node, ada) -> None:
    waiting = begun(service, node)
    ada.submit("/device/allow", on="/device", code=waiting.user_code, answer="allow")
    status, answer = ask(service, waiting.device_code)
    assert status == 200
    assert service.service.accounts.caller(answer["access_token"])[0] == node.peer_id
    assert ask(service, waiting.device_code)[1]["error"] == "expired_token"


def test_link_of_the_terminal_leads_to_its_code_by_way_of_the_sign_in(service, node) -> None:
    """The sign-in page sends on what the link had; the last page is filled in."""
    waiting = begun(service, node)
    visitor = Visitor(service.url)
    page = visitor.get(f"/device?code={waiting.user_code}").text
    kept = dict(re.findall(r'name="(next|code)" value="([^"]*)"', page))
    assert kept == {"next": "device", "code": waiting.user_code}
    visitor.begin(BOB, **kept)
    answer = visitor.answer(code_of(service, BOB))
    assert f'value="{waiting.user_code}"' in answer.text


def test_code_is_kept_until_the_node_is_linked(service, node, ada, monkeypatch) -> None:
    """An end of the process, or a full disk, between the two costs nobody another sign-in."""

    def fail(*_: object) -> None:
        raise ResourceError("no room")

    waiting = begun(service, node)
    ada.submit("/device/allow", on="/device", code=waiting.user_code, answer="allow")
    monkeypatch.setattr(device_flow, "_POLL_SECONDS", 0)
    with monkeypatch.context() as failing:
        failing.setattr(service.service.accounts, "link_in", fail)
        assert ask(service, waiting.device_code)[0] == 500
    assert ask(service, waiting.device_code)[0] == 200


def test_node_proves_its_key(service, node) -> None:
    def ask_with(purpose: str, challenge: Challenge) -> tuple[int, str]:
        signature = node.sign(message(node.peer_id, purpose, challenge))
        form = {
            "peer_id": node.peer_id,
            "public_key": base64.b64encode(node.public_key).decode(),
            "signature": base64.b64encode(signature).decode(),
            "challenge": challenge.text,
        }
        answer = requests.post(service.url + "/oauth/device_authorization", data=form, timeout=20)
        return answer.status_code, answer.json().get("error_description", "")

    given, purpose = challenge_of(service), purpose_of_login(False)
    refused = (403, f"not signed by the key of {node.peer_id}")
    assert ask_with(purpose_of_login(True), given) == refused
    assert ask_with(purpose, replace(given, contract="0x" + "11" * 20)) == refused
    assert ask_with(purpose, given)[0] == 200
    status, said = ask_with(purpose, given)
    assert (status, "used before" in said) == (403, True)
    form = {"peer_id": "not one"}
    empty = requests.post(service.url + "/oauth/device_authorization", data=form, timeout=20)
    assert empty.json()["error"] == "invalid_request"


def test_refusal_ends_the_command(service, node, ada) -> None:
    device = DeviceLogin(service.url, service.node_chain())
    waiting = device.begin(node, "", False, challenge_of(service))
    ada.submit("/device/allow", on="/device", code=waiting.user_code, answer="deny")
    with pytest.raises(IdentityError, match="the person refused"):
        device.wait(waiting)


def test_guesses_of_a_terminals_code_are_limited(service, node, ada) -> None:
    waiting = begun(service, node)
    csrf = ada.csrf("/device")
    statuses = {ada.post("/device", csrf=csrf, code="BBBB-BBBB").status_code for _ in range(15)}
    assert statuses == {400, 429}
    assert ask(service, waiting.device_code)[1]["error"] == "authorization_pending"


def test_node_of_another_account_is_not_linked(service, node, ada) -> None:
    accounts = service.service.accounts
    bob = accounts.create(BOB, 3)
    accounts.link(bob, node.peer_id)
    waiting = begun(service, node)
    page = texts(ada.submit("/device", on="/device", code=waiting.user_code))
    assert bob.address in page
    assert ada.account.address in page
    assert "unlink it" in page
    answer = ada.submit("/device/allow", on="/device", code=waiting.user_code, answer="allow")
    assert answer.status_code == 409
    accounts.unlink(bob, node.peer_id)
    ada.submit("/device/allow", on="/device", code=waiting.user_code, answer="allow")
    assert ask(service, waiting.device_code)[0] == 200


def test_node_that_another_account_registered_on_the_chain_is_refused(
    chain, service, node, ada
) -> None:
    holder = chain.new_account(node.peer_id)
    waiting = begun(service, node)
    page = texts(ada.submit("/device", on="/device", code=waiting.user_code))
    assert holder.address in page
    moving = begun(service, node, move=True)
    page = texts(ada.submit("/device", on="/device", code=moving.user_code))
    assert "It brings what it earned" in page
    assert holder.address not in page
