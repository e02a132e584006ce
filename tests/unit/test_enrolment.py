"""Enrolment makes the key, once; nothing else does, and nothing works without it."""

import json

import pytest

from worker import enrolment, settings
from worker.errors import IdentityError, SettingsError


def settings_for(folder, **flat):
    return settings.from_flat(
        {"node_state_dir": str(folder), "node_min_free_disk_mb": 1, **flat}, "test"
    )


def test_enrolling_twice_keeps_the_key(tmp_path, capsys):
    enrolment.run(settings_for(tmp_path))
    key = (tmp_path / "swarm.pem").read_bytes()
    enrolment.run(settings_for(tmp_path))
    assert (tmp_path / "swarm.pem").read_bytes() == key
    identity, enrolled = enrolment.load(settings_for(tmp_path))
    assert enrolled == enrolment.Enrolment(identity.peer_id, registered=False)
    assert identity.peer_id in capsys.readouterr().out


def test_folder_that_was_never_enrolled_is_refused(tmp_path):
    with pytest.raises(IdentityError, match="identity missing"):
        enrolment.load(settings_for(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_key_of_another_node_is_refused(tmp_path):
    enrolment.run(settings_for(tmp_path / "a"))
    enrolment.run(settings_for(tmp_path / "b"))
    (tmp_path / "a/swarm.pem").write_bytes((tmp_path / "b/swarm.pem").read_bytes())
    with pytest.raises(IdentityError, match="put the key that was enrolled back"):
        enrolment.load(settings_for(tmp_path / "a"))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        json.dumps({"peer_id": "Qm"}),
        json.dumps({"peer_id": "Qm", "registered": "no"}),
    ],
)
def test_enrolment_file_that_is_broken_is_explained(tmp_path, text):
    enrolment.run(settings_for(tmp_path))
    (tmp_path / "enrolment.json").write_text(text)
    with pytest.raises(
        IdentityError,
        match=r"enrolment.json: .*expected what `hivewright enrol` writes; run it again",
    ):
        enrolment.load(settings_for(tmp_path))


def test_chain_without_an_account_service_is_refused(tmp_path):
    with pytest.raises(
        SettingsError,
        match=r"chain.account_url is not set; expected the address of the account service",
    ):
        enrolment.run(settings_for(tmp_path, chain_rpc_url="http://127.0.0.1:8545"))


def test_account_service_that_the_enrolment_does_not_know_is_not_passed_over(tmp_path):
    enrolment.run(settings_for(tmp_path))
    with pytest.raises(
        IdentityError,
        match=r"enrolled without an account service, but chain.account_url is http://a:1",
    ):
        enrolment.load(settings_for(tmp_path, chain_account_url="http://a:1"))


def test_node_without_a_chain_can_not_tell_who_is_registered(tmp_path):
    enrolment.run(settings_for(tmp_path))
    picky = settings_for(
        tmp_path,
        swarm_only_registered=True,
        chain_deployment_file=str(tmp_path / "deployment.json"),
    )
    with pytest.raises(SettingsError, match="this node would find nobody registered"):
        enrolment.load(picky)
