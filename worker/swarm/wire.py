"""What travels between peers, as bytes: versioned frames, msgpack, zstd, signatures; nothing is trusted before it is
checked.

A frame is `hw`, a version byte, a kind byte, the payload's length (4 bytes) and the payload. Header and refusals keep
their form in every version, so that nodes of different versions can still tell each other why they don't understand.
Two payloads are signed with the sender's libp2p key, and so can be handed on by others: a member's record and a round's
groups.

Every decoder raises BadRecord, and only that, whatever it is given; its memory is bounded by the limits below.
"""

import asyncio
import enum
import hashlib
import re
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import msgpack
import zstandard

from worker.errors import BadRecord
from worker.records import Group, Task
from worker.swarm.identity import Identity, verify

VERSION = 3
"""3: a member's record names its task families, and a peer's groups may come from another that holds them."""
MAX_MEMBER_BYTES = 3584
MAX_ADDRESSES = 8
MAX_ADDRESS_LENGTH = 256
MAX_PEERS = 16
"""Records in one answer to a greeting."""
MAX_GROUPS_BYTES = 8 << 20
"""All groups of a round, decompressed. 9 tasks x 8 completions x 600 bytes are 45 KB, and 12 KB on the wire."""
ZSTD_LEVEL = 9
"""6 % less than level 3 for half a millisecond more, once a round; level 19 would save 4 % more and take 10 ms."""
MAX_FRAME_BYTES = 2 << 20
MAX_REQUEST_BYTES = MAX_MEMBER_BYTES + 64
MAX_PATIENCE_SECONDS = 600
MAX_FAMILIES = 64
"""Task families that a record names at most."""
FAMILY_BYTES = 4
MAX_HOLDERS = 3
"""Records in one hint where else groups are to be had."""

_HEADER = struct.Struct(">2sBBI")
HEADER_BYTES = _HEADER.size
_MAGIC = b"hw"
_MEMBER_DOMAIN = b"hivewright/member/3\n"
_GROUPS_DOMAIN = b"hivewright/groups/3\n"
_MAX_INTEGER = 2**63 - 1
_ENVIRONMENT = re.compile(r"[a-z0-9-]{1,32} [0-9A-Za-z.+!-]{1,31}")
_PEER_ID = re.compile(r"[1-9A-HJ-NP-Za-km-z]{16,64}")
_ADDRESS = re.compile(r"/(ip4|ip6|dns|dns4|dns6)/[0-9A-Za-z.:_-]+/(tcp|udp)/[0-9]{1,5}(/[0-9A-Za-z.:_-]+)*")


class Kind(enum.IntEnum):
    HELLO = 1  # a member's record, or nothing from who is no member; answered by PEERS
    PEERS = 2  # records of members that the sender heard itself
    ASK = 3  # for the groups of a round; answered by WAIT any number of times, then by GROUPS or REFUSAL
    WAIT = 4  # the groups are not ready; they follow in this stream
    GROUPS = 5  # signed groups
    REFUSAL = 6  # "reason: explanation", the same in all versions
    ELSEWHERE = 7  # full, instead of WAIT; records of peers that hold these groups
    AUDIT = 8  # for signed groups by their digest, from anybody; answered by GROUPS or REFUSAL


@dataclass(frozen=True, slots=True)
class Member:
    """A peer's membership record. `issued` and `expires` are the sender's Unix time in seconds; `round` its newest, -1:
    none yet. `environments` are names and versions, "reasoning-gym 0.1.25": two peers make the same tasks of a recipe
    only if they have one in common. `families` are short hashes (FAMILY_BYTES) of the task families of its mix.

    `sealed` is the record as it was signed: what is stored and handed on.
    """

    peer_id: str
    addresses: tuple[str, ...]
    round: int
    version: int
    issued: int
    expires: int
    environments: tuple[str, ...]
    families: frozenset[bytes]
    sealed: bytes


