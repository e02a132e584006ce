"""The bodies of the account service's calls, typed and strict; unknown fields are ignored."""

import re
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AliasGenerator, BaseModel, ConfigDict, Field, RootModel, ValidationError
from pydantic.alias_generators import to_camel

from worker import multiaddr
from worker.errors import WorkerError
from worker.log import printable

PEER_ID = re.compile(multiaddr.PEER_ID_TO_REGISTER)
PeerId = Annotated[str, Field(pattern=f"^{PEER_ID.pattern}$")]
Number = Annotated[int, Field(ge=0, lt=2**63)]
Reward = Annotated[int, Field(ge=-(2**127), lt=2**127)]
"""Largest integer that the contract accepts."""


class Refused(WorkerError):
    """The service refuses a request: HTTP `status`, and `error`, a fixed name or a sentence."""

    def __init__(
        self,
        status: int,
        error: str,
        detail: str | None = None,
    ) -> None:
        super().__init__(detail or error)
        self.status = status
        self.error = error
        self.detail = detail


class Message(BaseModel):
    """A strict JSON object with camel-case keys."""

    model_config = ConfigDict(
        strict=True,
        frozen=True,
        allow_inf_nan=False,
        alias_generator=AliasGenerator(validation_alias=to_camel),
    )


class Enrol(Message):
    """A request for a node's token; key and signature in base 64."""

    peer_id: PeerId
    public_key: Annotated[str, Field(max_length=4096)]
    signature: Annotated[str, Field(max_length=4096)]
    token: Annotated[str, Field(max_length=1024)]
    challenge: Annotated[str, Field(max_length=200)] | None = None
    """The challenge that was signed. None: a node of the previous release, which signs none."""


class RegisterPeer(Message):
    """The account and peer that every call names."""

    org_id: Annotated[str, Field(max_length=256)]
    peer_id: PeerId


class SignedMove(Message):
    """A move of a peer to the account with the address `to`, signed by one of the two accounts."""

    peer_id: PeerId
    to: Annotated[str, Field(pattern=r"^0x[0-9a-fA-F]{40}$")]
    signature: Annotated[str, Field(pattern=r"^(0x)?[0-9a-f]{130}$")]
    """Signature (hexadecimal) of the contract's message for `rebindPeer`, as a personal message."""


class ShownProof(Message):
    """The peer's consent to belong to our account; keys and signatures in base 64."""

    public_key: Annotated[str, Field(max_length=4096)]
    signature: Annotated[str, Field(max_length=4096)]
    is_move: bool = False


class Registration(RegisterPeer):
    """A registration; clients of RL Swarm send no proof."""

    proof: ShownProof | None = None


class SubmitReward(RegisterPeer):
    """A reward, in milli-rewards."""

    round_number: Number
    stage_number: Number
    reward: Reward
    groups_digest: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None
    """Digest of the signed groups behind the reward; clients of RL Swarm send none."""


class SubmitWinner(RegisterPeer):
    """A vote for the round's best peers."""

    round_number: Number
    winners: Annotated[list[PeerId], Field(max_length=64)]


class ClaimReward(RegisterPeer):
    """A claim of a game's payment in the prediction market."""

    game_id: Number


class GuessAnswer(ClaimReward):
    """A bet, in units of a token; JavaScript clients send it as text."""

    clue_id: Number
    choice_idx: Number
    bet: Annotated[int, Field(ge=0, lt=2**96)] | Annotated[str, Field(pattern=r"^[0-9]{1,28}$")]


class RpcRequest(Message):
    """A JSON-RPC request."""

    jsonrpc: Literal["2.0"]
    id: int | str | None = None
    method: Annotated[str, Field(max_length=64)]
    params: list[Any] | dict[str, Any] = []


class _RpcBatch(RootModel[list[RpcRequest]]):
    model_config = ConfigDict(strict=True, frozen=True, allow_inf_nan=False)


_Body = TypeVar("_Body", bound=BaseModel)


def parse(model: type[_Body], body: bytes) -> _Body:
    """Read a body. Raises Refused with HTTP 400 and one line about the first error."""
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
    where = "/".join(str(part) for part in first["loc"]) or "body"
    if first["type"] == "missing":
        raise Refused(400, f"{where}: missing")
    got = "" if where == "body" else f"got {printable(repr(first['input']))[:60]}; "
    expected = "" if first["type"] == "json_invalid" else "expected "
    reason = printable(first["msg"].removeprefix("Input should be "))
    raise Refused(400, f"{where}: {got}{expected}{reason}")


def parse_rpc(
    body: bytes,
    most: int,
) -> RpcRequest | list[RpcRequest]:
    """Read a JSON-RPC request, or a batch of at most `most`. Raises Refused as `parse` does."""
    if not body.lstrip().startswith(b"["):
        return parse(RpcRequest, body)
    batch = parse(_RpcBatch, body).root
    if not 1 <= len(batch) <= most:
        raise Refused(400, f"body: got a batch of {len(batch)}; expected 1 to {most} requests")
    return batch
