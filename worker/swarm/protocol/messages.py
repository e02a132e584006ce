"""Messages between peers, as bytes: versioned frames, msgpack, zstd, signatures.

A frame is `hw`, a version byte, a kind byte, the payload's length (4 bytes) and the payload. Header
and refusals have the same form in every version, so that nodes of different versions can still
report why they don't understand each other. Two payloads are signed with the sender's libp2p key,
so others can relay them: a member's record, and the groups of a part of a round.

Every decoder raises BadRecord, and only that, for any input; its memory is bounded by the limits
below.
"""

import asyncio
import enum
import hashlib
import re
import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import msgpack
import zstandard

from worker.errors import BadRecord
from worker.multiaddr import is_address, is_peer_id
from worker.records import MAX_PART_TASKS, MAX_PARTS, Group, Place, Task
from worker.swarm.identity import Identity, verify
from worker.swarm.protocol.codec import Schema, at_most, binary, record, whole

VERSION = 4
"""Version of the protocol. Since 4 a request names a span of groups, and a round has parts; since 3
a member's record names its task families, and peers may relay each other's groups."""
MAX_MEMBER_BYTES = 3584
MAX_ADDRESSES = 8
MAX_PEERS = 16
"""Number of records in one answer to a greeting."""
MAX_GROUPS_BYTES = 8 << 20
"""Size of all groups of a round, decompressed.

For comparison: 9 tasks x 8 completions x 600 bytes are 45 KB, and 12 KB on the wire.
"""
MAX_SERVED_BYTES = MAX_GROUPS_BYTES // 4
"""Size of our own groups of a round, uncompressed: even incompressible text fits into a frame."""
ZSTD_LEVEL = 9
"""Messages are 6 % smaller than at level 3, for half a millisecond more per round.

Level 19 would save another 4 % and take 10 ms.
"""
MAX_GROUPS = MAX_PART_TASKS
"""Number of a peer's groups in a part of a round; no setting allows more."""
MAX_COMPLETIONS = 256
"""Number of completions in a group; no setting allows more."""
MAX_FRAME_BYTES = 2 << 20
MAX_REQUEST_BYTES = MAX_MEMBER_BYTES + 128
MAX_PATIENCE_SECONDS = 600
MAX_FAMILIES = 64
"""Number of task families in a record."""
FAMILY_BYTES = 4
MAX_HOLDERS = 3
"""Number of records of other holders in one ELSEWHERE answer."""
MAX_LISTED = 16
"""Number of addresses, and of environments, that are accepted in a record."""
MAX_NAME_BYTES = 128
"""Size of a task family's name, and of a configuration's digest."""
PIECE_BYTES = 1 << 20
"""Size of a piece of a file of weights; the last piece may be smaller."""
MAX_PIECES = 1 << 13
"""Number of pieces of a file of weights, which is 8 GiB."""
MAX_KEY_BYTES = 1024
"""Size of a public key, and of a signature."""

_HEADER = struct.Struct(">2sBBI")
HEADER_BYTES = _HEADER.size
_MAGIC = b"hw"
_MEMBER_DOMAIN = b"hivewright/member/3\n"
_GROUPS_DOMAIN = b"hivewright/groups/3\n"
# For further parts of a round, which earn nothing, so that no audit mistakes one for the first.
_PART_DOMAIN = b"hivewright/part/4\n"
_ENVIRONMENT = re.compile(r"[a-z0-9-]{1,32} [0-9A-Za-z.+!-]{1,31}")

# Signed bytes: the public key, the signature, and the bytes themselves.
_SEALED = Schema(record(binary(MAX_KEY_BYTES), binary(MAX_KEY_BYTES), bytes))
# Peer id, addresses, round, version, issued, expires, environments, families.
_TEXTS = at_most(str, MAX_LISTED)
_NUMBERS = whole(-1), whole(1), whole(0), whole(0)
_MEMBER = Schema(record(str, _TEXTS, *_NUMBERS, _TEXTS, binary(MAX_FAMILIES * FAMILY_BYTES)))
_PLACE = record(whole(0), whole(0, MAX_PARTS))
_ASK = Schema(
    record(whole(0), _PLACE, whole(0, MAX_PATIENCE_SECONDS), binary(MAX_MEMBER_BYTES), str)
)
_RECORDS = Schema(at_most(binary(MAX_MEMBER_BYTES), MAX_PEERS))
# Family, digest of its configuration, seed, index, completions.
_GROUP = record(str, str, whole(0), whole(0), at_most(str, MAX_COMPLETIONS))
# Peer id, round, groups; for a further part also its number.
_GROUPS = Schema(record(str, whole(0), at_most(_GROUP, MAX_GROUPS)))
_PART = Schema(record(str, whole(0), at_most(_GROUP, MAX_GROUPS), whole(1, MAX_PARTS - 1)))


