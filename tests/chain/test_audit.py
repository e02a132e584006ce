"""Audits of rewards on a real chain, with signed groups in folders instead of at peers."""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import pytest
from account_service import some_identity
from eth_account.signers.local import LocalAccount

from worker import settings
from worker.chain.client import Call
from worker.commands import audit
from worker.commands.audit import Auditor, Finding, Report
from worker.errors import BadRecord, SettingsError
from worker.records import Group, Task, round_seed
from worker.settings import Swarm
from worker.swarm.exchange.archive import Archive
from worker.swarm.exchange.verify import Verifier
from worker.swarm.identity import Identity
from worker.swarm.protocol import messages


class Sums:
    """Tasks with the answer "SEED+INDEX"; family "other" is unknown."""

    versions = ("sums 1",)
    families = ("sum x",)

    def question(self, task: Task) -> str:
        if task.family != "sum":
            raise BadRecord("unknown-task", f"task {task.family}: not in this mix")
        return f"{task.seed}+{task.index}?"

    def score(self, task: Task, completions) -> list[float]:
        return [1.0 if c == str(task.seed + task.index) else 0.0 for c in completions]


@dataclass
class Peer:
    """A node that signs groups, keeps them, and submits the rewards that a test asks for."""

    chain: object
    identity: Identity
    account: LocalAccount
    folder: Path

    def groups(self, round: int, right: tuple[int, ...], family: str = "sum") -> list[Group]:
        """Return a group of four completions for each number of right answers."""
        seed = round_seed(self.identity.peer_id, round)
        return [
            Group(Task(family, "x", seed, i), (str(seed + i),) * n + ("no",) * (4 - n))
            for i, n in enumerate(right)
        ]

    def publish(self, round: int, groups: list[Group]) -> str:
        return Archive(self.folder, 8).put(
            round, messages.seal_groups(self.identity, round, groups)
        )

    def submit(self, round: int, reward: int, digest: str | None) -> None:
        call = self.chain.coordinator.submit_reward(round, 0, reward, self.identity.peer_id, digest)
        assert self.chain.send(self.account, call).succeeded


@pytest.fixture
def peer(chain, tmp_path, tmp_path_factory) -> Peer:
    identity = some_identity(tmp_path_factory.getbasetemp())
    return Peer(chain, identity, chain.new_account(identity.peer_id), tmp_path / "groups")


def judge(chain, peer: Peer) -> tuple[Finding, bytes | None]:
    """Return the verdict on the newest reward."""
    auditor = Auditor(
        chain.coordinator, Verifier(Sums(), Swarm(), 256), audit._in_folders([peer.folder])
    )
    return auditor.audit(audit.submitted_rewards(chain.coordinator, 16)[-1])


def test_reward_that_the_groups_earned_is_audited(chain, peer) -> None:
    digest = peer.publish(0, peer.groups(0, (4, 2, 1)))
    peer.submit(0, 583, digest)
    finding, evidence = judge(chain, peer)
    assert (finding.verdict, finding.reason, finding.claimed, finding.earned) == (
        "audited",
        None,
        583,
        583,
    )
    assert (finding.num_groups, finding.digest, finding.account) == (
        3,
        digest,
        peer.account.address,
    )
    assert evidence is None


def test_reward_of_one_thousandth_more_is_contradicted_with_the_signed_groups(chain, peer) -> None:
    digest = peer.publish(0, peer.groups(0, (4, 2, 1)))
    peer.submit(0, 584, digest)
    finding, evidence = judge(chain, peer)
    assert (finding.verdict, finding.earned) == ("contradicted", 583)
    assert finding.reason == "its 3 groups can have earned 583 at most"
    assert evidence is not None
    assert messages.groups_digest(evidence) == digest
    assert messages.open_groups(
        evidence, peer.identity.peer_id, 0, Verifier(Sums(), Swarm(), 256).limits
    )


