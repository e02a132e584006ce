"""The decoders read valid messages and raise only BadRecord for others, with bounded memory."""

import asyncio
import contextlib
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgpack
import pytest
import zstandard
from hivemind.dht.validation import DHTRecord
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from swarm_lab import encode_ask

from benchmarks.swarm_nodes import prose, write_groups, write_related_groups
from worker.errors import BadRecord
from worker.records import Group, Place, Task, round_seed
from worker.settings import Swarm
from worker.swarm import identity
from worker.swarm.discovery import dht, peer_cache
from worker.swarm.exchange.verify import Verifier
from worker.swarm.protocol import messages
from worker.swarm.protocol.messages import Kind, Limits, Refused

LIMITS = Limits(num_groups=8, num_completions=4, completion_bytes=200)
SIZES = pytest.mark.parametrize(
    "num_inputs",
    [600, pytest.param(34_000, marks=[pytest.mark.nightly, pytest.mark.timeout(1800)])],
)
"""Of each kind of fuzzing; of the first three 1,800 and 102,000 in all."""
GROUPS = (
    Group(Task("sum", "c0ffee", 7, 0), ("1", "zwei", "\x1b[31m3")),
    Group(Task("sum", "c0ffee", 7, 1), ("", "\u00e9" * 100)),
)
ADDRESSES = ("/ip4/192.0.2.1/tcp/38000", "/dns4/example.org/udp/1/quic-v1")
ENVIRONMENTS = ("code 1", "reasoning-gym 0.1.25")


@pytest.fixture(scope="module")
def me(tmp_path_factory: pytest.TempPathFactory) -> identity.Identity:
    return identity.create(tmp_path_factory.mktemp("wire") / "key")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> identity.Identity:
    return identity.create(tmp_path_factory.mktemp("wire") / "key")


def fuzz(num_inputs: int, check: Callable[..., None], **strategies: st.SearchStrategy[Any]) -> None:
    """`check` on `num_inputs` inputs that hypothesis makes."""
    options = settings(
        max_examples=num_inputs,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        database=None,
    )
    options(given(**strategies)(check))()


def read(data: bytes, max_bytes: int = 10_000) -> tuple[Kind, bytes]:
    async def feed() -> tuple[Kind, bytes]:
        reader = asyncio.StreamReader()
        reader.feed_data(data)
        reader.feed_eof()
        return await messages.read_frame(reader, max_bytes)

    return asyncio.run(feed())


def seal(me: identity.Identity, body: bytes, domain: bytes = b"hivewright/groups/3\n") -> bytes:
    return msgpack.packb([me.public_key, me.sign(domain + body), body])


def seal_rows(me: identity.Identity, rows: object, round: object = 3) -> bytes:
    return seal(me, zstandard.compress(msgpack.packb([me.peer_id, round, rows])))


def test_groups_survive_the_way(me: identity.Identity) -> None:
    sealed = messages.seal_groups(me, 3, GROUPS)
    assert messages.open_groups(sealed, me.peer_id, 3, LIMITS) == GROUPS


def test_no_groups_survive_the_way(me: identity.Identity) -> None:
    assert messages.open_groups(messages.seal_groups(me, 0, ()), me.peer_id, 0, LIMITS) == ()


def test_member_survives_the_way(me: identity.Identity) -> None:
    families = messages.hash_families(f"family {i}" for i in range(99))
    assert len(families) == messages.MAX_FAMILIES
    member = messages.seal_member(me, ADDRESSES, -1, 1000, 1180, ENVIRONMENTS, families)
    assert messages.open_member(member.sealed) == member
    assert member.addresses == ADDRESSES


def test_member_with_the_longest_addresses_is_read(me: identity.Identity) -> None:
    addresses = [f"/dns/{'a' * 240}{i}/tcp/1" for i in range(12)]
    families = messages.hash_families(map(str, range(99)))
    member = messages.seal_member(
        me, addresses, 2**62, 2**40, 2**40, ["a" * 32 + " " + "1" * 31] * 4, families
    )
    assert len(messages.open_member(member.sealed).addresses) == messages.MAX_ADDRESSES


