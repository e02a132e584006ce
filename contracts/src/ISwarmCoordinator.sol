// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

/// Events and errors of the existing swarm coordinator 0.4.2, word for word: its clients know them.
interface ISwarmCoordinator {
    event StageAdvanced(uint256 indexed roundNumber, uint256 newStage);
    event RoundAdvanced(uint256 indexed newRoundNumber);
    event PeerRegistered(address indexed eoa, string peerId);
    event BootnodesAdded(address indexed manager, uint256 count);
    event BootnodeRemoved(address indexed manager, uint256 index);
    event AllBootnodesCleared(address indexed manager);
    event RewardSubmitted(
        address indexed account,
        uint256 indexed roundNumber,
        uint256 indexed stageNumber,
        int256 reward,
        string peerId
    );
    event CumulativeRewardsUpdated(address indexed account, string peerId, int256 totalRewards);
    event WinnerSubmitted(address indexed account, string peerId, uint256 indexed roundNumber, string[] winners);
    event RoleGranted(bytes32 indexed role, address indexed account, address indexed sender);
    event RoleRevoked(bytes32 indexed role, address indexed account, address indexed sender);

    error OnlyOwner();
    error OnlyBootnodeManager();
    error OnlyStageManager();
    error StageOutOfBounds();
    error InvalidStageNumber();
    error InvalidRoundNumber();
    error InvalidVote();
    error InvalidVoterPeerId();
    error InvalidBootnodeIndex();
    error PeerIdAlreadyRegistered();
    error RewardAlreadySubmitted();
    error WinnerAlreadyVoted();
}