class Kind(enum.IntEnum):
    """The kinds of frames."""

    HELLO = 1
    """The sender's record, empty if it is not a member; answered by PEERS."""
    PEERS = 2
    """Records of members that contacted the sender."""
    ASK = 3
    """Request for the newest groups of a span; answered by WAITs, then by GROUPS or REFUSAL."""
    WAIT = 4
    """The groups are not ready yet; they follow in this stream."""
    GROUPS = 5
    """Signed groups."""
    REFUSAL = 6
    """Text "reason: explanation", the same in all versions."""
    ELSEWHERE = 7
    """Sent instead of WAIT when full: records of peers that have these groups."""
    AUDIT = 8
    """Request for signed groups by their digest, from anyone; answered by GROUPS or REFUSAL."""
    WEIGHTS = 9
    """Request for weights (weight_messages.py); answered by OFFER, PIECEs, or REFUSAL."""
    OFFER = 10
    """The digests of the pieces of a file with the sender's weights."""
    PIECE = 11
    """A piece of that file."""


_MAX_PAYLOAD_BYTES = {
    Kind.HELLO: MAX_MEMBER_BYTES,
    Kind.PEERS: MAX_PEERS * (MAX_MEMBER_BYTES + 3) + 3,
    Kind.ASK: MAX_REQUEST_BYTES,
    Kind.WAIT: 0,
    Kind.GROUPS: MAX_FRAME_BYTES,
    Kind.ELSEWHERE: MAX_HOLDERS * (MAX_MEMBER_BYTES + 3) + 1,
    Kind.AUDIT: hashlib.sha256().digest_size,
    Kind.WEIGHTS: MAX_REQUEST_BYTES,
    Kind.OFFER: MAX_PIECES * hashlib.sha256().digest_size + 32,
    Kind.PIECE: PIECE_BYTES,
}


@dataclass(frozen=True, slots=True)
class Member:
    """A peer's membership record.

    `issued` and `expires` are the sender's Unix time in seconds; `round` its newest, -1: none yet.
    `environments` are names and versions, "reasoning-gym 0.1.25": two peers make the same tasks of
    a recipe only if they have one in common. `families` are short hashes (FAMILY_BYTES) of the task
    families of its mix. `sealed` is the record as it was signed, which is stored and relayed.
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
    """A standing request for a peer's newest groups; the asker waits `patience` seconds.

    The groups are not newer than `round`, and not older than the place `oldest`. `member`: the
    asker's own record, sealed. `owner`: the peer whose groups are wanted; empty: the receiver of
    the request.
    """

    round: int
    oldest: Place
    patience: int
    member: bytes
    owner: str = ""

    def covers(self, place: Place) -> bool:
        return self.oldest <= place and place.round <= self.round


@dataclass(frozen=True, slots=True)
class Served:
    """The groups of one part of a round, as their owner signed them."""

    place: Place
    groups: tuple[Group, ...]


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits on what a peer may send in one round."""

    num_groups: int
    num_completions: int
    completion_bytes: int


class Refused(Exception):
    """The peer sent a refusal.

    `reason` is its first word: "full", "skipped", "version" ...; `version` is the peer's protocol
    version.
    """

    def __init__(
        self,
        text: str,
        version: int = VERSION,
    ) -> None:
        super().__init__(text)
        self.reason = text.partition(":")[0]
        self.version = version


class OtherVersion(BadRecord):
    """A frame of another protocol version than ours."""

    def __init__(self, version: int) -> None:
        super().__init__(
            "version",
            f"version {version}; this node speaks {VERSION}, upgrade the older of the two",
        )
        self.version = version


def encode_frame(kind: Kind, payload: bytes) -> bytes:
    return _HEADER.pack(_MAGIC, VERSION, kind, len(payload)) + payload


async def read_frame(
    reader: asyncio.StreamReader,
    max_bytes: int,
    on_begin: Callable[[], None] | None = None,
) -> tuple[Kind, bytes]:
    """Read the next frame.

    Raises BadRecord for a foreign frame, one of another version, or one larger than `max_bytes` or
    than its kind allows; Refused for a refusal; asyncio.IncompleteReadError if the stream ends
    early. The caller limits the time. `on_begin` is called when the header has arrived.
    """
    header = await reader.readexactly(_HEADER.size)
    if on_begin is not None:
        on_begin()
    magic, version, kind, length = _HEADER.unpack(header)
    if magic != _MAGIC:
        raise BadRecord("malformed", f"frame starts with {magic!r}; expected {_MAGIC!r}")
    if kind == Kind.REFUSAL:
        text = (await reader.readexactly(min(length, 500))).decode(errors="replace")
        raise Refused(text, version)
    if version != VERSION:
        raise OtherVersion(version)
    if kind not in _MAX_PAYLOAD_BYTES:
        raise BadRecord("malformed", f"frame of unknown kind {kind} in version {VERSION}")
    max_bytes = min(max_bytes, _MAX_PAYLOAD_BYTES[Kind(kind)])
    if length > max_bytes:
        raise BadRecord("too-large", f"frame of {length} bytes; at most {max_bytes} are accepted")
    return Kind(kind), await reader.readexactly(length)