def test_ask_and_peers_survive_the_way(me: identity.Identity) -> None:
    kind, payload = read(encode_ask(5, 60, b"record"))
    asked = messages.Ask(5, Place(5, 0), 60, b"record")
    assert (kind, messages.decode_ask(payload)) == (Kind.ASK, asked)
    kind, payload = read(encode_ask(5, 60, b"record", me.peer_id))
    assert messages.decode_ask(payload).owner == me.peer_id
    kind, payload = read(messages.encode_elsewhere([b"a"] * 20))
    assert (kind, messages.decode_peers(payload)) == (Kind.ELSEWHERE, [b"a"] * messages.MAX_HOLDERS)
    kind, payload = read(messages.encode_peers([b"a"] * 20))
    assert (kind, messages.decode_peers(payload)) == (Kind.PEERS, [b"a"] * messages.MAX_PEERS)


def test_round_of_42_kb_takes_13_kb_on_the_wire_if_answers_to_a_task_have_something_in_common(
    me: identity.Identity,
) -> None:
    text = prose()
    for write, at_most in ((write_related_groups, 13_000), (write_groups, 15_600)):
        groups = write(text, me.peer_id, 0)
        assert sum(len(c) for g in groups for c in g.completions) == 9 * 8 * 600
        assert (
            len(messages.encode_frame(Kind.GROUPS, messages.seal_groups(me, 0, groups))) < at_most
        )


@pytest.mark.parametrize(
    ("reason", "round", "limits"),
    [
        ("round", 4, LIMITS),
        ("too-large", 3, Limits(1, 4, 200)),
    ],
)
def test_groups_outside_of_what_was_asked_for_are_refused(
    me: identity.Identity, reason: str, round: int, limits: Limits
) -> None:
    with pytest.raises(BadRecord) as caught:
        messages.open_groups(messages.seal_groups(me, 3, GROUPS), me.peer_id, round, limits)
    assert caught.value.reason == reason


@pytest.mark.parametrize(
    ("reason", "limits"), [("num-completions", Limits(8, 3, 200)), ("too-long", Limits(8, 4, 199))]
)
def test_group_over_the_limits_is_dropped_alone(
    me: identity.Identity, reason: str, limits: Limits
) -> None:
    seed = round_seed(me.peer_id, 3)
    over = {"num-completions": ("1", "2", "3", "4"), "too-long": ("1", "\u00e9" * 100)}[reason]
    groups = [Group(Task("sum", "x", seed, i), over if i == 1 else ("1", "2")) for i in range(3)]
    verifier = Verifier(Sums(), Swarm(), 4)
    verifier.limits = limits
    opened = messages.open_groups(messages.seal_groups(me, 3, groups), me.peer_id, 3, limits)
    scored, bad = verifier.verify_all(me.peer_id, 3, opened)
    assert [g.task.index for g in scored] == [0, 2]
    assert [error.reason for error in bad] == [reason]


class Sums:
    """As many tasks as anybody asks for."""

    versions, families = ("sums 1",), ("sum",)

    def question(self, task: Task) -> str:
        return f"{task.index}?"

    def score(self, task: Task, completions: Sequence[str]) -> list[float]:
        return [0.0] * len(completions)


def test_groups_of_another_signer_are_refused(
    me: identity.Identity, other: identity.Identity
) -> None:
    with pytest.raises(BadRecord) as caught:
        messages.open_groups(messages.seal_groups(other, 3, GROUPS), me.peer_id, 3, LIMITS)
    assert caught.value.reason == "signature"


def test_groups_that_name_another_sender_are_refused(
    me: identity.Identity, other: identity.Identity
) -> None:
    stolen = seal(me, zstandard.compress(msgpack.packb([other.peer_id, 3, []])))
    with pytest.raises(BadRecord) as caught:
        messages.open_groups(stolen, me.peer_id, 3, LIMITS)
    assert caught.value.reason == "sender"


def test_further_part_is_never_taken_for_the_part_that_earns(me: identity.Identity) -> None:
    sealed = messages.seal_groups(me, 3, GROUPS, part=2)
    served = messages.open_served(sealed, me.peer_id, LIMITS)
    assert (served.place, served.groups) == (Place(3, 2), GROUPS)
    with pytest.raises(BadRecord, match="part 2 of the round; expected 0") as caught:
        messages.open_groups(sealed, me.peer_id, 3, LIMITS)
    assert caught.value.reason == "round"
    for fields in ([3, []], [3, [], 0], [3, [], 256]):
        body = zstandard.compress(msgpack.packb([me.peer_id, *fields]))
        with pytest.raises(BadRecord) as caught:
            messages.open_served(seal(me, body, b"hivewright/part/4\n"), me.peer_id, LIMITS)
        assert caught.value.reason == "malformed"


