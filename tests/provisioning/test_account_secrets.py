"""Secrets of the account service come by file, and reach it as credentials alone."""

import subprocess
from pathlib import Path

import pytest
from test_validation import hub, plan_of

from deploys import account_secrets, rollback
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


def test_all_secrets_and_ways_in_of_one_inventory(tmp_path: Path) -> None:
    """Each reaches the service as a credential, and none is in a setting, unit or message."""
    secrets = {}
    for key in ACCOUNT_SECRETS:
        secrets[key] = str(tmp_path / key)
        (tmp_path / key).write_text(f"secret-of-{key}\n")
    plan = plan_of(
        "hub",
        hub(
            **secrets,
            account_operators=["host@example.org"],
            account_smtp_host="mail.example.org",
            account_smtp_user="swarm",
            account_oidc_issuer="https://accounts.google.com",
            account_oidc_client_id="hivewright",
            account_public_url="https://swarm.example.ts.net",
            tailscale=True,
            tailscale_serve={443: 3000},
        ),
    )
    section = plan.services["account"].account
    folder = "/run/credentials/hivewright-account.service"
    assert {str(section.passphrase_file), str(section.smtp_password_file)} == {
        f"{folder}/account.passphrase",
        f"{folder}/smtp.password",
    }
    assert str(section.oidc_client_secret_file) == f"{folder}/oidc.secret"
    assert (section.behind_proxy, section.tailscale_login) == (True, True)
    drop_in = account_secrets.drop_in_text(plan.account_secrets)
    assert drop_in.count("LoadCredential=") == len(ACCOUNT_SECRETS)
    assert "secret-of" not in drop_in + repr(plan)


def test_other_services_get_none_of_them(tmp_path: Path) -> None:
    file = tmp_path / "passphrase"
    file.write_text("correct horse battery staple\n")
    plan = plan_of("hub", hub(account_passphrase_file=str(file)))
    for role, settings in plan.services.items():
        assert role == "account" or settings.account.passphrase_file is None


def test_rollback_keeps_and_restores_them_with_the_settings(tmp_path: Path) -> None:
    kept = {account_secrets.file_of(key).name for key in ACCOUNT_SECRETS} | {"account.yaml"}
    for name in (*kept, "enrolment.token", "note"):
        (tmp_path / name).touch()
    found = subprocess.run(
        f"find . -maxdepth 1 {rollback._SETTINGS}",
        shell=True,
        cwd=tmp_path,
        check=True,
        capture_output=True,
        text=True,
    )
    assert {Path(line).name for line in found.stdout.splitlines()} == kept


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
