"""Limit wrong codes, invitations and tokens, per sender and per account that they are for.

The limit per address stops an attacker with one address, the limit per account stops one with many
addresses. Neither locks the owner out, because known callers have their own limit: browsers that
have signed in to the account before, and nodes that are linked to it and have proved their key.
"""

from dataclasses import dataclass

from worker.account.request_bodies import Refused
from worker.chain.quotas import Quota


@dataclass(frozen=True, slots=True)
class Guess:
    """A guess, counted as wrong until it is known to be right or is not compared after all."""

    _counted: tuple[tuple[Quota, str], ...]

    def take_back(self) -> None:
        for quota, counted in self._counted:
            quota.take(counted, -1.0)


class Lockouts:
    """The wrong guesses of some ways to sign in. For the event loop's thread only.

    `of_address`, `of_account`: allowed guesses per second, and the size of a burst.
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
        """Count a guess before it is compared, so that concurrent guesses have no advantage.

        `account` also names the way in, such as "code ada@example.org", so that others stay open.
        None: the secret is too long to guess, so there is no limit per account. `known` names a
        known caller. Raises Refused after too many wrong guesses from `known` or `source`, or for
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