def test_request_covers_what_is_newer_than_the_oldest_and_of_no_later_round() -> None:
    ask = messages.Ask(7, Place(5, 3), 0, b"")
    covered = [p for p in map(Place, (5, 5, 6, 7, 8), (2, 3, 0, 9, 0)) if ask.covers(p)]
    assert covered == [(5, 3), (6, 0), (7, 9)]


def test_member_record_is_no_groups_message(me: identity.Identity) -> None:
    body = zstandard.compress(msgpack.packb([me.peer_id, 3, []]))
    with pytest.raises(BadRecord) as caught:
        messages.open_groups(seal(me, body, domain=b"hivewright/member/3\n"), me.peer_id, 3, LIMITS)
    assert caught.value.reason == "signature"


# Decodes what comes on its standard input, and says why not each time, and how many bytes of memory
# all that took: of its address space, which nothing that is allocated escapes, Python's, msgpack's
# or zstd's.
_DECODE_ALONE = """
import sys
from pathlib import Path
import msgpack
from worker.errors import BadRecord
from worker.swarm.protocol import messages

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmPeak"))

def decode_dht(data):
    return dht._FlatSerializer.loads(data)

peer_id = sys.argv[1]
decoders = {
    "groups": lambda data: messages.open_groups(data, peer_id, 3, messages.Limits(8, 4, 200)),
    "member": messages.open_member,
    "ask": messages.decode_ask,
    "peers": messages.decode_peers,
    "dht": decode_dht,
}
cases = msgpack.unpack(sys.stdin.buffer)
if any(name == "dht" for name, _ in cases):
    from worker.swarm.discovery import dht  # takes seconds
before = peak()
for name, data in cases:
    try:
        decoders[name](data)
        print("read")
    except BadRecord as error:
        print(error.reason)
print(peak() - before)
"""


def decode_alone(me: identity.Identity, *cases: tuple[str, bytes]) -> tuple[set[str], int]:
    """Return the reason of refusal and the peak memory in bytes for pairs of decoder and data.

    It runs in a process of its own, since threads and garbage of other tests would be measured too.
    """
    answer = subprocess.run(
        [sys.executable, "-c", _DECODE_ALONE, me.peer_id],
        input=msgpack.packb(cases),
        capture_output=True,
        check=True,
        timeout=120,
    )
    *reasons, num_bytes = answer.stdout.decode().split()
    assert len(reasons) == len(cases)
    return set(reasons), int(num_bytes)


@pytest.mark.parametrize("claim_size", [True, False])
def test_decompression_bomb_is_refused_in_little_memory(
    me: identity.Identity, claim_size: bool
) -> None:
    compressor = zstandard.ZstdCompressor(write_content_size=claim_size)
    bomb = seal(me, compressor.compress(bytes(500 << 20)))
    assert len(bomb) < 100_000
    reasons, num_bytes = decode_alone(me, ("groups", bomb))
    assert reasons == {"too-large"}
    assert num_bytes < 20 << 20


def nest(leaf: bytes, width: int, num_bytes: int) -> bytes:
    """Return nested lists of `width`, in `num_bytes` at most, full of `leaf`."""
    header = b"\xdc" + width.to_bytes(2, "big")
    inner = header + leaf * width
    while len(header) + len(inner) * width <= num_bytes:
        inner = header + inner * width
    count = (num_bytes - 3) // len(inner)
    return b"\xdc" + count.to_bytes(2, "big") + inner * count


LEAVES = (b"\x90", b"\x80", b"\xa2\xc3\xa9", b"\xcd\x7f\xff")
"""Lists, maps, texts, numbers."""


