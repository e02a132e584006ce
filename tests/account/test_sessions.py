"""Sessions and sign-ins in the database: how long they last, and how often one may guess."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.account.stores import Clock
from worker.account import sessions as module
from worker.account.accounts import Account, Accounts
from worker.account.request_bodies import Refused
from worker.account.sessions import MAX_GUESSES, MAX_KNOWN, Sessions, plain

ADA = "ada@example.org"


@pytest.fixture
def clock(accounts: Accounts, monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


@pytest.fixture
def sessions(accounts: Accounts) -> Sessions:
    return Sessions(accounts.database)


@pytest.fixture
def ada(accounts: Accounts) -> Account:
    return accounts.create(ADA, 2)


def test_session_is_found_by_its_cookie_until_it_ends(
    sessions: Sessions, ada: Account, clock: Clock
) -> None:
    cookie = sessions.start(ada.id, ADA)
    found = sessions.find(cookie)
    assert found is not None
    assert (found.account_id, found.email, found.is_fresh) == (ada.id, ADA, True)
    clock.wait(module.FRESH_SECONDS)
    assert not found.is_fresh
    clock.wait(module.SESSION_SECONDS - module.FRESH_SECONDS - 1)
    assert sessions.find(cookie) == found
    clock.wait(1)
    assert sessions.find(cookie) is None


@pytest.mark.parametrize("cookie", ["", "x", "\0", "a" * 10_000, "' OR 1=1 --"])
def test_cookie_that_was_not_given_is_no_session(
    sessions: Sessions, ada: Account, cookie: str
) -> None:
    sessions.start(ada.id, ADA)
    assert sessions.find(cookie) is None


def test_session_ends_for_one_browser_or_for_all(
    sessions: Sessions, accounts: Accounts, ada: Account
) -> None:
    bob = accounts.create("bob@example.org", 2)
    first, second, other = (sessions.start(each.id, ADA) for each in (ada, ada, bob))
    ended = sessions.find(first)
    assert ended is not None
    sessions.end(ended)
    assert sessions.find(first) is None
    known, of_bob = sessions.know(ada.id), sessions.know(bob.id)
    sessions.end_all(ada.id)
    assert sessions.find(second) is None
    assert sessions.known_account(known) is None
    assert sessions.find(other) is not None
    assert sessions.known_account(of_bob) == bob.id


def test_forms_of_two_sessions_have_different_secrets(sessions: Sessions, ada: Account) -> None:
    csrf = {sessions.find(sessions.start(ada.id, ADA)).csrf for _ in range(3)}  # type: ignore[union-attr]
    assert len(csrf) == 3


def test_newest_browsers_of_an_account_are_known_for_a_year(
    sessions: Sessions, ada: Account, clock: Clock
) -> None:
    cookies = []
    for _ in range(MAX_KNOWN + 2):
        clock.wait(1)
        cookies.append(sessions.know(ada.id))
    known = [sessions.known_account(cookie) == ada.id for cookie in cookies]
    assert known == [False] * 2 + [True] * MAX_KNOWN
    clock.wait(module.KNOWN_SECONDS)
    assert sessions.known_account(cookies[-1]) is None


def test_sign_in_keeps_what_its_way_in_stored(sessions: Sessions) -> None:
    cookie = sessions.begin({"next": "device", "n": 1, "é": None}, ADA)
    found = sessions.sign_in(cookie)
    assert (found.email, found.data) == (ADA, {"next": "device", "n": 1, "é": None})


def test_sign_in_is_completed_once(sessions: Sessions) -> None:
    cookie = sessions.begin({})
    found = sessions.sign_in(cookie)
    sessions.complete(found)
    with pytest.raises(Refused, match="this sign-in is over"):
        sessions.complete(found)
    with pytest.raises(Refused, match="this sign-in is over"):
        sessions.sign_in(cookie)
    with pytest.raises(Refused, match="this sign-in is over"):
        sessions.guess(found, "12345678")


def test_sign_in_ends_after_a_quarter_of_an_hour(sessions: Sessions, clock: Clock) -> None:
    cookie = sessions.begin({}, ADA, "12345678")
    clock.wait(module.SIGN_IN_SECONDS - 1)
    sessions.sign_in(cookie)
    clock.wait(1)
    with pytest.raises(Refused) as refused:
        sessions.sign_in(cookie)
    assert (refused.value.status, refused.value.error) == (400, "SignInOver")


def test_code_is_right_however_it_is_typed(sessions: Sessions) -> None:
    for code, typed in (("12345678", "1234 5678"), ("BCDF-GHJK-LMNP", "bcdfghjk lmnp")):
        found = sessions.sign_in(sessions.begin({}, ADA, plain(code)))
        assert sessions.guess(found, typed)
        assert not sessions.guess(found, typed + "0")


@pytest.mark.parametrize("num_wrong", [0, MAX_GUESSES - 1, MAX_GUESSES])
def test_right_code_counts_within_the_first_guesses_only(
    sessions: Sessions, num_wrong: int
) -> None:
    found = sessions.sign_in(sessions.begin({}, ADA, "12345678"))
    for number in range(num_wrong):
        assert not sessions.guess(found, str(number))
    if num_wrong < MAX_GUESSES:
        assert sessions.guess(found, "12345678")
        return
    with pytest.raises(Refused) as refused:
        sessions.guess(found, "12345678")
    assert (refused.value.status, refused.value.error) == (429, "TooManyGuesses")


def test_guesses_in_one_browser_do_not_use_up_those_of_another(sessions: Sessions) -> None:
    owner = sessions.sign_in(sessions.begin({}, ADA, "12345678"))
    thief = sessions.sign_in(sessions.begin({}, ADA, "12345678"))
    for number in range(MAX_GUESSES):
        assert not sessions.guess(thief, str(number))
    assert sessions.guess(owner, "12345678")


def test_sign_in_without_a_code_has_no_right_one(sessions: Sessions) -> None:
    found = sessions.sign_in(sessions.begin({}, ADA))
    for code in ("", "None", "00000000"):
        assert not sessions.guess(found, code)


def test_code_of_the_host_is_for_the_open_sign_ins_of_its_person(
    sessions: Sessions, clock: Clock
) -> None:
    old = sessions.begin({}, ADA)
    clock.wait(module.SIGN_IN_SECONDS)
    ours = [sessions.sign_in(sessions.begin({}, ADA)) for _ in range(2)]
    other = sessions.sign_in(sessions.begin({}, "bob@example.org"))
    for number in range(MAX_GUESSES):
        sessions.guess(ours[0], str(number))
    assert sessions.set_code(ADA, "BCDF-GHJK-LMNP") == 2
    assert sessions.set_code("nobody@example.org", "BCDF-GHJK-LMNP") == 0
    assert all(sessions.guess(each, "bcdfghjklmnp") for each in ours)
    assert not sessions.guess(other, "bcdfghjklmnp")
    with pytest.raises(Refused, match="is over"):
        sessions.sign_in(old)


def test_what_has_expired_is_removed(
    sessions: Sessions, accounts: Accounts, ada: Account, clock: Clock
) -> None:
    sessions.start(ada.id, ADA)
    sessions.know(ada.id)
    sessions.begin({}, ADA)
    clock.wait(module.KNOWN_SECONDS + 1)
    sessions.forget_old()
    for table in ("sessions", "known_browsers", "sign_ins"):
        assert accounts.database.execute(f"SELECT count(*) FROM {table}") == [(0,)]


def test_only_hashes_are_stored(sessions: Sessions, ada: Account, tmp_path: Path) -> None:
    secrets = [
        sessions.start(ada.id, ADA),
        sessions.know(ada.id),
        sessions.begin({}, ADA, "48151623"),
    ]
    stored = b"".join(file.read_bytes() for file in tmp_path.glob("accounts.db*"))
    assert ADA.encode() in stored
    assert [secret for secret in (*secrets, "48151623") if secret.encode() in stored] == []


def test_codes_have_their_form_and_differ() -> None:
    codes = {module.new_code() for _ in range(50)}
    assert len(codes) == 50
    assert all(len(code) == 8 and code.isdigit() for code in codes)
    of_host = {module.new_host_code() for _ in range(50)}
    assert len(of_host) == 50
    for code in of_host:
        assert [len(part) for part in code.split("-")] == [4, 4, 4]
        assert set(code) <= {*module.LETTERS, "-"}


@given(code=st.text("BCDFGHbcdfgh0123 -", max_size=12))
def test_plain_code_is_the_same_however_often_it_is_made_plain(code: str) -> None:
    assert plain(plain(code)) == plain(code) == plain(code.lower()) == plain(f" {code}- ")
    assert not set(plain(code)) & set(" -abcdefgh")
