"""The contracts' own tests, in Solidity (contracts/test), run by forge on the pinned compiler."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MUTANTS = {
    "a reward counts twice": ("if (entry.submitted) revert RewardAlreadySubmitted();", ""),
    "a past round has one stage more": (
        "roundNumber == currentRound ? currentStage + 1 : stageCount()",
        "roundNumber == currentRound ? currentStage + 1 : stageCount() + 1",
    ),
    "a vote counts twice": ("if (votes.length != 0) revert WinnerAlreadyVoted();", ""),
    "an empty vote counts": ("if (winners.length == 0) revert InvalidVote();", ""),
    "a vote for oneself wins": ("if (chosen[i] == voter) continue;", ""),
    "uint256 becomes negative": (
        "if (reward > uint256(type(int256).max)) revert RewardOutOfRange();",
        "",
    ),
    "a proof is good for any contract": (
        "block.chainid, address(this), msg.sender);",
        "block.chainid, msg.sender);",
    ),
    "a proven peer can be registered again": (
        "if (peer.proven) revert PeerIdAlreadyRegistered();",
        "",
    ),
    "a move can be repeated": ("uint256(peer.moves), peerId", "uint256(0), peerId"),
    "a squatter's rewards stay": ("peer.totalReward = 0;", ""),
    "a list keeps a peer that moved": ("_unlist(number, peer);", ""),
}
MARKET_MUTANTS = {
    "the price of a choice falls": (
        "return Math.min(byCost, bet * ONE / choice.highestPrice);",
        "return byCost;",
    ),
    "a claim is paid twice": ("account.claimed = true;", ""),
    "any answer fits the commitment": (
        "if (commitmentOf(correctChoiceIdx, jobId) != game.commitment) revert InvalidReveal();",
        "",
    ),
    "a judge may act after its deadline": (
        "if (_isOverdue(game)) revert DeadlinePassed();",
        "",
    ),
    "a bet counts for a later round": (
        "if (roundIdx != game.round) revert WrongRound(game.round);\n        if (choiceIdx",
        "if (choiceIdx",
    ),
    "the opening shares are paid to nobody": (" + account.stake * OPENING) /", ") /"),
    "a dust bet takes the pot": (
        "shares * game.totalBets + account.stake * OPENING) / supply",
        "supply == OPENING ? account.stake * OPENING : shares * game.totalBets) /"
        " (supply == OPENING ? OPENING : supply - OPENING)",
    ),
    "the code can be initialised by anybody": ("_disableInitializers();", ""),
}
SOURCES = {"SwarmCoordinator": MUTANTS, "PredictionMarket": MARKET_MUTANTS}
"""Rules to take out of each contract: what is replaced, and by what."""


def forge(*options: str, folder: Path = ROOT) -> tuple[int, dict[str, dict]]:
    """Exit code and result of each test, by its name."""
    command = [folder / "scripts/contracts", "test", "--json", *options]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert ended.stdout.startswith("{"), ended.stdout + ended.stderr
    suites = json.loads(ended.stdout).values()
    return ended.returncode, {
        name: found for suite in suites for name, found in suite["test_results"].items()
    }


def test_units_fuzzed_functions_and_invariants_hold(anvil_binary):
    code, results = forge()
    failed = {
        name: result["reason"] for name, result in results.items() if result["status"] != "Success"
    }
    assert (code, failed) == (0, {})
    kinds = {name.partition("(")[0]: result["kind"] for name, result in results.items()}
    assert sum(name.startswith("test_") for name in kinds) >= 15
    assert {
        name: kind["Fuzz"]["runs"] for name, kind in kinds.items() if name.startswith("testFuzz")
    } == dict.fromkeys(
        (
            "testFuzz_anyOtherBitOfAProofSpoilsIt",
            "testFuzz_betIsAtMostTheBalance",
            "testFuzz_earlierBetBuysAtLeastAsMuch",
            "testFuzz_gamePaysWhatWasPutIn",
            "testFuzz_listAgreesWithACount",
            "testFuzz_onlyTheHolderSubmits",
            "testFuzz_pageIsCutToWhatIsThere",
            "testFuzz_probabilitiesAddUp",
            "testFuzz_peerIdBelongsToOneDigest",
            "testFuzz_peerIdIsRegisteredOnce",
            "testFuzz_rewardIsCreditedOnceWhereItFits",
            "testFuzz_roundEndsOnlyAsExpected",
            "testFuzz_unsignedRewardNeverBecomesNegative",
            "testFuzz_voteIsASetOfOthers",
        ),
        256,
    )
    for name in (
        "invariant_claimsArePaidOnce",
        "invariant_everyPeerHasOneHolder",
        "invariant_gameNeverPaysMoreThanWasPutIn",
        "invariant_leaderboardsAreBoundedAndRight",
        "invariant_oneCreditForARoundStageAndPeer",
        "invariant_sumsOfRewardsAgree",
    ):
        assert kinds[name]["Invariant"]["calls"] >= 1000
        assert kinds[name]["Invariant"]["reverts"] == 0


@pytest.mark.nightly
def test_money_is_conserved_in_ten_thousand_games_of_the_contract(anvil_binary):
    """As in the games of the model (test_market.py), which are played in every run."""
    code, results = forge("--match-test", "testFuzz_gamePaysWhatWasPutIn", "--fuzz-runs", "10000")
    (result,) = results.values()
    assert (code, result["status"]) == (0, "Success")
    assert result["kind"]["Fuzz"]["runs"] == 10_000


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("contract", "mutant"),
    [(contract, mutant) for contract, mutants in SOURCES.items() for mutant in mutants],
)
def test_mutant_is_found(tmp_path, anvil_binary, contract, mutant):
    """The tests can fail: a contract with one rule taken out does not pass them."""
    before, after = SOURCES[contract][mutant]
    for folder in ("scripts", "contracts"):
        ignored = shutil.ignore_patterns("node_modules")
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=ignored)
    (tmp_path / "contracts/node_modules").symlink_to(ROOT / "contracts/node_modules")
    source = tmp_path / f"contracts/src/{contract}.sol"
    text = source.read_text()
    assert text.count(before) == 1
    source.write_text(text.replace(before, after))
    code, found = forge("--fail-fast", "--no-match-contract", "InvariantsTest", folder=tmp_path)
    assert code != 0
    assert any(result["status"] == "Failure" for result in found.values())