@dataclass(frozen=True, slots=True)
class Ask:
    """A standing request for the groups of `round`; the asker waits `patience` seconds. `member`: its own record,
    sealed. `owner`: whose groups; empty: those of the peer that is asked."""

    round: int
    patience: int
    member: bytes
    owner: str = ""


@dataclass(frozen=True, slots=True)
class Limits:
    """What a peer may send in one round."""

    num_groups: int
    num_completions: int
    completion_bytes: int


class Refused(Exception):
    """The other side refused, in good order. `reason` is its first word: "full", "skipped", "version" ...; `version`
    what it speaks."""

    def __init__(self, text: str, version: int = VERSION) -> None:
        super().__init__(text)
        self.reason = text.partition(":")[0]
        self.version = version


class OtherVersion(BadRecord):
    """A frame of another `version` than ours."""

    def __init__(self, version: int) -> None:
        super().__init__("version", f"version {version}; this node speaks {VERSION}, upgrade the older of the two")
        self.version = version


def is_peer_id(text: str) -> bool:
    return _PEER_ID.fullmatch(text) is not None


def encode_frame(kind: Kind, payload: bytes) -> bytes:
    return _HEADER.pack(_MAGIC, VERSION, kind, len(payload)) + payload


async def read_frame(reader: asyncio.StreamReader, max_bytes: int) -> tuple[Kind, bytes]:
    """The next frame. Raises BadRecord for what is none of ours, is newer, or is larger than `max_bytes`; Refused for a
    refusal.

    The caller bounds the time. A stream that ends early raises asyncio.IncompleteReadError.
    """
    magic, version, kind, length = _HEADER.unpack(await reader.readexactly(_HEADER.size))
    if magic != _MAGIC:
        raise BadRecord("malformed", f"frame starts with {magic!r}; expected {_MAGIC!r}")
    if kind == Kind.REFUSAL:
        text = (await reader.readexactly(min(length, 500))).decode(errors="replace")
        raise Refused(text, version)
    if version != VERSION:
        raise OtherVersion(version)
    if length > max_bytes:
        raise BadRecord("too-large", f"frame of {length} bytes; at most {max_bytes} are read")
    if kind not in set(Kind):
        raise BadRecord("malformed", f"frame of kind {kind}; version {VERSION} has none such")
    return Kind(kind), await reader.readexactly(length)


def hash_families(families: Iterable[str]) -> frozenset[bytes]:
    """What a record says of the families of a mix, each of which is named in full; beyond MAX_FAMILIES: not all."""
    hashes = {hashlib.sha256(family.encode()).digest()[:FAMILY_BYTES] for family in families}
    return frozenset(sorted(hashes)[:MAX_FAMILIES])


def seal_member(
    identity: Identity,
    addresses: Sequence[str],
    round: int,
    issued: int,
    expires: int,
    environments: Sequence[str],
    families: frozenset[bytes] = frozenset(),
) -> Member:
    """Sign our own membership record; addresses beyond MAX_ADDRESSES are left out."""
    kept = tuple(a for a in addresses if len(a) <= MAX_ADDRESS_LENGTH)[:MAX_ADDRESSES]
    fields = [round, VERSION, issued, expires, list(environments), b"".join(sorted(families))]
    sealed = _seal(identity, _MEMBER_DOMAIN, msgpack.packb([identity.peer_id, list(kept), *fields]))
    return Member(identity.peer_id, kept, round, VERSION, issued, expires, tuple(environments), families, sealed)


def open_member(sealed: bytes) -> Member:
    """Check and decode a membership record. Does not look at the clock."""
    public_key, signature, body = _open(sealed, MAX_MEMBER_BYTES)
    peer_id, addresses, round, version, issued, expires, environments, families = _list(_unpack(body), 8)
    member = Member(
        peer_id=_peer_id(peer_id),
        addresses=tuple(_address(a) for a in _list(addresses)),
        round=_integer(round, -1),
        version=_integer(version, 1),
        issued=_integer(issued),
        expires=_integer(expires),
        environments=tuple(_environment(e) for e in _list(environments)),
        families=_families(families),
        sealed=sealed,
    )
    if not verify(member.peer_id, public_key, _MEMBER_DOMAIN + body, signature):
        raise BadRecord("signature", f"membership record is not signed by {member.peer_id}")
    return member


