"""Single values of settings: what is accepted, and what a refusal says."""

import pytest
from pydantic import TypeAdapter, ValidationError

from worker.settings.value_types import (
    Address,
    Decay,
    Fraction,
    Host,
    Multiaddr,
    Network,
    PeerId,
    PeerMultiaddr,
    Port,
    Section,
    Url,
    Urls,
    Weight,
    is_host,
    shorten,
)

PEER = "QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N"

VALID = [
    (Host, "node-1.example.org."),
    (Host, "_service.example"),
    (Host, "192.0.2.1"),
    (Host, "2001:db8::1"),
    (Network, "10.0.0.0/8"),
    (Network, "2001:db8::/32"),
    (Network, "192.0.2.1"),
    (Multiaddr, "/ip4/192.0.2.1/tcp/38000"),
    (Multiaddr, "/ip6/::1/tcp/65535"),
    (Multiaddr, "/dns4/example.org/udp/0/quic-v1"),
    (Multiaddr, f"/dns/example.org/tcp/1/p2p/{PEER}"),
    (PeerMultiaddr, f"/ip4/192.0.2.1/tcp/1/p2p/{PEER}"),
    (PeerId, "1" * 16),
    (PeerId, "z" * 64),
    (Address, "0x" + "aF" * 20),
    (Url, "https://example.org/path?x=1"),
    (Port, 0),
    (Port, 65535),
    (Fraction, 1.0),
    (Decay, 0.0),
    (Weight, 8.0),
]

INVALID = [
    (Host, "", "expected a name or an address"),
    (Host, "http://example.org", "without http:// and port"),
    (Host, "example.org:80", "without http:// and port"),
    (Host, "[::1]", "expected a name or an address"),
    (Host, "-dash.example", "expected a name or an address"),
    (Host, "dash-.example", "expected a name or an address"),
    (Host, "two..dots", "expected a name or an address"),
    (Host, "a" * 64, "expected a name or an address"),
    (Network, "10.0.0.1/8", "expected a network such as 10.0.0.0/8"),
    (Network, "10.0.0.0/33", "expected a network such as 10.0.0.0/8"),
    (Multiaddr, "192.0.2.1:38000", "expected an address such as /ip4/192.0.2.1/tcp/38000"),
    (Multiaddr, "/ip4/192.0.2.256/tcp/1", "expected an address such as"),
    (Multiaddr, "/ip4/::1/tcp/1", "expected an address such as"),
    (Multiaddr, "/ip6/192.0.2.1/tcp/1", "expected an address such as"),
    (Multiaddr, "/ip4/192.0.2.1/tcp/65536", "expected an address such as"),
    (Multiaddr, "/ip4/192.0.2.1/tcp/", "expected an address such as"),
    (Multiaddr, "/ip4/192.0.2.1/tcp/1\n", "expected an address such as"),
    (PeerMultiaddr, "/ip4/192.0.2.1/tcp/1", "expected /p2p/ and the peer id at its end"),
    (PeerMultiaddr, "/ip4/192.0.2.1/tcp/1/p2p/short", "short is not a peer id"),
    (PeerMultiaddr, f"/ip4/192.0.2.1/tcp/1/p2p/0{PEER}", "is not a peer id"),
    (PeerId, "0" * 16, "pattern"),
    (PeerId, "1" * 15, "pattern"),
    (PeerId, "1" * 65, "pattern"),
    (Address, "0x" + "a" * 39, "pattern"),
    (Address, "a" * 40, "pattern"),
    (Url, "ftp://example.org", "pattern"),
    (Url, "http://two words", "pattern"),
    (Port, -1, "greater than or equal to 0"),
    (Port, 65536, "less than or equal to 65535"),
    (Fraction, 1.001, "less than or equal to 1"),
    (Decay, 1.0, "less than 1"),
    (Weight, 8.5, "less than or equal to 8"),
]


@pytest.mark.parametrize(("kind", "value"), VALID)
def test_value_is_taken_as_it_is(kind, value) -> None:
    assert TypeAdapter(kind).validate_python(value) == value


@pytest.mark.parametrize(("kind", "value", "reason"), INVALID)
def test_value_is_refused_with_its_reason(kind, value, reason) -> None:
    with pytest.raises(ValidationError) as refusal:
        TypeAdapter(kind).validate_python(value)
    assert reason in refusal.value.errors()[0]["msg"]


@pytest.mark.parametrize(
    ("value", "urls"),
    [
        ("http://a", ("http://a",)),
        (["http://a", "https://b"], ("http://a", "https://b")),
        (("http://a",), ("http://a",)),
    ],
)
def test_one_url_is_a_list_of_one(value, urls) -> None:
    assert TypeAdapter(Urls).validate_python(value) == urls


@pytest.mark.parametrize("value", [[], (), None, 7, {"http://a": 1}, ["http://a", "b"]])
def test_urls_are_one_or_more(value) -> None:
    with pytest.raises(ValidationError):
        TypeAdapter(Urls).validate_python(value)


def test_long_values_are_cut_in_messages() -> None:
    assert shorten("x" * 58) == repr("x" * 58)
    assert shorten("x" * 59) == "'" + "x" * 56 + "..."
    with pytest.raises(ValidationError, match=r"got 'x{56}\.\.\.; expected a name"):
        TypeAdapter(Host).validate_python("x" * 500)


@pytest.mark.parametrize("text", ["127.1", "1.2.3.4.5", "300.1.1.1"])
def test_odd_numbers_are_names_rather_than_addresses(text) -> None:
    assert is_host(text)


class Example(Section):
    """A section with one number."""

    number: float = 0.0


@pytest.mark.parametrize(
    "raw", [{"number": "1"}, {"number": True}, {"number": float("nan")}, {"other": 1}]
)
def test_sections_take_exact_types_and_known_keys_only(raw) -> None:
    with pytest.raises(ValidationError):
        Example.model_validate(raw)


def test_sections_can_not_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Example().number = 1.0
