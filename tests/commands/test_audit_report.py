"""The report of audits: earlier findings are kept, damaged or foreign files replaced."""

import json
from collections import Counter
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.limits import largest_file
from worker.chain.coordinator import Event
from worker.commands import audit
from worker.commands.audit import NOT_DRAWN, VERDICTS, Auditor, Finding, Report, unjudged
from worker.errors import ResourceError, SwarmError

CONTRACT = "0x" + "c" * 40
SWARM = SimpleNamespace(deployment=SimpleNamespace(chain_id=31337, contract=CONTRACT))


def submitted(round=3, peer="QmA", reward=500, tx="0xaa") -> Event:
    arguments = {
        "roundNumber": round,
        "stageNumber": 0,
        "peerId": peer,
        "account": "0x1",
        "reward": reward,
    }
    return Event("RewardSubmitted", arguments, 9, tx)


def finding(verdict="audited", reason=None, **changes) -> Finding:
    found = replace(unjudged(submitted(), "ab" * 32), verdict=verdict, reason=reason)
    return replace(found, **changes)


def report_in(folder) -> Report:
    folder.mkdir(exist_ok=True)
    return Report(folder, SWARM)


def test_report_comes_back_as_it_was_written(tmp_path):
    report = report_in(tmp_path)
    noted = [
        finding(earned=500, num_groups=4),
        finding("contradicted", "why \x1b[2J", peer_id="QmB", digest=None, tx_hash="0xbb"),
        finding("unaudited", NOT_DRAWN, round=4),
    ]
    for each in noted:
        report.note(each)
    report.write()
    assert list(report_in(tmp_path).findings.values()) == sorted(noted, key=lambda each: each.key)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b"7",
        b"\xff\xfe",
        b"{}",
        b'{"version": 1}',
        json.dumps({"version": 1, "contract": CONTRACT, "rewards": 7}).encode(),
        json.dumps({"version": 1, "contract": CONTRACT, "rewards": [{}]}).encode(),
        json.dumps(
            {"version": 1, "contract": CONTRACT, "rewards": [asdict(finding()) | {"round": "x"}]}
        ).encode(),
        json.dumps(
            {"version": 1, "contract": CONTRACT, "rewards": [asdict(finding()) | {"verdict": "?"}]}
        ).encode(),
    ],
)
def test_damaged_report_is_replaced_with_a_warning(tmp_path, caplog, content):
    (tmp_path / "audit.json").write_bytes(content)
    report = report_in(tmp_path)
    assert report.findings == {}
    assert "report can't be read, starting a new one" in caplog.text
    report.note(finding())
    report.write()
    assert len(report_in(tmp_path).findings) == 1


@pytest.mark.usefixtures("usual_recursion_limit")
def test_report_nested_without_end_is_replaced(tmp_path, caplog):
    (tmp_path / "audit.json").write_text("[" * 100_000)
    assert report_in(tmp_path).findings == {}
    assert "report can't be read" in caplog.text


@pytest.mark.parametrize("change", [{"version": 2}, {"contract": "0x" + "d" * 40}])
def test_report_of_another_contract_or_version_is_replaced(tmp_path, caplog, change):
    report = report_in(tmp_path)
    report.note(finding())
    (tmp_path / "audit.json").write_text(json.dumps(report.data() | change))
    assert report_in(tmp_path).findings == {}
    assert "report of another contract or version is replaced" in caplog.text


@pytest.mark.parametrize("known", VERDICTS)
@pytest.mark.parametrize("new", VERDICTS)
@pytest.mark.parametrize("is_same", [True, False])
def test_undecided_finding_replaces_no_decided_one_of_the_same_transaction(
    tmp_path, known, new, is_same
):
    report = report_in(tmp_path)
    report.note(finding(known, "first"))
    report.note(finding(new, "second", tx_hash="0xaa" if is_same else "0xbb"))
    (kept,) = report.findings.values()
    is_kept = is_same and new == "unaudited" and known != "unaudited"
    assert kept.reason == ("first" if is_kept else "second")


def test_reward_that_is_not_drawn_again_keeps_its_reason(tmp_path):
    report = report_in(tmp_path)
    report.note(finding("unaudited", "groups not available"))
    report.note(finding("unaudited", NOT_DRAWN))
    (kept,) = report.findings.values()
    assert kept.reason == "groups not available"


