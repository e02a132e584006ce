// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import {ERC1967Proxy} from "@openzeppelin/contracts/proxy/ERC1967/ERC1967Proxy.sol";
import {SwarmCoordinator} from "../src/SwarmCoordinator.sol";
import {TestKeys} from "./TestKeys.sol";

/// What these tests use of forge.
interface Vm {
    function addr(uint256 privateKey) external pure returns (address);
    function assertEq(address left, address right) external pure;
    function assertEq(int256 left, int256 right) external pure;
    function assertEq(string calldata left, string calldata right) external pure;
    function assertEq(uint256 left, uint256 right) external pure;
    function assertFalse(bool condition) external pure;
    function assertLt(uint256 left, uint256 right) external pure;
    function assertTrue(bool condition) external pure;
    function assertTrue(bool condition, string calldata reason) external pure;
    function assume(bool condition) external pure;
    function chainId(uint256 id) external;
    function expectRevert(bytes calldata data) external;
    function expectRevert(bytes4 selector) external;
    function prank(address sender) external;
    function sign(uint256 privateKey, bytes32 digest) external pure returns (uint8 v, bytes32 r, bytes32 s);
    function toString(uint256 number) external pure returns (string memory);
    function warp(uint256 timestamp) external;
}

Vm constant vm = Vm(address(uint160(uint256(keccak256("hevm cheat code")))));

/// A coordinator behind its proxy, owned by the test, and messages as a client makes them.
abstract contract Fixture {
    SwarmCoordinator internal coordinator;

    function setUp() public virtual {
        coordinator = deploy();
    }

    function deploy() internal returns (SwarmCoordinator) {
        bytes memory initialise = abi.encodeCall(SwarmCoordinator.initialize, (address(this)));
        return SwarmCoordinator(address(new ERC1967Proxy(address(new SwarmCoordinator()), initialise)));
    }

    function register(address account, string memory peerId) internal {
        vm.prank(account);
        coordinator.registerPeer(peerId);
    }

    function holderOf(string memory peerId) internal view returns (address) {
        string[] memory ids = new string[](1);
        ids[0] = peerId;
        return coordinator.getEoa(ids)[0];
    }

    function totalOf(string memory peerId) internal view returns (int256) {
        string[] memory ids = new string[](1);
        ids[0] = peerId;
        return coordinator.getTotalRewards(ids)[0];
    }

    function peersOf(address account) internal view returns (string[] memory) {
        address[] memory accounts = new address[](1);
        accounts[0] = account;
        return coordinator.getPeerId(accounts)[0];
    }

    function registration(address account) internal view returns (bytes memory) {
        return abi.encodePacked("hivewright/registration/1\n", block.chainid, address(coordinator), account);
    }

    function rebinding(string memory peerId, address account) internal view returns (bytes memory) {
        (,, uint256 moves) = coordinator.getPeerBinding(peerId);
        return abi.encodePacked(
            "hivewright/rebinding/1\n", block.chainid, address(coordinator), account, moves, peerId
        );
    }

    function registerWithProof(address account, TestKeys.Key memory key) internal {
        bytes memory signature = TestKeys.sign(key, registration(account));
        vm.prank(account);
        coordinator.registerPeerWithProof(key.peerId, key.publicKey, signature);
    }

    /// Of an account, as wallets sign messages.
    function personalSignature(uint256 privateKey, bytes memory message) internal pure returns (bytes memory) {
        bytes memory prefix = bytes.concat("\x19Ethereum Signed Message:\n", bytes(vm.toString(message.length)));
        (uint8 v, bytes32 r, bytes32 s) = vm.sign(privateKey, keccak256(bytes.concat(prefix, message)));
        return abi.encodePacked(r, s, v);
    }
}
