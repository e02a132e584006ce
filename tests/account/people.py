"""People who sign in, in the tests."""

from tests.account.visitor import Visitor
from worker.account.sessions import Sessions

ADA, BOB = "ada@example.org", "bob@example.org"


def code_of(service, email: str, code: str = "12345678") -> str:
    """Do what `hivewright account code` does."""
    assert Sessions(service.service.accounts.database).set_code(email, code)
    return code


def signed_in(service, email: str = ADA, **headers: str) -> Visitor:
    visitor = Visitor(service.url, **headers)
    assert visitor.begin(email).status_code == 200
    assert visitor.answer(code_of(service, email)).status_code == 200
    assert visitor.is_signed_in
    return visitor