def hash_families(families: Iterable[str]) -> frozenset[bytes]:
    """Return the hashes of a mix's families for a record, MAX_FAMILIES at most.

    Each item of `families` is a full name.
    """
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
    """Sign our own membership record.

    Addresses that peers would refuse, or beyond MAX_ADDRESSES, are left out.
    """
    kept = tuple(a for a in addresses if is_address(a))[:MAX_ADDRESSES]
    fields = [round, VERSION, issued, expires, list(environments), b"".join(sorted(families))]
    sealed = _seal(identity, _MEMBER_DOMAIN, msgpack.packb([identity.peer_id, list(kept), *fields]))
    return Member(
        identity.peer_id,
        kept,
        round,
        VERSION,
        issued,
        expires,
        tuple(environments),
        families,
        sealed,
    )


def open_member(sealed: bytes) -> Member:
    """Verify and decode a membership record. It may be expired."""
    member = read_member(sealed)
    if not is_genuine(member):
        raise BadRecord("signature", f"membership record is not signed by {member.peer_id}")
    return member


def read_member(sealed: bytes) -> Member:
    """Decode a membership record. This is cheap, because the signature is not verified."""
    _, _, body = _open(sealed, MAX_MEMBER_BYTES)
    peer_id, addresses, *numbers, environments, families = _MEMBER.decode(body)
    if not is_peer_id(peer_id):
        raise BadRecord("malformed", "not a peer id")
    if not all(map(is_address, addresses)):
        raise BadRecord("malformed", "expected addresses such as /ip4/192.0.2.1/tcp/38000")
    if not all(map(_ENVIRONMENT.fullmatch, environments)):
        raise BadRecord("malformed", "expected environments such as reasoning-gym 0.1.25")
    round, version, issued, expires = numbers
    return Member(
        peer_id=peer_id,
        addresses=tuple(addresses),
        round=round,
        version=version,
        issued=issued,
        expires=expires,
        environments=tuple(environments),
        families=_split_families(families),
        sealed=sealed,
    )


def is_genuine(member: Member) -> bool:
    """Return whether the record is signed by the peer that it names."""
    public_key, signature, body = _open(member.sealed, MAX_MEMBER_BYTES)
    return verify(member.peer_id, public_key, _MEMBER_DOMAIN + body, signature)


def encode_ask(ask: Ask) -> bytes:
    fields = [ask.round, ask.oldest, ask.patience, ask.member, ask.owner]
    return encode_frame(Kind.ASK, msgpack.packb(fields))


def decode_ask(payload: bytes) -> Ask:
    round, oldest, patience, member, owner = _ASK.decode(payload)
    if owner and not is_peer_id(owner):
        raise BadRecord("malformed", "not a peer id")
    return Ask(round, Place(*oldest), patience, member, owner)


def groups_digest(sealed: bytes) -> str:
    """Return the SHA-256 (hexadecimal) of all bytes of signed groups, signature included.

    It identifies them permanently.
    """
    return hashlib.sha256(sealed).hexdigest()


def encode_audit(digest: str) -> bytes:
    return encode_frame(Kind.AUDIT, bytes.fromhex(digest))


def decode_audit(payload: bytes) -> str:
    if len(payload) != hashlib.sha256().digest_size:
        raise BadRecord(
            "malformed", f"digest of {len(payload)} bytes; expected {hashlib.sha256().digest_size}"
        )
    return payload.hex()


def encode_peers(members: Sequence[bytes]) -> bytes:
    return encode_frame(Kind.PEERS, msgpack.packb(list(members[:MAX_PEERS])))


def encode_elsewhere(members: Sequence[bytes]) -> bytes:
    return encode_frame(Kind.ELSEWHERE, msgpack.packb(list(members[:MAX_HOLDERS])))


def decode_peers(payload: bytes) -> list[bytes]:
    """Return the sealed records of PEERS or ELSEWHERE; `open_member` verifies each."""
    records: list[bytes] = _RECORDS.decode(payload)
    return records


def encode_refusal(reason: str, explanation: str) -> bytes:
    return encode_frame(Kind.REFUSAL, f"{reason}: {explanation}".encode()[:500])


def size_of(group: Group) -> int:
    """Return an upper bound of the bytes of a group in a message, uncompressed."""
    return sum(len(c.encode()) + 64 for c in group.completions) + 256


