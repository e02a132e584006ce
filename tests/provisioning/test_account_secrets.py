"""Secrets of the account service come by file, and reach it as credentials alone."""

from pathlib import Path

import pytest
from test_validation import hub, plan_of

from deploys import account_secrets
from deploys.inventory.secret_files import ACCOUNT_SECRETS
from worker.errors import SettingsError


def test_secret_is_roots_file_and_a_credential(tmp_path: Path) -> None:
    file = tmp_path / "passphrase"
    file.write_text("correct horse battery staple\n")
    plan = plan_of("hub", hub(account_passphrase_file=str(file)))
    assert plan.account_secrets == {"account_passphrase_file": file}
    credential = "/run/credentials/hivewright-account.service/account.passphrase"
    assert str(plan.services["account"].account.passphrase_file) == credential
    assert account_secrets.drop_in_text(plan.account_secrets) == (
        "[Service]\nLoadCredential=account.passphrase:/etc/hivewright/account-account.passphrase\n"
    )
    assert "horse" not in repr(plan)


def test_without_secrets_there_is_no_drop_in() -> None:
    plan = plan_of("hub", hub())
    assert plan.services["account"].account.passphrase_file is None
    assert account_secrets.drop_in_text(plan.account_secrets) == ""


@pytest.mark.parametrize("key", ACCOUNT_SECRETS)
def test_missing_file_is_refused_before_anything_is_deployed(key: str) -> None:
    with pytest.raises(SettingsError, match=f"{key}: /nowhere: "):
        plan_of("hub", hub(**{key: "/nowhere"}))


def test_page_behind_tailscale_believes_its_headers() -> None:
    served = {"tailscale": True, "tailscale_serve": {443: 3000}}
    assert plan_of("hub", hub(**served)).services["account"].account.tailscale_login
    assert not plan_of("hub", hub()).services["account"].account.tailscale_login
