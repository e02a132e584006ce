// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import {UUPSUpgradeable} from "@openzeppelin/contracts-upgradeable/proxy/utils/UUPSUpgradeable.sol";
import {Ranking} from "./Ranking.sol";

/// The books of one swarm: which round it is, who takes part, what was earned, who voted for whom, where to join.
///
/// Answers to the ABI of the existing swarm coordinator 0.4.2. What is new stands under "Beyond that ABI".
///   * A reward is accepted for the current round or an earlier one, once per (round, stage, peer), and only for a stage
///     that the contract has.
///   * A vote names at least one peer, none twice, and stands once per (round, peer). A vote for oneself is recorded
///     but never counts as a win: wins are what others say.
///   * The implementation can't be initialised, hence nobody can own it; only the proxy in front of it can.
contract SwarmCoordinator is UUPSUpgradeable {
    using Ranking for Ranking.List;

    struct Peer {
        string id;
        address account; // zero: named in a vote, not registered
        int256 totalReward;
    }

    /// One storage slot. `value` may be a sum over the peers of one account, so it is wider than one reward.
    struct Reward {
        int248 value;
        bool submitted;
    }

    bytes32 public constant OWNER_ROLE = keccak256("OWNER_ROLE");
    bytes32 public constant BOOTNODE_MANAGER_ROLE = keccak256("BOOTNODE_MANAGER_ROLE");
    bytes32 public constant STAGE_MANAGER_ROLE = keccak256("STAGE_MANAGER_ROLE");
    uint256 private constant MAX_PEER_ID_BYTES = 128;

    uint256 public currentRound;
    uint256 public currentStage;
    mapping(bytes32 role => mapping(address account => bool)) private _roles;
    string[] private _bootnodes;

    // Everywhere below a peer is its number: the index in `_peers` plus one. 0: unknown.
    Peer[] private _peers;
    mapping(string peerId => uint256) private _numbers;
    mapping(address account => uint256[]) private _peersOf;

    mapping(uint256 round => mapping(uint256 stage => mapping(uint256 peer => Reward))) private _rewards;
    mapping(uint256 round => mapping(uint256 stage => mapping(address account => Reward))) private _accountRewards;

    mapping(uint256 round => mapping(uint256 peer => string[])) private _votes;
    mapping(uint256 round => mapping(uint256 peer => uint256)) private _votesFor;
    Ranking.List private _voters;
    Ranking.List private _winners;

    uint256[40] private __gap; // room for later versions

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

    // Beyond that ABI.
    error InvalidPeerId();
    error InvalidOwner();
    error RewardOutOfRange();
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

    constructor() {
        _disableInitializers();
    }

    /// Called by the proxy's constructor. `owner_` gets all three roles.
    function initialize(address owner_) external initializer {
        if (owner_ == address(0)) revert InvalidOwner();
        _grant(OWNER_ROLE, owner_);
        _grant(BOOTNODE_MANAGER_ROLE, owner_);
        _grant(STAGE_MANAGER_ROLE, owner_);
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

    // ---- peers

    function registerPeer(string calldata peerId) external {
        uint256 number = _numberFor(peerId);
        Peer storage peer = _peers[number - 1];
        if (peer.account != address(0)) revert PeerIdAlreadyRegistered();
        peer.account = msg.sender;
        _peersOf[msg.sender].push(number);
        emit PeerRegistered(msg.sender, peerId);
    }

    function getEoa(string[] calldata peerIds) external view returns (address[] memory accounts) {
        accounts = new address[](peerIds.length);
        for (uint256 i = 0; i < peerIds.length; i++) {
            uint256 number = _numbers[peerIds[i]];
            if (number != 0) accounts[i] = _peers[number - 1].account;
        }
    }

    function getPeerId(address[] calldata eoas) external view returns (string[][] memory peerIds) {
        peerIds = new string[][](eoas.length);
        for (uint256 i = 0; i < eoas.length; i++) peerIds[i] = _ids(_peersOf[eoas[i]]);
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

    // ---- rewards

    function submitReward(uint256 roundNumber, uint256 stageNumber, int256 reward, string calldata peerId) external {
        _submitReward(roundNumber, stageNumber, reward, peerId);
    }

    /// The form that newer clients of the existing swarm use.
    function submitReward(uint256 roundNumber, uint256 stageNumber, uint256 reward, string calldata peerId) external {
        if (reward > uint256(type(int256).max)) revert RewardOutOfRange();
        _submitReward(roundNumber, stageNumber, int256(reward), peerId);
    }

    /// Per account, the sum over its peers.
    function getRoundStageReward(uint256 roundNumber, uint256 stageNumber, address[] calldata accounts)
        external
        view
        returns (int256[] memory rewards)
    {
        rewards = new int256[](accounts.length);
        for (uint256 i = 0; i < accounts.length; i++) {
            rewards[i] = _accountRewards[roundNumber][stageNumber][accounts[i]].value;
        }
    }

    /// Whether any peer of `account` has submitted.
    function hasSubmittedRoundStageReward(uint256 roundNumber, uint256 stageNumber, address account)
        external
        view
        returns (bool)
    {
        return _accountRewards[roundNumber][stageNumber][account].submitted;
    }

    function getTotalRewards(string[] calldata peerIds) external view returns (int256[] memory rewards) {
        rewards = new int256[](peerIds.length);
        for (uint256 i = 0; i < peerIds.length; i++) {
            uint256 number = _numbers[peerIds[i]];
            if (number != 0) rewards[i] = _peers[number - 1].totalReward;
        }
    }

    // ---- votes

    function submitWinners(uint256 roundNumber, string[] calldata winners, string calldata peerId) external {
        if (roundNumber > currentRound) revert InvalidRoundNumber();
        uint256 voter = _ownPeer(peerId);
        string[] storage votes = _votes[roundNumber][voter];
        if (votes.length != 0) revert WinnerAlreadyVoted();
        if (winners.length == 0) revert InvalidVote();
        uint256[] memory chosen = new uint256[](winners.length);
        for (uint256 i = 0; i < winners.length; i++) {
            chosen[i] = _numberFor(winners[i]);
            for (uint256 j = 0; j < i; j++) {
                if (chosen[j] == chosen[i]) revert InvalidVote();
            }
            votes.push(winners[i]);
            if (chosen[i] == voter) continue;
            _votesFor[roundNumber][chosen[i]]++;
            _winners.raise(chosen[i]);
        }
        _voters.raise(voter);
        emit WinnerSubmitted(msg.sender, peerId, roundNumber, winners);
    }

    function getVoterVotes(uint256 roundNumber, string calldata peerId) external view returns (string[] memory) {
        return _votes[roundNumber][_numbers[peerId]];
    }

    /// In how many rounds the peer voted.
    function getVoterVoteCount(string calldata peerId) external view returns (uint256) {
        return _voters.scoreOf(_numbers[peerId]);
    }

    /// How many others voted for the peer in the round.
    function getPeerVoteCount(uint256 roundNumber, string calldata peerId) external view returns (uint256) {
        return _votesFor[roundNumber][_numbers[peerId]];
    }

    /// How often others voted for the peer, over all rounds.
    function getTotalWins(string calldata peerId) external view returns (uint256) {
        return _winners.scoreOf(_numbers[peerId]);
    }

    function uniqueVoters() external view returns (uint256) {
        return _voters.order.length;
    }

    function uniqueVotedPeers() external view returns (uint256) {
        return _winners.order.length;
    }

    /// Places `start` to `end` (not included), best first, cut to those that exist.
    function voterLeaderboard(uint256 start, uint256 end)
        external
        view
        returns (string[] memory peerIds, uint256[] memory voteCounts)
    {
        return _leaderboard(_voters, start, end);
    }

    /// Places `start` to `end` (not included), best first, cut to those that exist.
    function winnerLeaderboard(uint256 start, uint256 end)
        external
        view
        returns (string[] memory peerIds, uint256[] memory wins)
    {
        return _leaderboard(_winners, start, end);
    }

    // ---- Beyond that ABI

    /// Tells clients that what follows is there.
    function version() external pure returns (string memory) {
        return "hivewright/1";
    }

    /// As `updateStageAndRound`, on the condition that the round still is `expectedRound`: two keepers can't end one
    /// round twice.
    function advanceRound(uint256 expectedRound) external onlyStageManager returns (uint256, uint256) {
        if (currentRound != expectedRound) revert RoundMovedOn(currentRound);
        return _advance();
    }

    /// Removes a bootnode by its text, wherever it stands by now. Nothing happens if it is not listed.
    function withdrawBootnode(string calldata bootnode) external onlyBootnodeManager {
        bytes32 wanted = keccak256(bytes(bootnode));
        for (uint256 i = _bootnodes.length; i > 0; i--) {
            if (keccak256(bytes(_bootnodes[i - 1])) == wanted) _removeBootnode(i - 1);
        }
    }

    /// What one peer submitted; getRoundStageReward only knows accounts.
    function getPeerReward(uint256 roundNumber, uint256 stageNumber, string calldata peerId)
        external
        view
        returns (bool submitted, int256 reward)
    {
        Reward storage entry = _rewards[roundNumber][stageNumber][_numbers[peerId]];
        return (entry.submitted, entry.value);
    }

    // ----

    function _authorizeUpgrade(address) internal view override onlyOwner {}

    function _grant(bytes32 role, address account) private {
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

    /// The peer's number; a peer that is not known yet gets one.
    function _numberFor(string calldata peerId) private returns (uint256 number) {
        number = _numbers[peerId];
        if (number != 0) return number;
        if (bytes(peerId).length == 0 || bytes(peerId).length > MAX_PEER_ID_BYTES) revert InvalidPeerId();
        _peers.push().id = peerId;
        number = _peers.length;
        _numbers[peerId] = number;
    }

    function _ownPeer(string calldata peerId) private view returns (uint256 number) {
        number = _numbers[peerId];
        if (number == 0 || _peers[number - 1].account != msg.sender) revert InvalidVoterPeerId();
    }

    function _submitReward(uint256 roundNumber, uint256 stageNumber, int256 reward, string calldata peerId) private {
        if (roundNumber > currentRound) revert InvalidRoundNumber();
        uint256 stages = roundNumber == currentRound ? currentStage + 1 : stageCount();
        if (stageNumber >= stages) revert InvalidStageNumber();
        uint256 number = _ownPeer(peerId);
        Reward storage entry = _rewards[roundNumber][stageNumber][number];
        if (entry.submitted) revert RewardAlreadySubmitted();
        if (reward != int256(int128(reward))) revert RewardOutOfRange();

        entry.submitted = true;
        entry.value = int248(reward);
        Reward storage sum = _accountRewards[roundNumber][stageNumber][msg.sender];
        sum.submitted = true;
        sum.value += int248(reward);
        Peer storage peer = _peers[number - 1];
        peer.totalReward += reward;
        emit RewardSubmitted(msg.sender, roundNumber, stageNumber, reward, peerId);
        emit CumulativeRewardsUpdated(msg.sender, peerId, peer.totalReward);
    }

    function _ids(uint256[] memory numbers) private view returns (string[] memory ids) {
        ids = new string[](numbers.length);
        for (uint256 i = 0; i < numbers.length; i++) ids[i] = _peers[numbers[i] - 1].id;
    }

    function _leaderboard(Ranking.List storage list, uint256 start, uint256 end)
        private
        view
        returns (string[] memory ids, uint256[] memory scores)
    {
        uint256[] memory members = list.page(start, end);
        ids = _ids(members);
        scores = new uint256[](members.length);
        for (uint256 i = 0; i < members.length; i++) scores[i] = list.scoreOf(members[i]);
    }
}