@pytest.mark.parametrize(
    ("verdict", "tx", "is_settled"),
    [
        ("audited", "0xaa", True),
        ("contradicted", "0xaa", True),
        ("unaudited", "0xaa", False),
        ("audited", "0xbb", False),
    ],
)
def test_decided_reward_is_drawn_again_only_if_it_was_submitted_again(
    tmp_path, verdict, tx, is_settled
):
    report = report_in(tmp_path)
    assert not report.is_settled(submitted())
    report.note(finding(verdict, tx_hash=tx))
    assert report.is_settled(submitted()) == is_settled
    assert not report.is_settled(submitted(round=4))


def test_evidence_of_a_contradiction_is_kept_next_to_the_report(tmp_path, caplog):
    report = report_in(tmp_path)
    report.note(finding("contradicted", "too much", earned=100), b"signed")
    (kept,) = report.findings.values()
    assert kept.evidence == f"evidence/3-{'ab' * 32}.groups"
    assert (tmp_path / kept.evidence).read_bytes() == b"signed"
    assert "reward contradicted peer_id=QmA round=3 claimed=500 earned=100" in caplog.text


def test_full_disk_keeps_the_report_before(tmp_path):
    report = report_in(tmp_path)
    report.note(finding())
    report.write()
    for number in range(50):
        report.note(finding(round=number))
    with largest_file(4096), pytest.raises(ResourceError, match=r"audit.json: can't be written"):
        report.write()
    assert len(report_in(tmp_path).findings) == 1


def test_newest_findings_are_published(tmp_path, monkeypatch):
    monkeypatch.setattr(audit, "MAX_FINDINGS", 3)
    report = report_in(tmp_path)
    for number in (5, 1, 4, 2, 3):
        report.note(finding(round=number))
    assert [reward["round"] for reward in report.data()["rewards"]] == [3, 4, 5]
    assert report.data()["counts"] == {"audited": 3}


FINDINGS = st.lists(
    st.tuples(
        st.integers(0, 5),
        st.sampled_from(["a", "b"]),
        st.sampled_from(VERDICTS),
        st.integers(0, 1000),
    )
)


@given(FINDINGS)
def test_counts_and_sums_are_those_of_the_rewards(tmp_path_factory, found):
    report = report_in(tmp_path_factory.getbasetemp() / "sums")
    report.findings = {}
    for round, peer, verdict, claimed in found:
        report.note(
            finding(verdict, round=round, peer_id=peer, claimed=claimed, tx_hash=str(claimed))
        )
    data = report.data()
    rewards = data["rewards"]
    assert len(rewards) == len({(round, peer) for round, peer, _, _ in found})
    assert data["counts"] == Counter(reward["verdict"] for reward in rewards)
    for peer, sums in data["sums"].items():
        of_peer = [reward for reward in rewards if reward["peer_id"] == peer]
        assert sum(sums.values()) == sum(reward["claimed"] for reward in of_peer)
        assert sum(data["peers"][peer].values()) == len(of_peer)
        for verdict in VERDICTS:
            assert data["peers"][peer][verdict] == sum(r["verdict"] == verdict for r in of_peer)


# ---- one reward


def judged(digest, find) -> Finding:
    coordinator = SimpleNamespace(reward_digest=lambda _: digest)
    found, evidence = Auditor(coordinator, None, find).audit(submitted())
    assert evidence is None
    assert found.verdict == "unaudited"
    return found


def test_reward_without_a_digest_is_not_asked_for():
    found = judged(None, lambda *_: pytest.fail("not needed"))
    assert found.reason == "its transaction has no digest of groups"


def test_groups_that_are_not_there_are_no_contradiction():
    def away(*_):
        raise SwarmError("peer is away\n\x1b[2J")

    found = judged("ab" * 32, away)
    assert found.reason == "groups not available: peer is away\\n\\x1b[2J"


def test_other_groups_than_those_of_the_digest_are_no_contradiction():
    found = judged("ab" * 32, lambda *_: b"groups of something else")
    assert found.reason == "the groups served do not match the digest"


def test_finding_has_what_the_chain_says():
    found = unjudged(submitted(7, "QmB", 250, "0xdd"), "ef")
    assert (found.round, found.peer_id, found.claimed, found.tx_hash) == (7, "QmB", 250, "0xdd")
    assert (found.verdict, found.reason, found.digest) == ("unaudited", NOT_DRAWN, "ef")
    assert found.key == (7, 0, "QmB")
