// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

interface IPeers {
    function getEoa(string[] calldata peerIds) external view returns (address[] memory);
}

/// A foreign prediction market, written from the existing one's ABI and the public rules alone, with nothing of ours: a
/// plain pari-mutuel in which a share costs a token, and the answer is committed as the hash of its index and job.
contract ForeignMarket {
    struct Game {
        uint256 rounds;
        uint256 choices;
        uint256 round;
        uint256 right;
        uint256 pot;
        bytes32 root;
        bool revealed;
    }

    IPeers private swarm;
    address public owner;
    Game[] private games;
    mapping(string => int256) private spent;
    mapping(uint256 => mapping(uint256 => uint256)) public choiceSupply;
    mapping(uint256 => mapping(uint256 => mapping(string => uint256))) public choiceTokenBalance;

    event NewGameCreated(uint256 indexed gameIdx, uint256 roundCount, uint256 choiceCount, uint256 startTime);
    event RoundIncremented(uint256 indexed gameIdx, uint256 timestamp);
    event NewGuess(
        uint256 indexed gameIdx, address caller, string peerId, uint256 roundIdx, uint256 choiceIdx, uint256 bet
    );
    event AnswerRevealed(uint256 indexed gameIdx, uint256 correctChoiceIdx, uint256 jobId);
    event RewardClaimed(
        uint256 indexed gameIdx, address caller, string peerId, uint256 correctChoiceTokensIn, uint256 betTokensOut
    );

    constructor(address swarm_, address owner_) {
        swarm = IPeers(swarm_);
        owner = owner_;
    }

    function createNewGame(uint256 roundCount, uint256 choiceCount_, bytes32 merkleRoot) external returns (uint256) {
        require(msg.sender == owner, "owner only");
        games.push(Game(roundCount, choiceCount_, 0, 0, 0, merkleRoot, false));
        emit NewGameCreated(games.length - 1, roundCount, choiceCount_, block.timestamp);
        return games.length - 1;
    }

    function incrementRound(uint256 gameIdx) external {
        require(msg.sender == owner, "owner only");
        games[gameIdx].round++;
        emit RoundIncremented(gameIdx, block.timestamp);
    }

    function revealAnswer(uint256 gameIdx, uint256 correctChoiceIdx, uint256 jobId) external {
        Game storage game = games[gameIdx];
        require(game.root == keccak256(abi.encode(correctChoiceIdx, jobId)), "another answer");
        game.right = correctChoiceIdx;
        game.revealed = true;
        emit AnswerRevealed(gameIdx, correctChoiceIdx, jobId);
    }

    function guessAnswer(uint256 gameIdx, string calldata peerId, uint256 roundIdx, uint256 choiceIdx, uint256 bet)
        external
    {
        require(holder(peerId) == msg.sender && bet <= betTokenBalance(peerId), "not yours");
        require(roundIdx == games[gameIdx].round && roundIdx < games[gameIdx].rounds, "round over");
        spent[peerId] += int256(bet);
        games[gameIdx].pot += bet;
        choiceSupply[gameIdx][choiceIdx] += bet;
        choiceTokenBalance[gameIdx][choiceIdx][peerId] += bet;
        emit NewGuess(gameIdx, msg.sender, peerId, roundIdx, choiceIdx, bet);
    }

    function claimReward(uint256 gameIdx, string calldata peerId) external {
        Game storage game = games[gameIdx];
        uint256 tokens = choiceTokenBalance[gameIdx][game.right][peerId];
        require(game.revealed && holder(peerId) == msg.sender && tokens > 0, "nothing to claim");
        uint256 paid = game.pot * tokens / choiceSupply[gameIdx][game.right];
        choiceTokenBalance[gameIdx][game.right][peerId] = 0;
        spent[peerId] -= int256(paid);
        emit RewardClaimed(gameIdx, msg.sender, peerId, tokens, paid);
    }

    function betTokenBalance(string calldata peerId) public view returns (uint256) {
        return uint256(100 ether - spent[peerId]);
    }

    function choiceCount(uint256 gameIdx) external view returns (uint256) {
        return games[gameIdx].choices;
    }

    function choiceTokensOut(uint256, uint256, uint256, uint256 bet) external pure returns (uint256) {
        return bet;
    }

    function currentRoundIdx(uint256 gameIdx) external view returns (uint256) {
        return games[gameIdx].round;
    }

    function gameStatus(uint256 gameIdx) external view returns (uint8) {
        return games[gameIdx].revealed ? 2 : 1;
    }

    function price(uint256 gameIdx, uint256, uint256) external view returns (uint256) {
        return 1 ether / games[gameIdx].choices;
    }

    function totalBets(uint256 gameIdx) external view returns (uint256) {
        return games[gameIdx].pot;
    }

    function holder(string calldata peerId) private view returns (address) {
        string[] memory ids = new string[](1);
        ids[0] = peerId;
        return swarm.getEoa(ids)[0];
    }
}
