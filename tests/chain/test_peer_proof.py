"""Proofs as a node makes them, checked by the contract."""

import pytest
from account_service import some_identity
from cryptography.hazmat.primitives.asymmetric import rsa
from eth_account import Account
from eth_account.messages import encode_defunct

from worker.chain import peer_proof
from worker.errors import ContractRefused
from worker.swarm.identity import Identity


@pytest.fixture
def node(tmp_path) -> Identity:
    return some_identity(tmp_path)


def refused(chain, account, call) -> str:
    with pytest.raises(ContractRefused) as caught:
        chain.send(account, call)
    return caught.value.name


def test_proof_registers_at_bounded_gas(chain, node):
    account = Account.create()
    shown = peer_proof.of_registration(node, chain.deployment, account.address)
    receipt = chain.send(account, peer_proof.call(chain.coordinator, node.peer_id, shown))
    assert peer_proof.is_checked(chain.coordinator)
    assert peer_proof.binding(chain.coordinator, node.peer_id) == peer_proof.Binding(
        account.address, True, 0
    )
    plain = chain.send(Account.create(), chain.coordinator.register_peer(node.peer_id[::-1]))
    assert receipt.gas_used < 350_000
    assert plain.gas_used < 220_000


def test_squatter_loses_the_peer_to_a_proof(chain, node):
    squatter = chain.new_account(node.peer_id)
    chain.send(squatter, chain.coordinator.submit_reward(0, 0, -1000, node.peer_id))
    account = Account.create()
    shown = peer_proof.of_registration(node, chain.deployment, account.address)
    assert (
        refused(chain, squatter, peer_proof.call(chain.coordinator, node.peer_id, shown))
        == "InvalidProof"
    )
    chain.send(account, peer_proof.call(chain.coordinator, node.peer_id, shown))
    assert chain.coordinator.owner_of(node.peer_id) == account.address
    assert chain.coordinator.total_rewards([node.peer_id]) == [0]
    assert (
        refused(chain, squatter, chain.coordinator.register_peer(node.peer_id))
        == "PeerIdAlreadyRegistered"
    )
    assert (
        refused(chain, account, peer_proof.call(chain.coordinator, node.peer_id, shown))
        == "PeerIdAlreadyRegistered"
    )


def test_peer_moves_with_its_rewards_by_both_signatures(chain, node):
    old, new = Account.create(), Account.create()
    chain.send(
        old,
        peer_proof.call(
            chain.coordinator,
            node.peer_id,
            peer_proof.of_registration(node, chain.deployment, old.address),
        ),
    )
    chain.send(old, chain.coordinator.submit_reward(0, 0, 410, node.peer_id))
    move = peer_proof.call(
        chain.coordinator, node.peer_id, peer_proof.of_move(node, chain.deployment, new.address, 0)
    )
    assert refused(chain, Account.create(), move) == "InvalidProof"
    chain.send(new, move)
    assert peer_proof.binding(chain.coordinator, node.peer_id) == peer_proof.Binding(
        new.address, True, 1
    )
    assert chain.coordinator.total_rewards([node.peer_id]) == [410]
    assert (chain.peers_of(old.address), chain.peers_of(new.address)) == (
        [],
        [node.peer_id],
    )
    again = peer_proof.of_move(node, chain.deployment, old.address, 0)
    assert (
        refused(chain, old, peer_proof.call(chain.coordinator, node.peer_id, again))
        == "InvalidProof"
    )


def test_account_can_hand_over_a_peer_of_any_kind(chain):
    old, new = chain.new_account("12D3KooWother"), Account.create()
    message = (
        b"hivewright/rebinding/1\n"
        + chain.deployment.chain_id.to_bytes(32)
        + bytes.fromhex(chain.deployment.contract[2:] + new.address[2:])
        + bytes(32)
        + b"12D3KooWother"
    )
    signature = bytes(old.sign_message(encode_defunct(message)).signature)
    chain.send(
        new,
        chain.coordinator.call("rebindPeer(string,bytes,bytes)", "12D3KooWother", b"", signature),
    )
    assert peer_proof.binding(chain.coordinator, "12D3KooWother") == peer_proof.Binding(
        new.address, False, 1
    )


def test_nobody_s_peer_has_no_binding(chain):
    assert peer_proof.binding(chain.coordinator, "nobody") == peer_proof.Binding(None, False, 0)


def test_key_of_another_size_has_no_proof(chain):
    large = Identity(rsa.generate_private_key(public_exponent=65537, key_size=3072))
    assert peer_proof.of_registration(large, chain.deployment, Account.create().address) is None
    assert peer_proof.of_move(large, chain.deployment, Account.create().address, 0) is None
