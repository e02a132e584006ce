"""The key of a node: made once, never over another, one with libp2p's own format."""

import stat
import threading
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from hivemind.p2p import P2P, PeerID

from worker.errors import IdentityError
from worker.swarm import identity


def test_created_key_loads_as_the_same_peer(tmp_path: Path) -> None:
    path = tmp_path / "new" / "swarm.pem"
    made = identity.create(path)
    assert identity.load(path).peer_id == made.peer_id
    assert identity.load(path).public_key == made.public_key
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [p.name for p in path.parent.iterdir()] == ["swarm.pem"]


def test_peer_id_is_that_of_libp2p(tmp_path: Path) -> None:
    made = identity.create(tmp_path / "swarm.pem")
    assert made.peer_id == PeerID.from_identity((tmp_path / "swarm.pem").read_bytes()).to_base58()
    assert made.peer_id.startswith("Qm")


def test_key_of_the_existing_swarm_is_read(tmp_path: Path) -> None:
    path = tmp_path / "swarm.pem"
    P2P.generate_identity(str(path))
    assert identity.load(path).peer_id == PeerID.from_identity(path.read_bytes()).to_base58()


def test_create_over_an_existing_key_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "swarm.pem"
    identity.create(path)
    before = path.read_bytes()
    with pytest.raises(IdentityError, match="already exists; an identity is created once"):
        identity.create(path)
    assert path.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


def test_two_creators_at_once_make_one_key(tmp_path: Path) -> None:
    path, outcomes = tmp_path / "swarm.pem", []

    def create() -> None:
        try:
            outcomes.append(identity.create(path).peer_id)
        except IdentityError:
            outcomes.append("refused")

    threads = [threading.Thread(target=create) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes)[1:] == ["refused"] * 3
    assert identity.load(path).peer_id == sorted(outcomes)[0]


def test_missing_key_is_an_error_and_makes_no_file(tmp_path: Path) -> None:
    path = tmp_path / "swarm.pem"
    with pytest.raises(IdentityError) as caught:
        identity.load(path)
    assert str(caught.value) == (
        f"identity missing: {path}: no such file; "
        "restore the key from its backup, or run `hivewright enrol` for a new node"
    )
    assert list(tmp_path.iterdir()) == []


def _elliptic_key() -> bytes:
    key = ec.generate_private_key(ec.SECP256R1())
    der = key.private_bytes(
        serialization.Encoding.DER,
        serialization.PrivateFormat.TraditionalOpenSSL,
        serialization.NoEncryption(),
    )
    return b"\x08\x00\x12" + bytes([len(der)]) + der


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x08\x00\x12",
        b"-----BEGIN RSA PRIVATE KEY-----\n",
        b"\x08\x00\x12\x03abc",
        _elliptic_key(),
    ],
)
def test_file_that_is_no_rsa_key_is_an_error(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "swarm.pem"
    path.write_bytes(data)
    with pytest.raises(IdentityError, match=f"{len(data)} bytes that are not a libp2p RSA key"):
        identity.load(path)


@pytest.mark.parametrize(("bits", "exponent"), [(1024, 65537), (2048, 3)])
def test_key_that_no_peer_accepts_is_an_error(tmp_path: Path, bits: int, exponent: int) -> None:
    key = rsa.generate_private_key(public_exponent=exponent, key_size=bits)  # type: ignore[arg-type]
    der = key.private_bytes(
        serialization.Encoding.DER,
        serialization.PrivateFormat.TraditionalOpenSSL,
        serialization.NoEncryption(),
    )
    (tmp_path / "swarm.pem").write_bytes(b"\x08\x00\x12" + identity.varint(len(der)) + der)
    with pytest.raises(
        IdentityError,
        match=f"RSA key of {bits} bits, which peers refuse; expected 2048 to 4096 bits",
    ):
        identity.load(tmp_path / "swarm.pem")


def test_half_a_key_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "swarm.pem"
    identity.create(path)
    path.write_bytes(path.read_bytes()[:600])
    with pytest.raises(IdentityError, match="600 bytes that are not a libp2p RSA key"):
        identity.load(path)


def test_signature_holds_for_its_signer_and_data_only(tmp_path: Path) -> None:
    mine, other = identity.create(tmp_path / "a"), identity.create(tmp_path / "b")
    signature = mine.sign(b"data")
    assert identity.verify(mine.peer_id, mine.public_key, b"data", signature)
    assert not identity.verify(mine.peer_id, mine.public_key, b"other", signature)
    assert not identity.verify(other.peer_id, other.public_key, b"data", signature)
    assert not identity.verify(mine.peer_id, other.public_key, b"data", other.sign(b"data"))
    assert not identity.verify(
        mine.peer_id, mine.public_key, b"data", signature[:-1] + bytes([signature[-1] ^ 1])
    )
    assert not identity.verify(mine.peer_id, mine.public_key, b"data", b"")


@pytest.mark.parametrize(("bits", "exponent"), [(1024, 65537), (2048, 3)])
def test_weak_key_of_an_outsider_is_refused(bits: int, exponent: int) -> None:
    outsider = identity.Identity(rsa.generate_private_key(public_exponent=exponent, key_size=bits))  # type: ignore[arg-type]
    assert not identity.verify(
        outsider.peer_id, outsider.public_key, b"data", outsider.sign(b"data")
    )


@pytest.mark.parametrize(
    "public_key",
    [b"", b"\x08\x00\x12\x00", b"\x08\x01\x12\x20" + b"a" * 32, b"\x08\x00\x12\x7f" + b"b" * 127],
)
def test_public_key_that_is_none_is_refused(public_key: bytes) -> None:
    assert not identity.verify(identity.peer_id_of(public_key), public_key, b"data", b"signature")


def test_animal_name_is_three_words_and_stable() -> None:
    name = identity.animal_name("QmExample")
    assert name == identity.animal_name("QmExample")
    assert len(name.split()) == 3
    assert len({identity.animal_name(f"Qm{i}") for i in range(500)}) > 495