def test_bomb_of_objects_is_refused_in_little_memory(me: identity.Identity) -> None:
    """1,400 bytes on the wire are hundreds of megabytes for a decoder that builds first."""
    message = b"\x93" + msgpack.packb(me.peer_id) + b"\x03"
    completions = message + b"\x91\x95\xa1f\xa1c\x01\x01"
    bombs = [
        seal(me, zstandard.compress(before + nest(leaf, 1024, 8_380_000)))
        for leaf in LEAVES
        for before in (b"", message, message + b"\x91", completions, completions + b"\x91")
    ]
    assert max(map(len, bombs)) < 5000
    reasons, num_bytes = decode_alone(me, *(("groups", bomb) for bomb in bombs))
    assert reasons <= {"malformed", "too-large"}
    assert num_bytes < 32 << 20  # 8 MiB decompressed, and again in the decoder


def test_bomb_of_objects_without_a_signature_is_refused_in_little_memory(
    me: identity.Identity,
) -> None:
    sizes = [
        ("groups", 2 << 20),
        ("member", 3584),
        ("ask", 3700),
        ("peers", 2 << 20),
        ("dht", 3 << 20),
        ("dht", 230_000),
    ]
    bombs = [
        (decoder, nest(leaf, 16, num_bytes)) for decoder, num_bytes in sizes for leaf in LEAVES
    ]
    reasons, num_bytes = decode_alone(me, *bombs)
    assert reasons <= {"malformed", "too-large"}
    assert num_bytes < 8 << 20


def test_message_that_goes_on_after_its_end_is_malformed(me: identity.Identity) -> None:
    member = messages.seal_member(me, ADDRESSES, 3, 1000, 1180, ENVIRONMENTS).sealed
    _, _, body = msgpack.unpackb(member)
    groups = zstandard.compress(msgpack.packb([me.peer_id, 3, []]) + b"\x90")
    for decode in (
        lambda: messages.open_member(member + b"\x90"),
        lambda: messages.open_member(seal(me, body + b"\x90", b"hivewright/member/3\n")),
        lambda: messages.decode_ask(encode_ask(3, 9, member)[messages.HEADER_BYTES :] + b"\x90"),
        lambda: messages.decode_peers(
            messages.encode_peers([member])[messages.HEADER_BYTES :] + b"\x90"
        ),
        lambda: messages.open_groups(seal(me, groups), me.peer_id, 3, LIMITS),
    ):
        with pytest.raises(BadRecord) as caught:
            decode()
        assert caught.value.reason == "malformed"


@pytest.mark.parametrize(
    ("kind", "at_most"),
    [
        (Kind.HELLO, 3584),
        (Kind.PEERS, 58_000),
        (Kind.ASK, 3800),
        (Kind.WAIT, 0),
        (Kind.ELSEWHERE, 11_000),
        (Kind.AUDIT, 32),
    ],
)
def test_frame_that_is_larger_than_its_kind_ever_is_is_refused(kind: Kind, at_most: int) -> None:
    with pytest.raises(BadRecord) as caught:
        read(messages.encode_frame(kind, bytes(at_most + 1)), messages.MAX_FRAME_BYTES)
    assert caught.value.reason == "too-large"


def test_largest_messages_are_read(me: identity.Identity) -> None:
    record = bytes(messages.MAX_MEMBER_BYTES)
    for frame in (
        messages.encode_frame(Kind.HELLO, record),
        encode_ask(2**63 - 1, messages.MAX_PATIENCE_SECONDS, record, "Q" * 64),
        messages.encode_peers([record] * messages.MAX_PEERS),
        messages.encode_elsewhere([record] * messages.MAX_HOLDERS),
        messages.encode_audit("00" * 32),
    ):
        assert read(frame, messages.MAX_FRAME_BYTES)[1] == frame[messages.HEADER_BYTES :]


@pytest.mark.parametrize(
    "rows",
    [
        None,
        True,
        "rows",
        [None],
        [[]],
        [["sum", "x", 7, 0]],
        [["sum", "x", 7, 0, ["a"], "more"]],
        [["sum", "x", 7, 0, "text"]],
        [["sum", "x", 7, 0, [b"bytes"]]],
        [["sum", "x", 7, 0, [1]]],
        [["sum", "x", 7, True, ["a"]]],
        [["sum", "x", 7, -1, ["a"]]],
        [["sum", "x", 7.0, 0, ["a"]]],
        [["sum", "x", 2**63, 0, ["a"]]],
        [["sum", None, 7, 0, ["a"]]],
        [{"family": "sum"}],
        [["sum", "x", 7, 0, [msgpack.ExtType(5, b"x")]]],
        [["sum", "x", 7, 0, [msgpack.Timestamp(1)]]],
    ],
)
def test_wrongly_typed_groups_are_malformed(me: identity.Identity, rows: object) -> None:
    with pytest.raises(BadRecord) as caught:
        messages.open_groups(seal_rows(me, rows), me.peer_id, 3, LIMITS)
    assert caught.value.reason == "malformed"


