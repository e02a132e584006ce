"""An auditor gets the groups that a peer signed from real peers, also after a restart."""

import pytest
from swarm_lab import Lab, make_groups, multiaddrs

from worker.errors import BadRecord, SwarmError
from worker.swarm.exchange.audit_client import Listener
from worker.swarm.protocol import messages


def test_auditor_gets_signed_groups_by_digest_and_reasons_for_what_it_does_not_get(
    lab: Lab, tmp_path
) -> None:
    bootnode = lab.bootnode()
    swarm = lab.peer("a", audit_rounds=2)
    peer_id = swarm.status().peer_id
    digests = [swarm.publish(round, make_groups(peer_id, round)).digest for round in (1, 2, 3)]
    swarm.close()
    lab.peer("a", audit_rounds=2)  # nothing of it is only in memory
    section = lab._section().model_copy(update={"bootnodes": ()})
    with Listener(section, tmp_path, 30.0) as listener:
        listener.join_through(multiaddrs(bootnode))
        for digest in digests[1:]:
            assert messages.groups_digest(listener.find(peer_id, digest)) == digest
        with pytest.raises(SwarmError, match=r"the peer refuses: not-kept: .*2 rounds are kept"):
            listener.find(peer_id, digests[0])
    with (
        Listener(section, tmp_path, 0.5) as listener,
        pytest.raises(SwarmError, match="the peer was not found in the swarm"),
    ):
        listener.find("Qm" + "1" * 44, digests[1])


def test_digest_of_another_length_is_refused() -> None:
    with pytest.raises(BadRecord, match="digest of 3 bytes; expected 32"):
        messages.decode_audit(b"abc")
    assert messages.decode_audit(bytes(32)) == "00" * 32
