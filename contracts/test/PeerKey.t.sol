// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import {ISwarmCoordinator} from "../src/ISwarmCoordinator.sol";
import {PeerKey} from "../src/PeerKey.sol";
import {SwarmCoordinator} from "../src/SwarmCoordinator.sol";
import {Fixture, vm} from "./Fixture.sol";
import {TestKeys} from "./TestKeys.sol";

/// Who may hold a peer: what a proof is worth, and what is none.
contract PeerKeyTest is Fixture {
    uint256 private constant ANNA_KEY = 0xa11a;
    uint256 private constant BERT_KEY = 0xbe27;
    address private immutable ANNA = vm.addr(ANNA_KEY);
    address private immutable BERT = vm.addr(BERT_KEY);
    address private constant SQUATTER = address(0xbad);

    bytes private _signature; // made once, as signing is slow: key 1 for ANNA

    function setUp() public override {
        super.setUp();
        _signature = TestKeys.sign(TestKeys.first(), registration(ANNA));
    }

    function refuseRegistration(address account, string memory peerId, bytes memory publicKey, bytes memory signature)
        private
    {
        vm.expectRevert(SwarmCoordinator.InvalidProof.selector);
        vm.prank(account);
        coordinator.registerPeerWithProof(peerId, publicKey, signature);
    }

    function refuseRebinding(address account, string memory peerId, bytes memory publicKey, bytes memory signature)
        private
    {
        vm.expectRevert(SwarmCoordinator.InvalidProof.selector);
        vm.prank(account);
        coordinator.rebindPeer(peerId, publicKey, signature);
    }

    // ---- peer ids

    function isIdOf(string memory peerId, bytes32 digest) external pure returns (bool) {
        return PeerKey.isIdOf(peerId, digest);
    }

    /// Base 58 by long division, unlike the contract's way.
    function base58(bytes memory data) private pure returns (bytes memory text) {
        text = new bytes(46);
        for (uint256 place = text.length; place > 0; place--) {
            uint256 rest;
            for (uint256 i = 0; i < data.length; i++) {
                rest = rest * 256 + uint8(data[i]);
                data[i] = bytes1(uint8(rest / 58));
                rest %= 58;
            }
            text[place - 1] = bytes("123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz")[rest];
        }
    }

    function testFuzz_peerIdBelongsToOneDigest(bytes32 digest, uint256 place, bytes1 character) public view {
        bytes memory text = base58(bytes.concat(hex"1220", digest));
        vm.assertTrue(this.isIdOf(string(text), digest));
        vm.assertFalse(this.isIdOf(string(text), ~digest));
        vm.assertFalse(this.isIdOf(string(bytes.concat(text, "1")), digest));
        place %= text.length;
        if (text[place] == character) return;
        text[place] = character;
        vm.assertFalse(this.isIdOf(string(text), digest));
    }

    function test_otherMultihashIsNoPeerId() public view {
        bytes32 digest = sha256("x");
        vm.assertFalse(this.isIdOf(string(base58(bytes.concat(hex"1221", digest))), digest));
        vm.assertFalse(this.isIdOf(string(base58(bytes.concat(hex"1120", digest))), digest));
    }

    // ---- registration with a proof

    function test_proofIsAccepted() public {
        TestKeys.Key memory key = TestKeys.first();
        bytes memory signature = TestKeys.sign(key, registration(ANNA));
        vm.prank(ANNA);
        uint256 gas = gasleft();
        coordinator.registerPeerWithProof(key.peerId, key.publicKey, signature);
        vm.assertLt(gas - gasleft(), 300_000);
        (address account, bool proven, uint256 moves) = coordinator.getPeerBinding(key.peerId);
        vm.assertEq(account, ANNA);
        vm.assertTrue(proven);
        vm.assertEq(moves, 0);
        vm.assertEq(peersOf(ANNA)[0], key.peerId);
    }

    function test_proofForAnotherSenderChainOrContractIsNone() public {
        TestKeys.Key memory key = TestKeys.first();
        bytes memory signature = TestKeys.sign(key, registration(ANNA));
        refuseRegistration(BERT, key.peerId, key.publicKey, signature); // seen in the pool and sent first
        uint256 chain = block.chainid;
        vm.chainId(chain + 1);
        refuseRegistration(ANNA, key.peerId, key.publicKey, signature);
        vm.chainId(chain);
        coordinator = deploy();
        refuseRegistration(ANNA, key.peerId, key.publicKey, signature);
    }

    function test_proofOfAnotherKeyIsNone() public {
        TestKeys.Key memory key = TestKeys.first();
        TestKeys.Key memory other = TestKeys.second();
        bytes memory signature = TestKeys.sign(other, registration(ANNA));
        refuseRegistration(ANNA, key.peerId, other.publicKey, signature);
        refuseRegistration(ANNA, key.peerId, key.publicKey, signature);
        refuseRegistration(ANNA, "somebody", other.publicKey, signature);
        refuseRegistration(ANNA, key.peerId, "", signature);
        refuseRegistration(ANNA, key.peerId, key.publicKey, "");
    }

    function test_rebindingSignatureIsNoRegistration() public {
        TestKeys.Key memory key = TestKeys.first();
        refuseRegistration(ANNA, key.peerId, key.publicKey, TestKeys.sign(key, rebinding(key.peerId, ANNA)));
    }

    function testFuzz_anyOtherBitOfAProofSpoilsIt(uint256 bit, bool inKey) public {
        TestKeys.Key memory key = TestKeys.first();
        bytes memory signature = _signature;
        bytes memory publicKey = key.publicKey;
        bytes memory spoilt = inKey ? publicKey : signature;
        bit %= spoilt.length * 8;
        spoilt[bit / 8] ^= bytes1(uint8(1 << (bit % 8)));
        refuseRegistration(ANNA, key.peerId, publicKey, signature);
    }

    function test_proofTakesThePeerFromASquatter() public {
        TestKeys.Key memory key = TestKeys.first();
        register(SQUATTER, "his own");
        register(SQUATTER, key.peerId);
        register(SQUATTER, "another");
        vm.prank(SQUATTER);
        coordinator.submitReward(0, 0, int256(-1000), key.peerId);
        registerWithProof(ANNA, key);
        vm.assertEq(holderOf(key.peerId), ANNA);
        vm.assertEq(totalOf(key.peerId), 0);
        vm.assertEq(peersOf(SQUATTER).length, 2);
        vm.assertEq(peersOf(SQUATTER)[1], "another");

        vm.expectRevert(ISwarmCoordinator.InvalidVoterPeerId.selector);
        vm.prank(SQUATTER);
        coordinator.submitReward(0, 0, int256(1), key.peerId);
        vm.expectRevert(ISwarmCoordinator.PeerIdAlreadyRegistered.selector);
        register(SQUATTER, key.peerId);
        vm.expectRevert(ISwarmCoordinator.RewardAlreadySubmitted.selector);
        vm.prank(ANNA);
        coordinator.submitReward(0, 0, int256(7), key.peerId);
        coordinator.updateStageAndRound();
        vm.prank(ANNA);
        coordinator.submitReward(1, 0, int256(7), key.peerId);
        vm.assertEq(totalOf(key.peerId), 7);
    }

    function test_proofGivenLaterKeepsWhatTheSameAccountEarned() public {
        TestKeys.Key memory key = TestKeys.first();
        register(ANNA, key.peerId);
        vm.prank(ANNA);
        coordinator.submitReward(0, 0, int256(410), key.peerId);
        registerWithProof(ANNA, key);
        vm.assertEq(totalOf(key.peerId), 410);
        vm.assertEq(peersOf(ANNA).length, 1);
    }

    function test_provenPeerIsRegisteredByNobodyElse() public {
        TestKeys.Key memory key = TestKeys.first();
        registerWithProof(ANNA, key);
        bytes memory signature = TestKeys.sign(key, registration(BERT));
        vm.expectRevert(ISwarmCoordinator.PeerIdAlreadyRegistered.selector);
        vm.prank(BERT);
        coordinator.registerPeerWithProof(key.peerId, key.publicKey, signature);
    }

    // ---- rebinding

    function test_peerMovesBySignatureOfItsKeyAndBack() public {
        TestKeys.Key memory key = TestKeys.first();
        registerWithProof(ANNA, key);
        vm.prank(ANNA);
        coordinator.submitReward(0, 0, int256(410), key.peerId);

        bytes memory toBert = TestKeys.sign(key, rebinding(key.peerId, BERT));
        refuseRebinding(SQUATTER, key.peerId, key.publicKey, toBert);
        vm.prank(BERT);
        coordinator.rebindPeer(key.peerId, key.publicKey, toBert);
        vm.assertEq(holderOf(key.peerId), BERT);
        vm.assertEq(totalOf(key.peerId), 410);
        vm.assertEq(peersOf(ANNA).length, 0);

        bytes memory toAnna = TestKeys.sign(key, rebinding(key.peerId, ANNA));
        vm.prank(ANNA);
        coordinator.rebindPeer(key.peerId, key.publicKey, toAnna);
        refuseRebinding(BERT, key.peerId, key.publicKey, toBert); // good for one move only
        vm.assertEq(holderOf(key.peerId), ANNA);
    }

    function test_registrationSignatureMovesNothing() public {
        TestKeys.Key memory key = TestKeys.first();
        registerWithProof(ANNA, key);
        refuseRebinding(BERT, key.peerId, key.publicKey, TestKeys.sign(key, registration(BERT)));
    }

    function test_peerMovesBySignatureOfItsAccount() public {
        register(ANNA, "12D3KooW of another kind");
        bytes memory message = rebinding("12D3KooW of another kind", BERT);
        refuseRebinding(BERT, "12D3KooW of another kind", "", personalSignature(BERT_KEY, message));
        refuseRebinding(BERT, "12D3KooW of another kind", "", "");
        bytes memory signature = personalSignature(ANNA_KEY, message);
        refuseRebinding(SQUATTER, "12D3KooW of another kind", "", signature);
        vm.prank(BERT);
        coordinator.rebindPeer("12D3KooW of another kind", "", signature);
        vm.assertEq(holderOf("12D3KooW of another kind"), BERT);
        (, bool proven, uint256 moves) = coordinator.getPeerBinding("12D3KooW of another kind");
        vm.assertFalse(proven);
        vm.assertEq(moves, 1);
    }

    function test_signatureForOnePeerMovesNoOther() public {
        register(ANNA, "a");
        register(ANNA, "b");
        refuseRebinding(BERT, "b", "", personalSignature(ANNA_KEY, rebinding("a", BERT)));
    }

    function test_unprovenPeerIsNotMovedByItsKey() public {
        TestKeys.Key memory key = TestKeys.first();
        register(ANNA, key.peerId);
        refuseRebinding(BERT, key.peerId, key.publicKey, TestKeys.sign(key, rebinding(key.peerId, BERT)));
    }

    function test_moveOfNobodyOrToOneselfIsRefused() public {
        vm.expectRevert(ISwarmCoordinator.InvalidVoterPeerId.selector);
        coordinator.rebindPeer("nobody", "", "");
        register(ANNA, "a");
        vm.expectRevert(ISwarmCoordinator.PeerIdAlreadyRegistered.selector);
        vm.prank(ANNA);
        coordinator.rebindPeer("a", "", "");
    }
}