def test_text_that_is_not_utf8_is_malformed(me: identity.Identity) -> None:
    body = msgpack.packb([me.peer_id, 3, [["sum", "x", 7, 0, ["PLACE"]]]]).replace(
        b"PLACE", b"\xff\xfe\xc0\x80\xed"
    )
    with pytest.raises(BadRecord) as caught:
        messages.open_groups(seal(me, zstandard.compress(body)), me.peer_id, 3, LIMITS)
    assert caught.value.reason == "malformed"


@pytest.mark.parametrize("opener", [b"\x91", b"\xdc\x04\x00", b"\xdd\x00\x00\x04\x00", b"\x81\xc0"])
def test_deep_nesting_is_malformed(me: identity.Identity, opener: bytes) -> None:
    with pytest.raises(BadRecord) as caught:
        messages.open_groups(seal(me, zstandard.compress(opener * 200_000)), me.peer_id, 3, LIMITS)
    assert caught.value.reason == "malformed"


@pytest.mark.parametrize(
    "addresses",
    [
        ["192.0.2.1:38000"],
        ["/ip4/192.0.2.1"],
        ["/unix/tmp/socket"],
        ["/ip4/192.0.2.1/tcp/38000\n"],
        ["/ip4/192.0.2.1,/ip4/192.0.2.2/tcp/1"],
        ["/ip4/" + "1" * 300 + "/tcp/1"],
        [None],
        ["/ip4/192.0.2.1/tcp/38000"] * 17,
        None,
    ],
)
def test_member_with_odd_addresses_is_refused(me: identity.Identity, addresses: object) -> None:
    body = msgpack.packb([me.peer_id, addresses, 0, 1, 0, 0, [], b""])
    with pytest.raises(BadRecord, match=r"expected|not a valid message"):
        messages.open_member(seal(me, body, domain=b"hivewright/member/3\n"))


def test_odd_address_of_ours_is_left_out_of_the_record(me: identity.Identity) -> None:
    odd = [
        "/unix/tmp/socket",
        "/ip4/192.0.2.1",
        "/ip4/192.0.2.1/tcp/1/\x1b[2J",
        "/ip6/fe80::1%eth0/tcp/1",
    ]
    member = messages.seal_member(
        me, [*odd, *ADDRESSES, "/ip4/" + "1" * 300 + "/tcp/1"], 0, 1000, 1180, ENVIRONMENTS
    )
    assert messages.open_member(member.sealed).addresses == member.addresses == ADDRESSES


@pytest.mark.parametrize("families", [b"abc", b"abcd" * 65, "abcd", None, [b"abcd"]])
def test_member_with_odd_families_is_malformed(me: identity.Identity, families: object) -> None:
    body = msgpack.packb([me.peer_id, [], 0, 3, 0, 0, [], families])
    with pytest.raises(BadRecord) as caught:
        messages.open_member(seal(me, body, domain=b"hivewright/member/3\n"))
    assert caught.value.reason == "malformed"


@pytest.mark.parametrize(
    "environments",
    [["reasoning-gym"], ["x 1\n"], ["x " + "1" * 40], [1], ["x 1"] * 17, None, "x 1"],
)
def test_member_with_odd_environments_is_malformed(
    me: identity.Identity, environments: object
) -> None:
    body = msgpack.packb([me.peer_id, [], 0, 2, 0, 0, environments, b""])
    with pytest.raises(BadRecord) as caught:
        messages.open_member(seal(me, body, domain=b"hivewright/member/3\n"))
    assert caught.value.reason == "malformed"


def test_member_record_of_another_peer_is_refused(
    me: identity.Identity, other: identity.Identity
) -> None:
    body = msgpack.packb([other.peer_id, [], 0, 1, 0, 0, [], b""])
    with pytest.raises(BadRecord) as caught:
        messages.open_member(seal(me, body, domain=b"hivewright/member/3\n"))
    assert caught.value.reason == "signature"


