// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import {OwnableUpgradeable} from "@openzeppelin/contracts-upgradeable/access/OwnableUpgradeable.sol";
import {UUPSUpgradeable} from "@openzeppelin/contracts-upgradeable/proxy/utils/UUPSUpgradeable.sol";
import {Math} from "@openzeppelin/contracts/utils/math/Math.sol";

/// The part of a swarm's coordinator that the market reads, in any release of it.
interface ISwarm {
    function getEoa(string[] calldata peerIds) external view returns (address[] memory);
    function hasRole(bytes32 role, address account) external view returns (bool);
}

/// Games in which the peers of a swarm bet on the answer to a question whose clues come round by round.
///
/// Has the ABI of the existing prediction market. What is new is under "Beyond that ABI"; docs/prediction-market.md
/// explains the rule with an example.
///   * The owner is the judge. The swarm's owner, by the coordinator's OWNER_ROLE, may upgrade the contract.
///   * Shares of a choice cost bet tokens by C(q) = sqrt(sum of q_i^2). Every game opens with OPENING shares of each
///     choice, so that the first prices are equal; they belong to everybody who bets, by the tokens that they bet. All
///     tokens are shared out by the shares of the right choice: nothing is paid that was not put in, and with few
///     shares nobody takes much of it. If nobody bet on the right choice, this gives all back.
///   * The price of a choice never falls, so an earlier bet on it buys at least as many shares for a token as a later one.
///   * All numbers are whole and all rounding is against the bettor.
///   * The answer is committed before the first bet and revealed after the last: a reveal can't be front-run.
///   * A judge that does not act for JUDGE_SECONDS loses the game: nothing can be revealed any more, and everybody gets
///     back what they put in.
contract PredictionMarket is OwnableUpgradeable, UUPSUpgradeable {
    enum Status {
        Unknown,
        Open, // bets are taken
        Closed, // the last round is over, the answer is not revealed
        Settled,
        Cancelled
    }

    /// Tokens as of the last epoch in which they changed; each later epoch has a grant of its own, which is not saved up.
    struct Balance {
        uint128 tokens;
        uint64 epoch; // plus one; 0: never
    }

    struct Choice {
        uint128 supply; // with OPENING
        uint128 highestPrice;
    }

    struct Guess {
        uint32 choice; // plus one; 0: none
        uint96 bet;
        uint128 shares;
    }

    struct Account {
        uint128 stake;
        bool claimed;
        mapping(uint256 choice => uint256) shares;
        mapping(uint256 round => Guess) guesses;
    }

    struct Game {
        bytes32 commitment;
        uint32 roundCount;
        uint32 choiceCount;
        uint32 round;
        uint32 correctChoice;
        uint40 deadline;
        Status status;
        bool paysOpening; // false in games that version 1 opened, which gave nobody the opening shares
        uint128 totalBets;
        uint256 sumOfSquares; // of the supplies
        mapping(uint256 choice => Choice) choices;
        mapping(bytes32 peer => Account) accounts;
    }

    uint256 public constant ONE = 1e18; // one token, one share, and a price of 1
    uint256 public constant GRANT = 100 * ONE;
    uint256 public constant OPENING = 100 * ONE;
    uint256 public constant MIN_BET = ONE / 1000;
    uint256 public constant EPOCH_SECONDS = 1 days;
    uint256 public constant JUDGE_SECONDS = 1 days;
    uint256 public constant MAX_ROUNDS = 64;
    uint256 public constant MAX_CHOICES = 64;
    bytes32 private constant OWNER_ROLE = keccak256("OWNER_ROLE");

    ISwarm private _swarm;
    mapping(bytes32 peer => Balance) private _balances;
    Game[] private _games;

    uint256[40] private __gap; // room for later versions

    event NewGameCreated(uint256 indexed gameIdx, uint256 roundCount, uint256 choiceCount, uint256 startTime);
    event RoundIncremented(uint256 indexed gameIdx, uint256 timestamp);
    event NewGuess(
        uint256 indexed gameIdx, address caller, string peerId, uint256 roundIdx, uint256 choiceIdx, uint256 bet
    );
    event AnswerRevealed(uint256 indexed gameIdx, uint256 correctChoiceIdx, uint256 jobId);
    event RewardClaimed(
        uint256 indexed gameIdx, address caller, string peerId, uint256 correctChoiceTokensIn, uint256 betTokensOut
    );

    // Beyond that ABI.
    event GameCancelled(uint256 indexed gameIdx);

    error AlreadyClaimed();
    error AlreadyGuessed();
    error BetTooLarge(uint256 balance);
    error BetTooSmall();
    error BettingClosed();
    error DeadlineNotReached(uint256 deadline);
    error DeadlinePassed();
    error GameNotOver();
    error InvalidCounts();
    error InvalidReveal();
    error NotAllowed();
    error NotPeersAccount();
    error NothingToClaim();
    error UnknownChoice();
    error UnknownGame();
    error WrongRound(uint256 round);

    constructor() {
        _disableInitializers();
    }

    /// Called by the proxy's constructor. `judge` becomes the owner.
    function initialize(address swarm_, address judge) external initializer {
        __Ownable_init(judge);
        _swarm = ISwarm(swarm_);
    }

    // ---- the judge

    /// Opens a game. `merkleRoot` is `commitmentOf(the right choice, a random number that is secret so far)`.
    function createNewGame(uint256 roundCount, uint256 choiceCount_, bytes32 merkleRoot)
        external
        onlyOwner
        returns (uint256 newGameIdx)
    {
        bool fits = roundCount > 0 && roundCount <= MAX_ROUNDS && choiceCount_ > 1 && choiceCount_ <= MAX_CHOICES;
        if (!fits) revert InvalidCounts();
        newGameIdx = _games.length;
        Game storage game = _games.push();
        game.commitment = merkleRoot;
        game.roundCount = uint32(roundCount);
        game.choiceCount = uint32(choiceCount_);
        game.status = Status.Open;
        game.paysOpening = true;
        game.deadline = uint40(block.timestamp + JUDGE_SECONDS);
        game.sumOfSquares = choiceCount_ * OPENING * OPENING;
        uint256 opening = _priceOf(OPENING, game.sumOfSquares);
        for (uint256 i = 0; i < choiceCount_; i++) game.choices[i] = Choice(uint128(OPENING), uint128(opening));
        emit NewGameCreated(newGameIdx, roundCount, choiceCount_, block.timestamp);
    }

    /// Ends the round; after the last one no bets are taken.
    function incrementRound(uint256 gameIdx) external onlyOwner {
        Game storage game = _inTime(gameIdx);
        if (game.status != Status.Open) revert BettingClosed();
        game.round++;
        if (game.round == game.roundCount) game.status = Status.Closed;
        game.deadline = uint40(block.timestamp + JUDGE_SECONDS);
        emit RoundIncremented(gameIdx, block.timestamp);
    }

    /// Settles a game whose last round is over. `jobId` is the number in the commitment.
    function revealAnswer(uint256 gameIdx, uint256 correctChoiceIdx, uint256 jobId) external onlyOwner {
        Game storage game = _inTime(gameIdx);
        if (game.status != Status.Closed) revert GameNotOver();
        if (correctChoiceIdx >= game.choiceCount) revert UnknownChoice();
        if (commitmentOf(correctChoiceIdx, jobId) != game.commitment) revert InvalidReveal();
        game.status = Status.Settled;
        game.correctChoice = uint32(correctChoiceIdx);
        emit AnswerRevealed(gameIdx, correctChoiceIdx, jobId);
    }

    // ---- the peers

    /// Bets `bet` tokens in the current round. A peer bets once in a round, by its own account.
    function guessAnswer(uint256 gameIdx, string calldata peerId, uint256 roundIdx, uint256 choiceIdx, uint256 bet)
        external
    {
        Game storage game = _inTime(gameIdx);
        if (game.status != Status.Open) revert BettingClosed();
        if (roundIdx != game.round) revert WrongRound(game.round);
        if (choiceIdx >= game.choiceCount) revert UnknownChoice();
        bytes32 peer = _ownPeer(peerId);
        Account storage account = game.accounts[peer];
        if (account.guesses[roundIdx].choice != 0) revert AlreadyGuessed();
        if (bet < MIN_BET) revert BetTooSmall();
        uint256 balance = _tokensOf(peer);
        if (bet > balance || bet > type(uint96).max) revert BetTooLarge(balance);
        _setBalance(peer, balance - bet);
        uint256 shares = _buy(game, choiceIdx, bet);
        account.stake += uint128(bet);
        account.shares[choiceIdx] += shares;
        account.guesses[roundIdx] = Guess(uint32(choiceIdx + 1), uint96(bet), uint128(shares));
        emit NewGuess(gameIdx, msg.sender, peerId, roundIdx, choiceIdx, bet);
    }

    /// Pays a peer once, to its own account: its part of all bets, also if it bet on a wrong choice. After a game that was
    /// cancelled, what it put in.
    function claimReward(uint256 gameIdx, string calldata peerId) external {
        Game storage game = _game(gameIdx);
        if (_isOverdue(game)) _cancel(game, gameIdx);
        if (game.status != Status.Settled && game.status != Status.Cancelled) revert GameNotOver();
        bytes32 peer = _ownPeer(peerId);
        Account storage account = game.accounts[peer];
        if (account.claimed) revert AlreadyClaimed();
        (uint256 shares, uint256 payout) = _payoutOf(game, account);
        if (payout == 0) revert NothingToClaim();
        account.claimed = true;
        _setBalance(peer, _tokensOf(peer) + payout);
        emit RewardClaimed(gameIdx, msg.sender, peerId, shares, payout);
    }

    // ---- views

    function betTokenBalance(string calldata peerId) external view returns (uint256) {
        return _holderOf(peerId) == address(0) ? 0 : _tokensOf(keccak256(bytes(peerId)));
    }

    function choiceCount(uint256 gameIdx) external view returns (uint256) {
        return _game(gameIdx).choiceCount;
    }

    /// Shares of a choice that peers own.
    function choiceSupply(uint256 gameIdx, uint256 choiceIdx) external view returns (uint256) {
        return _choice(gameIdx, choiceIdx).supply - OPENING;
    }

    function choiceTokenBalance(uint256 gameIdx, uint256 choiceIdx, string calldata peerId)
        external
        view
        returns (uint256)
    {
        _choice(gameIdx, choiceIdx);
        return _games[gameIdx].accounts[keccak256(bytes(peerId))].shares[choiceIdx];
    }

    /// Shares that `bet` tokens buy now; `roundIdx` is the current round.
    function choiceTokensOut(uint256 gameIdx, uint256 roundIdx, uint256 choiceIdx, uint256 bet)
        external
        view
        returns (uint256)
    {
        Choice storage choice = _choice(gameIdx, choiceIdx);
        Game storage game = _games[gameIdx];
        if (roundIdx != game.round) revert WrongRound(game.round);
        return bet == 0 ? 0 : _sharesFor(choice, game.sumOfSquares, bet);
    }

    /// Rounds that are over: the current round, or `roundCount` when no bets are taken any more.
    function currentRoundIdx(uint256 gameIdx) external view returns (uint256) {
        return _game(gameIdx).round;
    }

    function gameStatus(uint256 gameIdx) external view returns (Status) {
        Game storage game = _game(gameIdx);
        return _isOverdue(game) ? Status.Cancelled : game.status;
    }

    /// The price of the next share of a choice, at most ONE; `roundIdx` is the current round.
    function price(uint256 gameIdx, uint256 roundIdx, uint256 choiceIdx) external view returns (uint256) {
        Choice storage choice = _choice(gameIdx, choiceIdx);
        if (roundIdx != _games[gameIdx].round) revert WrongRound(_games[gameIdx].round);
        return Math.max(choice.highestPrice, _priceOf(choice.supply, _games[gameIdx].sumOfSquares));
    }

    function totalBets(uint256 gameIdx) external view returns (uint256) {
        return _game(gameIdx).totalBets;
    }

    // ---- Beyond that ABI

    function version() external pure returns (string memory) {
        return "hivewright/2";
    }

    /// The value to give to `createNewGame` for this answer and number.
    function commitmentOf(uint256 correctChoiceIdx, uint256 jobId) public pure returns (bytes32) {
        return keccak256(abi.encode(correctChoiceIdx, jobId));
    }

    /// Ends a game whose judge is gone. Anybody may.
    function cancelGame(uint256 gameIdx) external {
        Game storage game = _game(gameIdx);
        if (game.status != Status.Open && game.status != Status.Closed) revert BettingClosed();
        if (!_isOverdue(game)) revert DeadlineNotReached(game.deadline);
        _cancel(game, gameIdx);
    }

    function gameCount() external view returns (uint256) {
        return _games.length;
    }

    /// `correctChoice` counts only in a settled game.
    function getGame(uint256 gameIdx)
        external
        view
        returns (Status status, uint256 round, uint256 roundCount, uint256 correctChoice, uint256 deadline)
    {
        Game storage game = _game(gameIdx);
        status = _isOverdue(game) ? Status.Cancelled : game.status;
        return (status, game.round, game.roundCount, game.correctChoice, game.deadline);
    }

    /// A peer's bet in a round; all zero for none.
    function getGuess(uint256 gameIdx, string calldata peerId, uint256 roundIdx)
        external
        view
        returns (bool made, uint256 choiceIdx, uint256 bet, uint256 shares)
    {
        Guess storage guess = _game(gameIdx).accounts[keccak256(bytes(peerId))].guesses[roundIdx];
        if (guess.choice == 0) return (false, 0, 0, 0);
        return (true, guess.choice - 1, guess.bet, guess.shares);
    }

    /// What `claimReward` pays to the peer, or has paid.
    function getPayout(uint256 gameIdx, string calldata peerId) external view returns (uint256 payout, bool claimed) {
        Game storage game = _game(gameIdx);
        Account storage account = game.accounts[keccak256(bytes(peerId))];
        bool over = game.status == Status.Settled || game.status == Status.Cancelled || _isOverdue(game);
        if (over) (, payout) = _payoutOf(game, account);
        return (payout, account.claimed);
    }

    /// The market's belief that a choice is right, out of ONE; those of a game's choices add up to ONE.
    function impliedProbability(uint256 gameIdx, uint256 choiceIdx) external view returns (uint256) {
        uint256 supply = _choice(gameIdx, choiceIdx).supply;
        return supply * supply * ONE / _games[gameIdx].sumOfSquares;
    }

    function swarmCoordinator() external view returns (address) {
        return address(_swarm);
    }

    // ----

    function _authorizeUpgrade(address) internal view override {
        if (!_swarm.hasRole(OWNER_ROLE, msg.sender)) revert NotAllowed();
    }

    function _game(uint256 gameIdx) private view returns (Game storage) {
        if (gameIdx >= _games.length) revert UnknownGame();
        return _games[gameIdx];
    }

    /// The game, if its judge may still act.
    function _inTime(uint256 gameIdx) private view returns (Game storage game) {
        game = _game(gameIdx);
        if (_isOverdue(game)) revert DeadlinePassed();
    }

    function _choice(uint256 gameIdx, uint256 choiceIdx) private view returns (Choice storage) {
        if (choiceIdx >= _game(gameIdx).choiceCount) revert UnknownChoice();
        return _games[gameIdx].choices[choiceIdx];
    }

    /// Whether the judge did not act in time, so that only a cancellation is left.
    function _isOverdue(Game storage game) private view returns (bool) {
        return (game.status == Status.Open || game.status == Status.Closed) && block.timestamp > game.deadline;
    }

    function _cancel(Game storage game, uint256 gameIdx) private {
        game.status = Status.Cancelled;
        emit GameCancelled(gameIdx);
    }

    /// Takes the money of a bet and returns its shares.
    function _buy(Game storage game, uint256 choiceIdx, uint256 bet) private returns (uint256 shares) {
        Choice storage choice = game.choices[choiceIdx];
        uint256 before = choice.supply;
        shares = _sharesFor(choice, game.sumOfSquares, bet);
        if (shares == 0) revert BetTooSmall();
        uint256 supply = before + shares;
        uint256 sumOfSquares = game.sumOfSquares - before * before + supply * supply;
        // The mean price of this bet, too: rounding must not let a later bet buy more than this one.
        uint256 paid = Math.ceilDiv(bet * ONE, shares);
        uint256 highest = Math.max(choice.highestPrice, Math.max(paid, _priceOf(supply, sumOfSquares)));
        game.choices[choiceIdx] = Choice(uint128(supply), uint128(highest));
        game.sumOfSquares = sumOfSquares;
        game.totalBets += uint128(bet);
    }

    /// The shares by which C rises by at most `bet`, but no more than at the highest price so far.
    function _sharesFor(Choice storage choice, uint256 sumOfSquares, uint256 bet) private view returns (uint256) {
        uint256 supply = choice.supply;
        uint256 cost = Math.sqrt(sumOfSquares) + bet;
        uint256 byCost = Math.sqrt(cost * cost - (sumOfSquares - supply * supply)) - supply;
        return Math.min(byCost, bet * ONE / choice.highestPrice);
    }

    /// The derivative of C, rounded up.
    function _priceOf(uint256 supply, uint256 sumOfSquares) private pure returns (uint256) {
        return Math.ceilDiv(supply * ONE, Math.sqrt(sumOfSquares));
    }

    /// A peer owns the shares that it bought and, by its part of all bets, of the opening shares. What all bets are to all
    /// shares of the right choice, it gets for its own.
    function _payoutOf(Game storage game, Account storage account)
        private
        view
        returns (uint256 shares, uint256 payout)
    {
        if (game.status != Status.Settled) return (0, account.stake);
        uint256 supply = game.choices[game.correctChoice].supply;
        shares = account.shares[game.correctChoice];
        if (game.paysOpening) return (shares, (shares * game.totalBets + account.stake * OPENING) / supply);
        if (supply == OPENING) return (0, account.stake);
        payout = shares * game.totalBets / (supply - OPENING);
    }

    function _holderOf(string calldata peerId) private view returns (address) {
        string[] memory ids = new string[](1);
        ids[0] = peerId;
        return _swarm.getEoa(ids)[0];
    }

    function _ownPeer(string calldata peerId) private view returns (bytes32) {
        if (_holderOf(peerId) != msg.sender) revert NotPeersAccount();
        return keccak256(bytes(peerId));
    }

    function _epoch() private view returns (uint256) {
        return block.timestamp / EPOCH_SECONDS + 1;
    }

    function _tokensOf(bytes32 peer) private view returns (uint256) {
        Balance storage balance = _balances[peer];
        return balance.epoch == _epoch() ? balance.tokens : balance.tokens + GRANT;
    }

    function _setBalance(bytes32 peer, uint256 tokens) private {
        _balances[peer] = Balance(uint128(tokens), uint64(_epoch()));
    }
}
