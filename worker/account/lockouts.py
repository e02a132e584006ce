"""Wrong codes, invitations and tokens, counted by their sender and by the account they are for.

The limit of a sender's address stops a guesser with one address. The limit of an account stops one
with many. Neither keeps its owner out: a known caller has an allowance of its own. That is a
browser that has signed in to the account before, or a node that is linked to it and has proved its
key.
"""

from dataclasses import dataclass

from worker.account.request_bodies import Refused
from worker.chain.quotas import Quota


@dataclass(frozen=True, slots=True)
class Guess:
    """A guess that is counted as wrong until it is known to be right, or was not compared."""

    _counted: tuple[tuple[Quota, str], ...]

    def take_back(self) -> None:
        for quota, counted in self._counted:
            quota.take(counted, -1.0)


class Lockouts:
    """The wrong guesses of some ways in. For the event loop's thread only.

    `of_address`, `of_account`: guesses per second in the long run, and at first.
    """

    def __init__(
        self,
        of_address: tuple[float, float] = (1 / 30, 10.0),
        of_account: tuple[float, float] = (1 / 60, 30.0),
    ) -> None:
        self._of_address = Quota(*of_address)
        self._of_account = Quota(*of_account)

    def count(
        self,
        source: str,
        account: str | None,
        known: str | None = None,
    ) -> Guess:
        """Count a guess before anything is compared, so that guesses at once have no advantage.

        `account` names the way in, too, such as "code ada@example.org": the others stay open. None:
        the secret is too long to guess, so that nobody needs to be kept out. `known` names a known
        caller. Raises Refused after too many wrong guesses from `known` or `source`, or for
        `account`.
        """
        counted = [(self._of_address, known or source)]
        if self._of_address.left(known or source) < 1:
            raise Refused(429, "TooManyGuesses", "wrong guesses came from here; wait half a minute")
        if known is None and account is not None:
            if self._of_account.left(account) < 1:
                raise Refused(
                    429,
                    "AccountLocked",
                    "wrong guesses came from many places, so this way in is closed to new browsers"
                    " and nodes for now; use a browser that has signed in here before, or another"
                    " way in, or ask the host (`hivewright account code`, `account invite`)",
                )
            counted.append((self._of_account, account))
        for quota, caller in counted:
            quota.take(caller)
        return Guess(tuple(counted))