def test_reward_below_what_was_earned_is_audited(chain, peer) -> None:
    peer.submit(0, 100, peer.publish(0, peer.groups(0, (4, 4))))
    assert judge(chain, peer)[0].verdict == "audited"


def test_groups_of_another_round_or_key_earn_nothing(chain, peer, tmp_path_factory) -> None:
    peer.submit(0, 500, peer.publish(0, peer.groups(1, (4, 4))))
    finding, _ = judge(chain, peer)
    assert (finding.verdict, finding.earned) == ("contradicted", 0)
    assert finding.reason == "its 2 groups can have earned 0 at most, 2 of them are invalid"
    chain.advance()
    other = some_identity(tmp_path_factory.getbasetemp(), 1)
    digest = Archive(peer.folder, 8).put(1, messages.seal_groups(other, 1, peer.groups(1, (4,))))
    peer.submit(1, 500, digest)
    finding, evidence = judge(chain, peer)
    assert finding.verdict == "contradicted"
    assert f"groups are not signed by {peer.identity.peer_id}" in finding.reason
    assert evidence is not None


def test_one_group_given_twice_counts_once(chain, peer) -> None:
    groups = peer.groups(0, (4, 0))
    peer.submit(0, 667, peer.publish(0, [groups[0], groups[0], groups[1]]))
    finding, _ = judge(chain, peer)
    assert (finding.verdict, finding.earned, finding.num_groups) == ("contradicted", 333, 3)


def test_groups_that_were_changed_later_do_not_count(chain, peer) -> None:
    digest = peer.publish(0, peer.groups(0, (1,)))
    peer.submit(0, 1000, digest)
    (file,) = peer.folder.iterdir()
    file.write_bytes(messages.seal_groups(peer.identity, 0, peer.groups(0, (4,))))
    finding, _ = judge(chain, peer)
    assert (finding.verdict, finding.reason) == (
        "unaudited",
        "the groups served do not match the digest",
    )


@pytest.mark.parametrize("is_committed", [True, False])
def test_reward_without_groups_is_unaudited(chain, peer, is_committed) -> None:
    peer.submit(0, 900, "ab" * 32 if is_committed else None)
    finding, _ = judge(chain, peer)
    reason = (
        "groups not available: none with this digest"
        if is_committed
        else "its transaction has no digest of groups"
    )
    assert finding.verdict == "unaudited"
    assert finding.reason.startswith(reason)


def test_tasks_not_known_here_may_have_earned_everything(chain, peer) -> None:
    groups = [*peer.groups(0, (2,)), *peer.groups(0, (0, 4), "other")[1:]]
    peer.submit(0, 750, peer.publish(0, groups))
    finding, _ = judge(chain, peer)
    assert (finding.verdict, finding.reason) == (
        "unaudited",
        "1 of 2 groups are of unknown tasks, or too long",
    )
    chain.advance()
    groups = [*peer.groups(1, (2,)), *peer.groups(1, (0, 4), "other")[1:]]
    peer.submit(1, 751, peer.publish(1, groups))
    assert judge(chain, peer)[0].verdict == "contradicted"


def test_group_longer_than_the_auditor_reads_may_have_earned_everything(chain, peer) -> None:
    first, second = peer.groups(0, (2, 0))
    long = Group(second.task, ("x" * (Swarm().max_completion_bytes + 1), "no"))
    peer.submit(0, 750, peer.publish(0, [first, long]))
    assert judge(chain, peer)[0].verdict == "unaudited"


def test_reward_through_a_foreign_call_is_unaudited(chain, peer) -> None:
    """Newer clients of RL Swarm use the other overload of submitReward."""
    data = chain.coordinator._abi.encode_abi(
        "submitReward(uint256,uint256,uint256,string)", [0, 0, 7, peer.identity.peer_id]
    )
    call = Call("submitReward", bytes.fromhex(data[2:]), chain.deployment.contract)
    assert chain.send(peer.account, call).succeeded
    assert judge(chain, peer)[0].reason == "its transaction has no digest of groups"


