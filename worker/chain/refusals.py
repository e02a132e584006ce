"""Classify the messages with which nodes refuse transactions, in the words of the known clients.

JSON-RPC clients do not agree on codes for this, so the text decides. tests/chain/test_refusals.py
has the clients' full texts.
"""

import re
from enum import Enum


class Refusal(Enum):
    """Classes of refusals of eth_sendRawTransaction; the values are for people."""

    NONCE_TOO_LOW = "nonce too low"
    NONCE_TOO_HIGH = "nonce too high"
    ALREADY_KNOWN = "already known"
    REPLACEMENT_UNDERPRICED = "another transaction with this nonce waits, and pays as much"
    UNDERPRICED = "gas price too low"
    INSUFFICIENT_FUNDS = "insufficient funds"
    INTRINSIC_GAS = "gas limit below what any such transaction costs"
    GAS_LIMIT_EXCEEDED = "gas limit above what the chain allows"
    FEE_CAP_EXCEEDED = "fee above what the node lets through"
    POOL_FULL = "transaction pool full"
    CHAIN_ID = "signed for another chain"


# The first match wins: "replacement transaction underpriced" contains "transaction underpriced".
_PATTERNS: tuple[tuple[Refusal, str], ...] = (
    (
        Refusal.ALREADY_KNOWN,
        r"already known|alreadyknown|known transaction|already imported|existing (tx|txn) with same"
        r" hash"
        r"|already exists|already in mempool|alreadyexists",
    ),
    (
        Refusal.REPLACEMENT_UNDERPRICED,
        r"replacement (transaction )?underpriced|transaction replacement underpriced|could not"
        r" replace existing tx"
        r"|replacementnotallowed|insufficient gas price to replace|replaced by transaction with"
        r" higher tip"
        r"|future transaction tries to replace pending|ownnoncealreadyused",
    ),
    (
        Refusal.NONCE_TOO_LOW,
        r"nonce( is)? too low|oldnonce|\bmined\b|nonce has already been used|invalid nonce.*low",
    ),
    (
        Refusal.NONCE_TOO_HIGH,
        r"nonce( is)? too high|noncegap|noncetoofarinfuture|too distant from current sender"
        r" nonce|nonce too far"
        r"|nonce gap|gapped-nonce|invalid nonce.*high",
    ),
    (
        Refusal.POOL_FULL,
        r"(tx)?pool is full|transaction pool (is )?full|feetoolowtocompete|account limit"
        r" exceeded|pool limit|spammer"
        r"|in-flight transaction limit|txpool overflow|txpoolfull|pool overflow",
    ),
    (
        Refusal.INSUFFICIENT_FUNDS,
        (
            r"insufficient ?funds|upfront cost exceeds account balance|insufficient"
            r" balance|insufficientfunds"
        ),
    ),
    (Refusal.FEE_CAP_EXCEEDED, r"exceeds the configured cap|transaction fee cap exceeded"),
    (
        Refusal.UNDERPRICED,
        r"underpriced|gas price below|below (the )?minimum|fee ?too ?low|less than block base"
        r" fee|gas price too low"
        r"|below current base fee|below chain minimum|less than the minimum|minimum required"
        r" priority fee"
        r"|gas tip cap|max fee per gas less|less than the current basefee|gas price must be at"
        r" least",
    ),
    (
        Refusal.GAS_LIMIT_EXCEEDED,
        r"exceeds block gas limit|gaslimitexceeded|gas limit too high|gas limit exceeds|exceeds"
        r" allowance"
        r"|intrinsic gas too high|exceeds the maximum|gas above",
    ),
    (Refusal.INTRINSIC_GAS, r"intrinsic ?gas|intrinsic cost"),
    (
        Refusal.CHAIN_ID,
        r"invalid chain ?id|wrong chain ?id|chain ?id not supported|chain ?id is"
        r" required|invalidtxchainid"
        r"|incompatible.*chain|mismatched.*chain|invalid signer|have \d+ want \d+.*chain",
    ),
)
_COMPILED = tuple((refusal, re.compile(pattern)) for refusal, pattern in _PATTERNS)

_MINIMUM = re.compile(
    r"(?:minimum needed|tip needed|minimum required priority fee(?: of)?|base ?fee(?: per gas)?"
    r"|minimum(?: gas price)?|at least|want)[:=\s]*(\d+)",
    re.IGNORECASE,
)


def classify(text: str) -> Refusal | None:
    """Return the class of a node's refusal; None for a text that no known client uses."""
    lowered = text.lower()
    return next((refusal for refusal, pattern in _COMPILED if pattern.search(lowered)), None)


def minimum_wei(text: str) -> int | None:
    """Return the lowest sufficient price that the refusal names; None if it names none."""
    found = [int(digits) for digits in _MINIMUM.findall(text)]
    return max(found, default=None)
