"""`hivewright login URL`: sign a node in to a person's account, from a terminal."""

import argparse
from contextlib import closing

from worker import enrolment
from worker.chain.account_client import AccountClient
from worker.chain.device_login import DeviceLogin
from worker.errors import SettingsError
from worker.runtime import host
from worker.runtime.state_dir import StateDir
from worker.settings import Settings
from worker.swarm import identity


def run(settings: Settings, options: argparse.Namespace) -> None:
    """Show a code, wait until a person allows the node with it, and enrol it for their account.

    The node's key is made if it is missing. Raises IdentityError if the sign-in is refused, or the
    node belongs to another account.
    """
    url = options.url.rstrip("/")
    configured = settings.chain.account_url
    if configured is not None and configured.rstrip("/") != url:
        raise SettingsError(
            f"chain.account_url is {configured}, and the sign-in is at {url}; expected one address"
        )
    chain = settings.chain.model_copy(update={"account_url": url})
    folder = settings.node.state_dir
    host.require_disk(folder, settings.node.min_free_disk_mb)
    file = StateDir(folder).identity
    node = identity.load(file) if file.exists() else identity.create(file)
    with closing(DeviceLogin(url, chain)) as login, closing(AccountClient(chain, folder)) as client:
        begun = login.begin(node, settings.node.name or "", options.move, client.challenge())
        print(f"Open  {begun.page}\nand type the code  {begun.user_code}\n")
        print(f"(or open {begun.page_with_code})\nwaiting ...", flush=True)
        client.keep_token(login.wait(begun))
    enrolment.run(settings.model_copy(update={"chain": chain}), options)
    if configured is None:
        print(f"set chain.account_url to {url} in the settings before the worker starts")