def test_newer_version_is_refused_with_both_versions_named() -> None:
    newer = bytearray(messages.encode_frame(Kind.HELLO, b""))
    newer[2] = 5
    with pytest.raises(
        BadRecord, match="version 5; this node speaks 4, upgrade the older of the two"
    ) as caught:
        read(bytes(newer))
    assert caught.value.reason == "version"


def test_refusal_of_a_newer_version_is_understood() -> None:
    newer = bytearray(
        messages.encode_refusal(
            "version", "version 1; this node speaks 9, upgrade the older of the two"
        )
    )
    newer[2] = 9
    with pytest.raises(Refused, match="this node speaks 9") as caught:
        read(bytes(newer))
    assert caught.value.reason == "version"


def test_frame_over_the_limit_is_refused_before_it_is_read() -> None:
    header = messages.encode_frame(Kind.GROUPS, b"")[:4] + (4_000_000_000).to_bytes(4, "big")
    with pytest.raises(BadRecord) as caught:
        read(header)
    assert caught.value.reason == "too-large"


def check_all(data: bytes, peer_id: str) -> None:
    """Give every decoder the same bytes; only BadRecord, Refused or an early end are permitted."""
    for decode in (
        messages.open_member,
        messages.decode_ask,
        messages.decode_peers,
        lambda d: messages.open_groups(d, peer_id, 3, LIMITS),
        read,
    ):
        with contextlib.suppress(BadRecord, Refused, asyncio.IncompleteReadError):
            decode(data)


@SIZES
def test_random_bytes_are_refused(me: identity.Identity, num_inputs: int) -> None:
    def check(data: bytes) -> None:
        check_all(data, me.peer_id)
        check_all(b"hw\x04" + data, me.peer_id)

    fuzz(num_inputs, check, data=st.binary(max_size=300))


@pytest.fixture(scope="module")
def sealed_messages(me: identity.Identity) -> list[bytes]:
    member = messages.seal_member(
        me, ADDRESSES, 3, 1000, 1180, ENVIRONMENTS, messages.hash_families(["sum x"])
    ).sealed
    return [
        member,
        messages.seal_groups(me, 3, GROUPS),
        encode_ask(3, 9, member),
        encode_ask(3, 9, member, me.peer_id)[8:],
        messages.encode_peers([member, member])[8:],
        messages.encode_refusal("full", "ask somebody else"),
    ]


@SIZES
def test_mutated_messages_are_refused_or_read(
    me: identity.Identity, sealed_messages: list[bytes], num_inputs: int
) -> None:
    def check(choice: int, edits: list[Edit], cut: int | None) -> None:
        check_all(edit(sealed_messages[choice], edits)[:cut], me.peer_id)

    fuzz(
        num_inputs,
        check,
        choice=st.integers(0, 5),
        edits=EDITS,
        cut=st.none() | st.integers(0, 1000),
    )


Edit = tuple[int, bytes, int]
"""Where, what is put there, and how many bytes go."""
EDITS = st.lists(
    st.tuples(st.integers(0, 4000), st.binary(max_size=6), st.integers(0, 6)), max_size=4
)


def edit(data: bytes, edits: list[Edit]) -> bytes:
    for place, replacement, removed in edits:
        place %= len(data) + 1
        data = data[:place] + replacement + data[place + removed :]
    return data


@SIZES
def test_mutated_bodies_that_are_signed_are_refused_or_read(
    me: identity.Identity, num_inputs: int
) -> None:
    """A peer that signs nonsense reaches more code than one that changes what others signed."""
    rows = [
        [g.task.family, g.task.config_digest, g.task.seed, g.task.index, list(g.completions)]
        for g in GROUPS
    ]
    packed = msgpack.packb([me.peer_id, 3, rows])
    groups, member = "hivewright/groups/3\n", "hivewright/member/3\n"
    _, _, record = msgpack.unpackb(
        messages.seal_member(me, ADDRESSES, 3, 1000, 1180, ENVIRONMENTS).sealed
    )
    refused = Counter[str]()

    def check(where: str, edits: list[Edit]) -> None:
        body, domain = {
            "zstd": lambda: (edit(zstandard.compress(packed), edits), groups),
            "packed": lambda: (zstandard.compress(edit(packed, edits)), groups),
            "member": lambda: (edit(record, edits), member),
        }[where]()
        sealed = seal(me, body, domain.encode())
        try:
            (
                messages.open_member(sealed)
                if domain == member
                else messages.open_groups(sealed, me.peer_id, 3, LIMITS)
            )
        except BadRecord as error:
            refused[f"{where} {error.reason}"] += 1

    fuzz(num_inputs, check, where=st.sampled_from(["zstd", "packed", "member"]), edits=EDITS)
    assert {"zstd malformed", "packed malformed", "member malformed"} <= set(refused)