def find_excess(
    group: Group,
    limits: Limits,
    part: int = 0,
) -> str | None:
    """Return the reason why peers with these limits would refuse a group; None: they accept it."""
    if group.task.index - part * MAX_PART_TASKS >= limits.num_groups:
        return "index"
    if len(group.completions) > limits.num_completions:
        return "too many answers"
    sizes = [len(completion.encode()) for completion in group.completions]
    if max(sizes, default=0) > limits.completion_bytes:
        return "too long"
    return "too large" if size_of(group) > MAX_SERVED_BYTES else None


def seal_groups(
    identity: Identity,
    round: int,
    groups: Sequence[Group],
    part: int = 0,
) -> bytes:
    """Pack, compress and sign our groups of a round, which must be within the peers' limits."""
    rows = []
    for group in groups:
        task = group.task
        recipe = [task.family, task.config_digest, task.seed, task.index]
        rows.append([*recipe, list(group.completions)])
    fields = [identity.peer_id, round, rows, *([part] if part else [])]
    body = zstandard.ZstdCompressor(level=ZSTD_LEVEL).compress(msgpack.packb(fields))
    return _seal(identity, _PART_DOMAIN if part else _GROUPS_DOMAIN, body)


def open_groups(
    sealed: bytes,
    peer_id: str,
    round: int,
    limits: Limits,
) -> tuple[Group, ...]:
    """Return the groups of the first part of `round`, which alone earns. See `open_served`."""
    served = open_served(sealed, peer_id, limits)
    if served.place.part:
        raise BadRecord("round", f"groups are of part {served.place.part} of the round; expected 0")
    if served.place.round != round:
        raise BadRecord(
            "round", f"groups are of round {served.place.round}; expected round {round}"
        )
    return served.groups


def open_served(
    sealed: bytes,
    peer_id: str,
    limits: Limits,
) -> Served:
    """Verify and decode groups of `peer_id`.

    The signature is verified before anything is decompressed. A group that exceeds the limits of a
    group is decoded nevertheless: it is not a reason to drop the others, and the verifier
    (verify.py) drops and counts it.
    """
    public_key, signature, body = _open(sealed, MAX_FRAME_BYTES)
    if verify(peer_id, public_key, _GROUPS_DOMAIN + body, signature):
        sender, round, rows = _GROUPS.decode(_decompress(body))
        place = Place(round, 0)
    elif verify(peer_id, public_key, _PART_DOMAIN + body, signature):
        sender, round, rows, part = _PART.decode(_decompress(body))
        place = Place(round, part)
    else:
        raise BadRecord("signature", f"groups are not signed by {peer_id}")
    if sender != peer_id:
        raise BadRecord("sender", f"groups are of another peer than {peer_id}")
    if len(rows) > limits.num_groups:
        raise BadRecord("too-large", f"{len(rows)} groups; expected {limits.num_groups} at most")
    return Served(place, tuple(map(_read_group, rows)))


def _read_group(row: tuple[str, str, int, int, list[str]]) -> Group:
    family, config_digest, seed, index, completions = row
    if max(len(family.encode()), len(config_digest.encode())) > MAX_NAME_BYTES:
        raise BadRecord("too-large", f"name of more than {MAX_NAME_BYTES} bytes")
    return Group(Task(family, config_digest, seed, index), tuple(completions))


def _seal(
    identity: Identity,
    domain: bytes,
    body: bytes,
) -> bytes:
    return bytes(msgpack.packb([identity.public_key, identity.sign(domain + body), body]))


def _open(
    sealed: bytes,
    max_bytes: int,
) -> tuple[bytes, bytes, bytes]:
    if len(sealed) > max_bytes:
        raise BadRecord("too-large", f"{len(sealed)} signed bytes; expected {max_bytes} at most")
    public_key, signature, body = _SEALED.decode(sealed)
    return public_key, signature, body


def _decompress(data: bytes) -> bytes:
    try:
        # The one-shot decompressor allocates what the header claims, so the claim is checked first.
        claimed = zstandard.get_frame_parameters(data).content_size
        if claimed > MAX_GROUPS_BYTES:
            raise BadRecord(
                "too-large", f"groups claim more than {MAX_GROUPS_BYTES} decompressed bytes"
            )
        return zstandard.ZstdDecompressor().decompress(
            data, max_output_size=MAX_GROUPS_BYTES, allow_extra_data=False
        )
    except zstandard.ZstdError:
        raise BadRecord("malformed", "groups are not zstd") from None


def _split_families(hashes: bytes) -> frozenset[bytes]:
    if len(hashes) % FAMILY_BYTES:
        raise BadRecord("malformed", f"expected hashes of families, {FAMILY_BYTES} bytes each")
    starts = range(0, len(hashes), FAMILY_BYTES)
    return frozenset(hashes[start : start + FAMILY_BYTES] for start in starts)
