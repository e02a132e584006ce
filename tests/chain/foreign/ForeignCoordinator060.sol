// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

/// A foreign swarm coordinator with the ABI of release 0.6.0, written from that ABI and the public rules alone, with
/// nothing of ours. A round has one stage. Tests put it behind a proxy.
contract ForeignCoordinator060 {
    bytes32 public constant OWNER_ROLE = keccak256("OWNER_ROLE");
    bytes32 public constant BOOTNODE_MANAGER_ROLE = keccak256("BOOTNODE_MANAGER_ROLE");
    bytes32 public constant STAGE_MANAGER_ROLE = keccak256("STAGE_MANAGER_ROLE");
    string public constant UPGRADE_INTERFACE_VERSION = "5.0.0";

    uint256 public currentRound;
    uint256 public currentStage;
    uint256 public uniqueVoters;
    string[] private bootnodes;
    bool private initialized;
    mapping(bytes32 => mapping(address => bool)) public hasRole;
    mapping(string => address) private holders;
    mapping(address => string[]) private peers;
    mapping(uint256 => mapping(uint256 => mapping(string => bool))) public hasSubmittedRoundStageReward;
    mapping(uint256 => mapping(uint256 => mapping(address => int256))) private rewards;
    mapping(string => int256) private totals;
    mapping(uint256 => mapping(string => string[])) private votes;
    mapping(string => uint256) public getVoterVoteCount;
    mapping(string => uint256) public getTotalWins;

    event AllBootnodesCleared(address indexed manager);
    event BootnodeRemoved(address indexed manager, uint256 index);
    event BootnodesAdded(address indexed manager, uint256 count);
    event CumulativeRewardsUpdated(address indexed account, string peerId, int256 totalRewards);
    event Initialized(uint64 version);
    event PeerRegistered(address indexed eoa, string peerId);
    event RewardSubmitted(
        address indexed account,
        uint256 indexed roundNumber,
        uint256 indexed stageNumber,
        int256 reward,
        string peerId
    );
    event RoleGranted(bytes32 indexed role, address indexed account, address indexed sender);
    event RoleRevoked(bytes32 indexed role, address indexed account, address indexed sender);
    event RoundAdvanced(uint256 indexed newRoundNumber);
    event StageAdvanced(uint256 indexed roundNumber, uint256 newStage);
    event Upgraded(address indexed implementation);
    event WinnerSubmitted(address indexed account, string peerId, uint256 indexed roundNumber, string[] winners);

    error AddressEmptyCode(address target);
    error ERC1967InvalidImplementation(address implementation);
    error ERC1967NonPayable();
    error FailedCall();
    error InvalidBootnodeIndex();
    error InvalidInitialization();
    error InvalidRoundNumber();
    error InvalidStageNumber();
    error InvalidVote();
    error InvalidVoterPeerId();
    error NotInitializing();
    error OnlyBootnodeManager();
    error OnlyOwner();
    error OnlyStageManager();
    error PeerIdAlreadyRegistered();
    error RewardAlreadySubmitted();
    error StageOutOfBounds();
    error UUPSUnauthorizedCallContext();
    error UUPSUnsupportedProxiableUUID(bytes32 slot);
    error WinnerAlreadyVoted();

    function initialize(address owner_) external {
        if (initialized) revert InvalidInitialization();
        initialized = true;
        hasRole[OWNER_ROLE][owner_] = true;
        hasRole[BOOTNODE_MANAGER_ROLE][owner_] = true;
        hasRole[STAGE_MANAGER_ROLE][owner_] = true;
        emit Initialized(1);
    }

    function proxiableUUID() external pure returns (bytes32) {
        revert UUPSUnauthorizedCallContext();
    }

    function upgradeToAndCall(address, bytes calldata) external payable {
        revert UUPSUnauthorizedCallContext();
    }

    function grantRole(bytes32 role, address account) external {
        if (!hasRole[OWNER_ROLE][msg.sender]) revert OnlyOwner();
        hasRole[role][account] = true;
        emit RoleGranted(role, account, msg.sender);
    }

    function revokeRole(bytes32 role, address account) external {
        if (!hasRole[OWNER_ROLE][msg.sender]) revert OnlyOwner();
        hasRole[role][account] = false;
        emit RoleRevoked(role, account, msg.sender);
    }

    function stageCount() public pure returns (uint256) {
        return 1;
    }

    function updateStageAndRound() external returns (uint256, uint256) {
        if (!hasRole[STAGE_MANAGER_ROLE][msg.sender]) revert OnlyStageManager();
        if (++currentStage == stageCount()) {
            currentStage = 0;
            emit RoundAdvanced(++currentRound);
        }
        emit StageAdvanced(currentRound, currentStage);
        return (currentRound, currentStage);
    }

    function registerPeer(string calldata peerId) external {
        if (holders[peerId] != address(0)) revert PeerIdAlreadyRegistered();
        holders[peerId] = msg.sender;
        peers[msg.sender].push(peerId);
        emit PeerRegistered(msg.sender, peerId);
    }

    function getEoa(string[] calldata peerIds) external view returns (address[] memory eoas) {
        eoas = new address[](peerIds.length);
        for (uint256 i = 0; i < peerIds.length; i++) eoas[i] = holders[peerIds[i]];
    }

    function getPeerId(address[] calldata eoas) external view returns (string[][] memory peerIds) {
        peerIds = new string[][](eoas.length);
        for (uint256 i = 0; i < eoas.length; i++) peerIds[i] = peers[eoas[i]];
    }

    modifier onlyBootnodeManager() {
        if (!hasRole[BOOTNODE_MANAGER_ROLE][msg.sender]) revert OnlyBootnodeManager();
        _;
    }

    function addBootnodes(string[] calldata newBootnodes) external onlyBootnodeManager {
        for (uint256 i = 0; i < newBootnodes.length; i++) bootnodes.push(newBootnodes[i]);
        emit BootnodesAdded(msg.sender, newBootnodes.length);
    }

    function removeBootnode(uint256 index) external onlyBootnodeManager {
        if (index >= bootnodes.length) revert InvalidBootnodeIndex();
        bootnodes[index] = bootnodes[bootnodes.length - 1];
        bootnodes.pop();
        emit BootnodeRemoved(msg.sender, index);
    }

    function clearBootnodes() external onlyBootnodeManager {
        delete bootnodes;
        emit AllBootnodesCleared(msg.sender);
    }

    function getBootnodes() external view returns (string[] memory) {
        return bootnodes;
    }

    function getBootnodesCount() external view returns (uint256) {
        return bootnodes.length;
    }

    function submitReward(uint256 roundNumber, uint256 stageNumber, int256 reward, string calldata peerId) external {
        take(roundNumber, stageNumber, reward, peerId);
    }

    function submitReward(uint256 roundNumber, uint256 stageNumber, uint256 reward, string calldata peerId) external {
        take(roundNumber, stageNumber, int256(reward), peerId);
    }

    function take(uint256 roundNumber, uint256 stageNumber, int256 reward, string calldata peerId) private {
        if (roundNumber > currentRound) revert InvalidRoundNumber();
        if (stageNumber >= stageCount()) revert InvalidStageNumber();
        if (holders[peerId] != msg.sender) revert InvalidVoterPeerId();
        if (hasSubmittedRoundStageReward[roundNumber][stageNumber][peerId]) revert RewardAlreadySubmitted();
        hasSubmittedRoundStageReward[roundNumber][stageNumber][peerId] = true;
        rewards[roundNumber][stageNumber][msg.sender] += reward;
        totals[peerId] += reward;
        emit RewardSubmitted(msg.sender, roundNumber, stageNumber, reward, peerId);
        emit CumulativeRewardsUpdated(msg.sender, peerId, totals[peerId]);
    }

    function getRoundStageReward(uint256 roundNumber, uint256 stageNumber, address[] calldata accounts)
        external
        view
        returns (int256[] memory found)
    {
        found = new int256[](accounts.length);
        for (uint256 i = 0; i < accounts.length; i++) found[i] = rewards[roundNumber][stageNumber][accounts[i]];
    }

    function getTotalRewards(string[] calldata peerIds) external view returns (int256[] memory found) {
        found = new int256[](peerIds.length);
        for (uint256 i = 0; i < peerIds.length; i++) found[i] = totals[peerIds[i]];
    }

    function submitWinners(uint256 roundNumber, string[] calldata chosen, string calldata peerId) external {
        if (roundNumber > currentRound) revert InvalidRoundNumber();
        if (holders[peerId] != msg.sender) revert InvalidVoterPeerId();
        if (votes[roundNumber][peerId].length > 0) revert WinnerAlreadyVoted();
        for (uint256 i = 0; i < chosen.length; i++) {
            for (uint256 j = 0; j < i; j++) {
                if (keccak256(bytes(chosen[i])) == keccak256(bytes(chosen[j]))) revert InvalidVote();
            }
            votes[roundNumber][peerId].push(chosen[i]);
            getTotalWins[chosen[i]]++;
        }
        if (getVoterVoteCount[peerId]++ == 0) uniqueVoters++;
        emit WinnerSubmitted(msg.sender, peerId, roundNumber, chosen);
    }

    function getVoterVotes(uint256 roundNumber, string calldata peerId) external view returns (string[] memory) {
        return votes[roundNumber][peerId];
    }
}