@SIZES
def test_mutated_values_of_the_dht_are_refused_or_read(
    me: identity.Identity, num_inputs: int
) -> None:
    sealed = messages.seal_member(me, ADDRESSES, 3, 1000, 1180, ENVIRONMENTS).sealed
    held = dht.DictionaryDHTValue()
    with held.freeze():
        held.store(me.peer_id, msgpack.packb(sealed), 1180.0)
    loads, validator, top = (
        dht._FlatSerializer.loads,
        dht._MemberValidator(),
        next(iter(dht._bucket_depths())),
    )
    stored = [dht._FlatSerializer.dumps(held), msgpack.packb(sealed), msgpack.packb(me.peer_id)]
    assert dict(loads(stored[0]).items()) == dict(held.items())

    def check(choice: int, edits: list[Edit], random: bytes | None) -> None:
        data = edit(stored[choice], edits) if random is None else random
        with contextlib.suppress(BadRecord):
            loads(data)
        validator.validate(DHTRecord(top, stored[2], data, 1180.0))

    fuzz(
        num_inputs,
        check,
        choice=st.integers(0, 2),
        edits=EDITS,
        random=st.none() | st.binary(max_size=100),
    )


@SIZES
def test_mutated_cache_is_ignored_or_read(tmp_path: Path, num_inputs: int) -> None:
    path = tmp_path / "peers.json"
    peer_cache.save(
        path,
        peer_cache.Cache(
            4001, ("/ip4/127.0.0.1/tcp/1/p2p/QmA",), ("/ip4/127.0.0.1/tcp/2/p2p/QmB",)
        ),
    )
    saved = path.read_bytes()

    def check(edits: list[Edit], value: object) -> None:
        path.write_bytes(edit(saved, edits) if value is None else json.dumps(value).encode())
        read = peer_cache.load(path)
        assert 0 <= read.port <= 65535
        assert all(isinstance(text, str) for text in read.peers + read.bootnodes)

    anything = st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
        lambda inner: (
            st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
        ),
        max_leaves=9,
    )
    numbers = st.integers() | st.floats() | st.just(float("inf"))
    parts = st.fixed_dictionaries(
        {"port": numbers | anything, "peers": anything}, optional={"bootnodes": anything}
    )
    fuzz(num_inputs, check, edits=EDITS, value=st.none() | parts | anything)


scalars = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats()
values = st.recursive(
    scalars | st.text(max_size=20) | st.binary(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=6) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=25,
)


@SIZES
def test_any_signed_value_is_refused_or_read(me: identity.Identity, num_inputs: int) -> None:
    def check(value: object, as_rows: bool) -> None:
        body = msgpack.packb([me.peer_id, 3, value] if as_rows else value)
        for domain, data in (
            (b"hivewright/groups/3\n", zstandard.compress(body)),
            (b"hivewright/member/3\n", body),
        ):
            check_all(seal(me, data, domain), me.peer_id)
        check_all(body, me.peer_id)

    fuzz(num_inputs, check, value=values, as_rows=st.booleans())


group_lists = st.lists(
    st.builds(
        Group,
        st.builds(
            Task,
            st.text(max_size=20),
            st.text(max_size=20),
            st.integers(0, 2**31),
            st.integers(0, 100),
        ),
        st.lists(st.text(max_size=40), max_size=4).map(tuple),
    ),
    max_size=8,
)


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck), database=None)
@given(groups=group_lists, round=st.integers(0, 2**62))
def test_any_groups_survive_the_way(me: identity.Identity, groups: list[Group], round: int) -> None:
    sealed = messages.seal_groups(me, round, groups)
    assert messages.open_groups(sealed, me.peer_id, round, LIMITS) == tuple(groups)


def test_nothing_is_pickled() -> None:
    for path in Path(messages.__file__).parent.glob("*.py"):
        assert "import pickle" not in path.read_text()
