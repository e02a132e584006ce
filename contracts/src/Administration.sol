// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import {UUPSUpgradeable} from "@openzeppelin/contracts-upgradeable/proxy/utils/UUPSUpgradeable.sol";
import {ISwarmCoordinator} from "./ISwarmCoordinator.sol";

/// What a swarm's managers do: roles, rounds, bootnodes, upgrades. Its variables come before all others.
abstract contract Administration is ISwarmCoordinator, UUPSUpgradeable {
    bytes32 public constant OWNER_ROLE = keccak256("OWNER_ROLE");
    bytes32 public constant BOOTNODE_MANAGER_ROLE = keccak256("BOOTNODE_MANAGER_ROLE");
    bytes32 public constant STAGE_MANAGER_ROLE = keccak256("STAGE_MANAGER_ROLE");

    uint256 public currentRound;
    uint256 public currentStage;
    mapping(bytes32 role => mapping(address account => bool)) private _roles;
    string[] private _bootnodes;

    // Beyond the ABI of 0.4.2.
    error RoundMovedOn(uint256 round);

    modifier onlyOwner() {
        if (!hasRole(OWNER_ROLE, msg.sender)) revert OnlyOwner();
        _;
    }

    modifier onlyBootnodeManager() {
        if (!hasRole(BOOTNODE_MANAGER_ROLE, msg.sender)) revert OnlyBootnodeManager();
        _;
    }

    modifier onlyStageManager() {
        if (!hasRole(STAGE_MANAGER_ROLE, msg.sender)) revert OnlyStageManager();
        _;
    }

    // ---- roles

    function grantRole(bytes32 role, address account) external onlyOwner {
        if (!hasRole(role, account)) _grant(role, account);
    }

    function revokeRole(bytes32 role, address account) external onlyOwner {
        if (!hasRole(role, account)) return;
        _roles[role][account] = false;
        emit RoleRevoked(role, account, msg.sender);
    }

    function hasRole(bytes32 role, address account) public view returns (bool) {
        return _roles[role][account];
    }

    // ---- rounds and stages

    /// A round has one stage.
    function stageCount() public pure returns (uint256) {
        return 1;
    }

    function updateStageAndRound() external onlyStageManager returns (uint256, uint256) {
        return _advance();
    }

    /// As `updateStageAndRound`, on the condition that the round still is `expectedRound`: two keepers can't end one
    /// round twice.
    function advanceRound(uint256 expectedRound) external onlyStageManager returns (uint256, uint256) {
        if (currentRound != expectedRound) revert RoundMovedOn(currentRound);
        return _advance();
    }

    // ---- bootnodes

    function addBootnodes(string[] calldata newBootnodes) external onlyBootnodeManager {
        for (uint256 i = 0; i < newBootnodes.length; i++) _bootnodes.push(newBootnodes[i]);
        emit BootnodesAdded(msg.sender, newBootnodes.length);
    }

    /// The last bootnode takes the place of the removed one.
    function removeBootnode(uint256 index) external onlyBootnodeManager {
        if (index >= _bootnodes.length) revert InvalidBootnodeIndex();
        _removeBootnode(index);
    }

    function clearBootnodes() external onlyBootnodeManager {
        delete _bootnodes;
        emit AllBootnodesCleared(msg.sender);
    }

    function getBootnodes() external view returns (string[] memory) {
        return _bootnodes;
    }

    function getBootnodesCount() external view returns (uint256) {
        return _bootnodes.length;
    }

    /// Removes a bootnode by its text, wherever it stands by now. Nothing happens if it is not listed.
    function withdrawBootnode(string calldata bootnode) external onlyBootnodeManager {
        bytes32 wanted = keccak256(bytes(bootnode));
        for (uint256 i = _bootnodes.length; i > 0; i--) {
            if (keccak256(bytes(_bootnodes[i - 1])) == wanted) _removeBootnode(i - 1);
        }
    }

    // ----

    function _authorizeUpgrade(address) internal view override onlyOwner {}

    function _grant(bytes32 role, address account) internal {
        _roles[role][account] = true;
        emit RoleGranted(role, account, msg.sender);
    }

    function _advance() private returns (uint256, uint256) {
        if (currentStage >= stageCount()) revert StageOutOfBounds();
        currentStage++;
        if (currentStage == stageCount()) {
            currentStage = 0;
            currentRound++;
            emit RoundAdvanced(currentRound);
        }
        emit StageAdvanced(currentRound, currentStage);
        return (currentRound, currentStage);
    }

    function _removeBootnode(uint256 index) private {
        uint256 last = _bootnodes.length - 1;
        if (index != last) _bootnodes[index] = _bootnodes[last];
        _bootnodes.pop();
        emit BootnodeRemoved(msg.sender, index);
    }
}
