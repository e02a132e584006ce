"""`hivewright account code`, `invite` and `give`: for the host, while the service runs."""

import argparse
import os
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path

from worker.account import invitations
from worker.account.accounts import DATABASE_FILE
from worker.account.mail import normalized
from worker.account.releases import release_all
from worker.account.request_bodies import Refused
from worker.account.sessions import SIGN_IN_SECONDS, Sessions, new_host_code
from worker.chain.database import Database
from worker.errors import ResourceError, SettingsError
from worker.log import printable
from worker.settings import Settings


def code(settings: Settings, options: argparse.Namespace) -> None:
    """Print a new code for the open sign-ins of an e-mail address.

    Raises SettingsError if no sign-in with it is open.
    """
    email = _email(options)
    with closing(_database(settings)) as database:
        code = new_host_code()
        if not Sessions(database).set_code(email, code):
            raise SettingsError(
                f"EMAIL: nobody waits at the sign-in page with {email}; expected that it was typed"
                f" there within the last {SIGN_IN_SECONDS / 60:g} minutes"
            )
    print(f"{code}  (for {email}, valid until the sign-in is {SIGN_IN_SECONDS / 60:g} minutes old)")


def invite(settings: Settings, options: argparse.Namespace) -> None:
    """Print an invitation. Raises SettingsError for an invalid date, or one in the past."""
    try:
        last_day = datetime.strptime(options.until, "%Y-%m-%d").replace(tzinfo=UTC)
        end = last_day + timedelta(days=1)
    except (ValueError, OverflowError):
        raise SettingsError(
            f"--until: got {options.until!r}; expected a date such as 2027-01-31"
        ) from None
    if end <= datetime.now(UTC):
        raise SettingsError(
            f"--until: got {options.until}, which is in the past; expected a future date"
        )
    with closing(_database(settings)) as database:
        secret = invitations.create(database, options.nodes, end.timestamp())
    print(f"link   {_address(settings)}/sign-in#invitation={secret}")
    print(f"token  {secret}")


def give(settings: Settings, options: argparse.Namespace) -> None:
    """Give an account that has no person yet, with its nodes, to an e-mail address.

    If the address has an account already, the nodes are released to that. Raises SettingsError.
    """
    email = _email(options)
    with closing(_database(settings)) as database, database.transaction() as run:
        rows = run("SELECT id FROM nobodys WHERE address = ? COLLATE NOCASE", (options.address,))
        if not rows:
            raise SettingsError(
                f"ADDRESS: got {printable(options.address)}; expected the address of an account"
                " that an invitation made and that has no e-mail address, from the page Accounts"
            )
        ((account_id,),) = rows
        taken = run("SELECT id, address FROM accounts WHERE email = ?", (email,))
        if taken:
            release_all(run, account_id, taken[0][0])
        else:
            run("UPDATE accounts SET email = ? WHERE id = ?", (email, account_id))
    if taken:
        print(f"{email} has account {taken[0][1]}, and takes the nodes at the page My nodes")
    else:
        print(f"{options.address} is the account of {email}, who signs in with it")


def _email(options: argparse.Namespace) -> str:
    try:
        return normalized(options.email)
    except Refused as refused:
        raise SettingsError(f"EMAIL: got {options.email!r}; {refused.detail}") from None


def _database(settings: Settings) -> Database:
    """Open the service's database as the user that owns it.

    As root, SQLite would leave files there that the service can't open.
    """
    file = settings.account.state_dir / DATABASE_FILE
    try:
        owner = file.stat()
    except OSError as error:
        raise ResourceError(
            f"{file}: {error.strerror}; expected the database of an account service (the settings"
            " file of `hivewright account`, on its machine)"
        ) from None
    if os.geteuid() == 0 and owner.st_uid != 0:
        os.setgroups([])
        os.setgid(owner.st_gid)
        os.setuid(owner.st_uid)
    return Database(file, "", "FULL")


def _address(settings: Settings) -> str:
    if settings.account.public_url is not None:
        return settings.account.public_url.rstrip("/")
    file: Path = settings.account.state_dir / "address"
    return file.read_text().strip()