def test_only_the_newest_rounds_are_looked_at(chain, peer) -> None:
    for round in range(5):
        peer.submit(round, round, None)
        chain.advance()
    found = audit.submitted_rewards(chain.coordinator, 3)
    assert [event.arguments["roundNumber"] for event in found] == [3, 4]
    assert len(audit.submitted_rewards(chain.coordinator, 99)) == 5


# ---- the report


def test_report_keeps_verdicts_counts_by_peer_and_names_the_evidence(chain, peer, tmp_path) -> None:
    peer.submit(0, 999, peer.publish(0, peer.groups(0, (2, 2))))
    finding, evidence = judge(chain, peer)
    report = Report(tmp_path / "out", chain.coordinator)
    report.note(finding, evidence)
    (event,) = audit.submitted_rewards(chain.coordinator, 16)
    report.note(audit.unjudged(event))
    report.write()
    data = json.loads((tmp_path / "out/audit.json").read_text())
    me = peer.identity.peer_id
    assert data["peers"] == {me: {"audited": 0, "unaudited": 0, "contradicted": 1}}
    assert data["contract"] == chain.deployment.contract
    (entry,) = data["rewards"]
    assert (entry["verdict"], entry["claimed"], entry["earned"], entry["peer_id"]) == (
        "contradicted",
        999,
        500,
        me,
    )
    assert (tmp_path / "out" / entry["evidence"]).read_bytes() == evidence
    again = Report(tmp_path / "out", chain.coordinator)
    assert again.is_settled(event)
    assert again.findings == report.findings


def test_unaudited_is_tried_again_and_a_later_verdict_replaces_it(chain, peer, tmp_path) -> None:
    digest = messages.groups_digest(messages.seal_groups(peer.identity, 0, peer.groups(0, (4,))))
    peer.submit(0, 1000, digest)
    report = Report(tmp_path / "out", chain.coordinator)
    (event,) = audit.submitted_rewards(chain.coordinator, 16)
    report.note(audit.unjudged(event))
    report.note(*judge(chain, peer))
    (finding,) = report.findings.values()
    assert finding.reason.startswith("groups not available")
    report.note(audit.unjudged(event))
    assert list(report.findings.values()) == [finding]
    assert not report.is_settled(event)
    peer.publish(0, peer.groups(0, (4,)))
    report.note(*judge(chain, peer))
    assert report.is_settled(event)


def test_report_of_another_contract_or_damaged_begins_anew(chain, tmp_path) -> None:
    for text in (
        "{",
        "[]",
        json.dumps({"version": 1, "contract": "0x", "rewards": []}),
        '{"version": 1}',
    ):
        (tmp_path / "audit.json").write_text(text)
        assert Report(tmp_path, chain.coordinator).findings == {}


# ---- the archive


def test_archive_keeps_the_newest_rounds_and_both_of_one_round(tmp_path) -> None:
    archive = Archive(tmp_path / "groups", 2)
    digests = [
        archive.put(round, f"{round}/{n}".encode())
        for round, n in ((8, 0), (9, 0), (9, 1), (10, 0))
    ]
    assert [archive.find(digest) for digest in digests] == [None, b"9/0", b"9/1", b"10/0"]
    assert Archive(tmp_path / "groups", 2).find(digests[3]) == b"10/0"
    assert Archive(tmp_path / "nowhere", 2).find(digests[3]) is None


def test_folder_of_groups_that_is_none_is_refused_before_anything_is_asked(tmp_path) -> None:
    options = argparse.Namespace(
        groups=[tmp_path / "nosuch"],
        output=tmp_path / "audit",
        rounds=None,
        sample=None,
        json=False,
    )
    with pytest.raises(SettingsError, match="nosuch: no such folder; expected a node's groups/"):
        audit.run(settings.Settings(), options)
    assert not (tmp_path / "audit").exists()