def encode_ask(round: int, patience: int, member: bytes, owner: str = "") -> bytes:
    return encode_frame(Kind.ASK, msgpack.packb([round, patience, member, owner]))


def decode_ask(payload: bytes) -> Ask:
    round, patience, member, owner = _list(_unpack(payload), 4)
    if owner != "":
        owner = _peer_id(owner)
    return Ask(_integer(round), _integer(patience, 0, MAX_PATIENCE_SECONDS), _binary(member, MAX_MEMBER_BYTES), owner)


def groups_digest(sealed: bytes) -> str:
    """What names signed groups for ever: the SHA-256 of all their bytes, signature included, in hexadecimal."""
    return hashlib.sha256(sealed).hexdigest()


def encode_audit(digest: str) -> bytes:
    return encode_frame(Kind.AUDIT, bytes.fromhex(digest))


def decode_audit(payload: bytes) -> str:
    if len(payload) != hashlib.sha256().digest_size:
        raise BadRecord("malformed", f"digest of {len(payload)} bytes; expected {hashlib.sha256().digest_size}")
    return payload.hex()


def encode_peers(members: Sequence[bytes]) -> bytes:
    return encode_frame(Kind.PEERS, msgpack.packb(list(members[:MAX_PEERS])))


def encode_elsewhere(members: Sequence[bytes]) -> bytes:
    return encode_frame(Kind.ELSEWHERE, msgpack.packb(list(members[:MAX_HOLDERS])))


def decode_peers(payload: bytes) -> list[bytes]:
    """The sealed records of PEERS or ELSEWHERE; each is still to be opened."""
    return [_binary(m, MAX_MEMBER_BYTES) for m in _list(_unpack(payload))]


def encode_refusal(reason: str, explanation: str) -> bytes:
    return encode_frame(Kind.REFUSAL, f"{reason}: {explanation}".encode()[:500])


def seal_groups(identity: Identity, round: int, groups: Sequence[Group]) -> bytes:
    """Pack, compress and sign our groups of a round. They are to be within the peers' limits (exchange.py)."""
    rows = [[g.task.family, g.task.config_digest, g.task.seed, g.task.index, list(g.completions)] for g in groups]
    body = zstandard.ZstdCompressor(level=ZSTD_LEVEL).compress(msgpack.packb([identity.peer_id, round, rows]))
    return _seal(identity, _GROUPS_DOMAIN, body)


def open_groups(sealed: bytes, peer_id: str, round: int, limits: Limits) -> tuple[Group, ...]:
    """Check and decode the groups of `peer_id` in `round`; the signature is checked before anything is decompressed."""
    public_key, signature, body = _open(sealed, MAX_FRAME_BYTES)
    if not verify(peer_id, public_key, _GROUPS_DOMAIN + body, signature):
        raise BadRecord("signature", f"groups are not signed by {peer_id}")
    data = _unpack(_decompress(body), max_items=max(limits.num_groups, limits.num_completions, 1024))
    sender, sent_round, rows = _list(data, 3)
    if sender != peer_id:
        raise BadRecord("sender", f"groups are of another peer than {peer_id}")
    if _integer(sent_round) != round:
        raise BadRecord("round", f"groups are of round {sent_round}; round {round} was asked for")
    if len(_list(rows)) > limits.num_groups:
        raise BadRecord("too-large", f"{len(rows)} groups; at most {limits.num_groups} are read")
    return tuple(_group(row, limits) for row in rows)


def _group(row: Any, limits: Limits) -> Group:
    family, config_digest, seed, index, completions = _list(row, 5)
    if len(_list(completions)) > limits.num_completions:
        raise BadRecord("too-large", f"{len(completions)} completions; at most {limits.num_completions} are read")
    task = Task(_text(family, 128), _text(config_digest, 128), _integer(seed), _integer(index))
    return Group(task, tuple(_text(c, limits.completion_bytes) for c in completions))


