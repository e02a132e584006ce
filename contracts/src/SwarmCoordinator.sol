// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import {ECDSA} from "@openzeppelin/contracts/utils/cryptography/ECDSA.sol";
import {MessageHashUtils} from "@openzeppelin/contracts/utils/cryptography/MessageHashUtils.sol";
import {Administration} from "./Administration.sol";
import {PeerKey} from "./PeerKey.sol";
import {Ranking} from "./Ranking.sol";

/// The books of one swarm: which round it is, who takes part, what was earned, who voted for whom, where to join.
///
/// Answers the ABIs of the existing swarm coordinator, releases 0.4.2 to 0.6.0. What is new is under "Beyond that ABI".
///   * A reward is accepted for the current round or an earlier one, once per (round, stage, peer), and only for a stage
///     that the contract has.
///   * A vote names at least one peer, none twice, and is final per (round, peer). A vote for oneself is accepted,
///     recorded in `getVoterVotes` and counts as having voted, but is never a win. The existing swarm's contracts count
///     it, and their clients vote for themselves when they heard nobody; here wins rank peers by what others say, and
///     a peer that hears nobody must not climb by that.
///   * A peer id is its key's: a registration with a proof takes it from an account that registered it without one.
///   * The implementation can't be initialised, hence nobody can own it; only the proxy in front of it can.
contract SwarmCoordinator is Administration {
    using Ranking for Ranking.List;

    struct Peer {
        string id;
        address account; // zero: named in a vote, not registered
        uint40 place; // where it stands in its account's list
        uint40 moves; // how often it went from one account to another
        bool proven; // its account showed that it holds the peer's key
        int256 totalReward;
    }

    /// One storage slot. `value` may be a sum over the peers of one account, so it is wider than one reward.
    struct Reward {
        int248 value;
        bool submitted;
    }

    uint256 private constant MAX_PEER_ID_BYTES = 128;

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

    // Beyond the ABI of 0.4.2.
    event PeerProven(address indexed account, string peerId);
    event PeerClaimed(address indexed account, address indexed previous, string peerId);
    event PeerRebound(address indexed account, address indexed previous, string peerId);

    error InvalidPeerId();
    error InvalidProof();
    error InvalidOwner();
    error RewardOutOfRange();

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

    // ---- peers

    function registerPeer(string calldata peerId) external {
        uint256 number = _numberFor(peerId);
        Peer storage peer = _peers[number - 1];
        if (peer.account != address(0)) revert PeerIdAlreadyRegistered();
        _bind(number, msg.sender);
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

    /// Whether this very peer has submitted: the form of release 0.6.0.
    function hasSubmittedRoundStageReward(uint256 roundNumber, uint256 stageNumber, string calldata peerId)
        external
        view
        returns (bool)
    {
        return _rewards[roundNumber][stageNumber][_numbers[peerId]].submitted;
    }

    function getTotalRewards(string[] calldata peerIds) external view returns (int256[] memory rewards) {
        rewards = new int256[](peerIds.length);
        for (uint256 i = 0; i < peerIds.length; i++) {
            uint256 number = _numbers[peerIds[i]];
            if (number != 0) rewards[i] = _peers[number - 1].totalReward;
        }
    }

    // ---- votes

    /// Records the peer's vote. Its own id may be among `winners`, and is not counted as a win.
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
        return "hivewright/3";
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

    /// As `registerPeer`, with the proof that the sender is who the peer's key says: its signature over
    /// "hivewright/registration/1\n", chain id (32 bytes), this contract (20) and the sender (20).
    ///
    /// Takes the peer from an account that has no such proof. What that account earned with it no longer counts as the
    /// peer's, but stays submitted: no round is credited twice.
    function registerPeerWithProof(string calldata peerId, bytes calldata publicKey, bytes calldata signature)
        external
    {
        uint256 number = _numberFor(peerId);
        Peer storage peer = _peers[number - 1];
        if (peer.proven) revert PeerIdAlreadyRegistered();
        bytes memory message = abi.encodePacked("hivewright/registration/1\n", block.chainid, address(this), msg.sender);
        if (!PeerKey.signed(peerId, publicKey, message, signature)) revert InvalidProof();
        peer.proven = true;
        address previous = peer.account;
        if (previous != msg.sender) _bind(number, msg.sender);
        if (previous != msg.sender && previous != address(0)) {
            peer.totalReward = 0;
            emit CumulativeRewardsUpdated(msg.sender, peerId, 0);
            emit PeerClaimed(msg.sender, previous, peerId);
        }
        emit PeerProven(msg.sender, peerId);
    }

    /// Moves a peer, with all that it earned, to the sender. Both have to agree: the sender by sending this, the peer by
    /// a signature of its key (a proven peer), or of the account that holds it (`publicKey` empty; a personal message),
    /// over "hivewright/rebinding/1\n", chain id (32 bytes), this contract (20), the sender (20), the number of moves
    /// so far (32) and the peer id.
    function rebindPeer(string calldata peerId, bytes calldata publicKey, bytes calldata signature) external {
        uint256 number = _numbers[peerId];
        if (number == 0 || _peers[number - 1].account == address(0)) revert InvalidVoterPeerId();
        Peer storage peer = _peers[number - 1];
        address previous = peer.account;
        if (previous == msg.sender) revert PeerIdAlreadyRegistered();
        bytes memory message = abi.encodePacked(
            "hivewright/rebinding/1\n", block.chainid, address(this), msg.sender, uint256(peer.moves), peerId
        );
        bool agreed = publicKey.length == 0
            ? _signedBy(previous, message, signature)
            : peer.proven && PeerKey.signed(peerId, publicKey, message, signature);
        if (!agreed) revert InvalidProof();
        _bind(number, msg.sender);
        emit PeerRebound(msg.sender, previous, peerId);
    }

    /// Whose the peer is, whether by proof, and how often it moved. All zero for a peer that nobody registered.
    function getPeerBinding(string calldata peerId) external view returns (address account, bool proven, uint256 moves) {
        uint256 number = _numbers[peerId];
        if (number == 0) return (address(0), false, 0);
        Peer storage peer = _peers[number - 1];
        return (peer.account, peer.proven, peer.moves);
    }

    // ----

    /// The peer's number; a peer that is not known yet gets one.
    function _numberFor(string calldata peerId) private returns (uint256 number) {
        number = _numbers[peerId];
        if (number != 0) return number;
        if (bytes(peerId).length == 0 || bytes(peerId).length > MAX_PEER_ID_BYTES) revert InvalidPeerId();
        _peers.push().id = peerId;
        number = _peers.length;
        _numbers[peerId] = number;
    }

    /// Makes the account the peer's holder, whoever was it before.
    function _bind(uint256 number, address account) private {
        Peer storage peer = _peers[number - 1];
        if (peer.account != address(0)) {
            _unlist(number, peer);
            peer.moves++;
        }
        uint256[] storage list = _peersOf[account];
        peer.account = account;
        peer.place = uint40(list.length);
        list.push(number);
        emit PeerRegistered(account, peer.id);
    }

    /// Takes the peer from its account's list; the last one of the list gets its place.
    function _unlist(uint256 number, Peer storage peer) private {
        uint256[] storage list = _peersOf[peer.account];
        uint256 place = peer.place;
        if (list[place] != number) {
            // Registered with version 1, which noted no places.
            for (place = 0; list[place] != number;) place++;
        }
        uint256 last = list[list.length - 1];
        list[place] = last;
        _peers[last - 1].place = uint40(place);
        list.pop();
    }

    function _signedBy(address account, bytes memory message, bytes calldata signature) private pure returns (bool) {
        (address signer, ECDSA.RecoverError problem,) =
            ECDSA.tryRecover(MessageHashUtils.toEthSignedMessageHash(message), signature);
        return problem == ECDSA.RecoverError.NoError && signer == account;
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