def _seal(identity: Identity, domain: bytes, body: bytes) -> bytes:
    return bytes(msgpack.packb([identity.public_key, identity.sign(domain + body), body]))


def _open(sealed: bytes, max_bytes: int) -> tuple[bytes, bytes, bytes]:
    if len(sealed) > max_bytes:
        raise BadRecord("too-large", f"{len(sealed)} signed bytes; at most {max_bytes} are read")
    public_key, signature, body = _list(_unpack(sealed), 3)
    return _binary(public_key, 1024), _binary(signature, 1024), _binary(body, max_bytes)


def _decompress(data: bytes) -> bytes:
    try:
        # The one-shot decompressor allocates what the header claims, so the claim is checked first.
        claimed = zstandard.get_frame_parameters(data).content_size
        if claimed > MAX_GROUPS_BYTES:
            raise BadRecord("too-large", f"groups claim more than {MAX_GROUPS_BYTES} decompressed bytes")
        return zstandard.ZstdDecompressor().decompress(data, max_output_size=MAX_GROUPS_BYTES, allow_extra_data=False)
    except zstandard.ZstdError:
        raise BadRecord("malformed", "groups are not zstd") from None


def _unpack(data: bytes, max_items: int = 16) -> Any:
    """msgpack without maps and extensions.

    Lists are bounded because their claimed length is allocated, nesting by msgpack itself (1,024); text and bytes can't
    be longer than `data`.
    """
    try:
        return msgpack.unpackb(data, raw=False, max_array_len=max_items, max_map_len=0, max_ext_len=0)
    except (ValueError, TypeError, OverflowError, msgpack.UnpackException):
        raise BadRecord("malformed", f"{len(data)} bytes that are no message of version {VERSION}") from None


def _list(value: Any, length: int | None = None) -> list[Any]:
    if not isinstance(value, list) or (length is not None and len(value) != length):
        raise BadRecord("malformed", f"expected a list{'' if length is None else f' of {length}'}")
    return value


def _integer(value: Any, low: int = 0, high: int = _MAX_INTEGER) -> int:
    if type(value) is not int or not low <= value <= high:
        raise BadRecord("malformed", f"expected an integer from {low} to {high}")
    return value


def _binary(value: Any, max_bytes: int) -> bytes:
    if not isinstance(value, bytes) or len(value) > max_bytes:
        raise BadRecord("malformed", f"expected at most {max_bytes} bytes")
    return value


def _text(value: Any, max_bytes: int) -> str:
    if not isinstance(value, str):
        raise BadRecord("malformed", "expected text")
    if len(value) > max_bytes or len(value.encode()) > max_bytes:
        raise BadRecord("too-large", f"text of more than {max_bytes} bytes")
    return value


def _peer_id(value: Any) -> str:
    if not isinstance(value, str) or not is_peer_id(value):
        raise BadRecord("malformed", "peer id is none")
    return value


def _families(value: Any) -> frozenset[bytes]:
    data = _binary(value, MAX_FAMILIES * FAMILY_BYTES)
    if len(data) % FAMILY_BYTES:
        raise BadRecord("malformed", f"expected hashes of families, {FAMILY_BYTES} bytes each")
    return frozenset(data[i : i + FAMILY_BYTES] for i in range(0, len(data), FAMILY_BYTES))


def _environment(value: Any) -> str:
    if not isinstance(value, str) or not _ENVIRONMENT.fullmatch(value):
        raise BadRecord("malformed", "expected environments such as reasoning-gym 0.1.25")
    return value


def _address(value: Any) -> str:
    if not isinstance(value, str) or len(value) > MAX_ADDRESS_LENGTH or not _ADDRESS.fullmatch(value):
        raise BadRecord("malformed", "expected addresses such as /ip4/192.0.2.1/tcp/38000")
    return value
