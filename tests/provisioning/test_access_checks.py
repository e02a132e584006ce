"""How a host is connected to: values at which pyinfra or paramiko would end the run of all."""

import base64
import hashlib
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519, rsa
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from pyinfra_hosts import host

from deploys.inventory.access_checks import access_mistakes, located, wrong_types

EXPECTED_HOST = "expected a name or an address, without a port (ssh_port)"


def mistakes(**data: Any) -> list[str]:
    beginning = "inventory data of gpu-1: "
    found = list(access_mistakes(host(**data)))
    assert all(line.startswith(beginning) for line in found)
    return [line.removeprefix(beginning) for line in found]


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make private keys: plain and with the passphrase `secret`, and files without a key."""
    folder = tmp_path_factory.mktemp("keys")
    encryption: serialization.KeySerializationEncryption
    for name, password in (("plain", None), ("sealed", b"secret")):
        encryption = serialization.NoEncryption()
        if password:
            builder = serialization.PrivateFormat.OpenSSH.encryption_builder()
            encryption = builder.kdf_rounds(1).build(password)
        (folder / name).write_bytes(
            ed25519.Ed25519PrivateKey.generate().private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, encryption
            )
        )
    of_rsa = rsa.generate_private_key(65537, 2048)
    (folder / "pkcs8").write_bytes(
        of_rsa.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    cut_off = base64.b64decode("".join((folder / "plain").read_text().splitlines()[1:-1]))[:-57]
    (folder / "cut").write_text(_as_pem(cut_off))
    (folder / "damaged").write_text(_as_pem(cut_off[:39] + b"X" + cut_off[40:]))
    (folder / "empty").write_bytes(b"")
    (folder / "noise").write_bytes(bytes(range(256)))
    (folder / "public.pub").write_text("ssh-ed25519 AAAA operator@here\n")
    return folder


def _as_pem(content: bytes) -> str:
    text = base64.encodebytes(content).decode()
    return f"-----BEGIN OPENSSH PRIVATE KEY-----\n{text}-----END OPENSSH PRIVATE KEY-----\n"


@pytest.mark.parametrize(
    "data",
    [
        {},
        {"ssh_hostname": "192.0.2.1", "ssh_port": 1, "ssh_user": "admin"},
        {"ssh_hostname": "2001:db8::1", "ssh_port": 65535},
        {"ssh_hostname": "bücher.example"},
        {"_sudo": True, "_sudo_user": "root", "_timeout": 10},
        {"ssh_key": None, "ssh_port": None} | {"ssh_password": "secret"},
    ],
)
def test_usual_ways_to_a_host_are_right(data: dict[str, Any]) -> None:
    given = {key: value for key, value in data.items() if value is not None}
    assert mistakes(**given) == []


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"ssh_port": 0}, "ssh_port: got 0; expected a port from 1 to 65535"),
        ({"ssh_port": 65536}, "ssh_port: got 65536; expected a port from 1 to 65535"),
        ({"ssh_port": -22}, "ssh_port: got -22; expected a port from 1 to 65535"),
        ({"ssh_port": "22"}, "ssh_port: got '22'; expected int"),
        ({"ssh_hostname": "gpu-1:22"}, f"ssh_hostname: got 'gpu-1:22'; {EXPECTED_HOST}"),
        ({"ssh_hostname": "root@gpu-1"}, f"ssh_hostname: got 'root@gpu-1'; {EXPECTED_HOST}"),
        ({"ssh_hostname": ""}, f"ssh_hostname: got ''; {EXPECTED_HOST}"),
        ({"ssh_hostname": "a" * 64}, f"ssh_hostname: got {'a' * 64!r}; {EXPECTED_HOST}"),
        ({"ssh_hostname": 7}, "ssh_hostname: got 7; expected str"),
        ({"ssh_user": ["root"]}, "ssh_user: got ['root']; expected str"),
        ({"_sudo": "yes"}, "_sudo: got 'yes'; expected bool"),
        ({"_timeout": "10"}, "_timeout: got '10'; expected int"),
        ({"ssh_password": 1234}, "ssh_password: got int; expected str"),
        ({"_sudo_password": 1234}, "_sudo_password: got int; expected str"),
        (
            {"ssh_paramiko_connect_kwargs": "secret"},
            "ssh_paramiko_connect_kwargs: got str; expected dict",
        ),
    ],
)
def test_value_at_which_pyinfra_would_end_is_named(data: dict[str, Any], message: str) -> None:
    assert mistakes(**data) == [message]


def test_private_key_is_right(keys: Path) -> None:
    assert mistakes(ssh_key=str(keys / "plain")) == []


@hypothesis_settings(max_examples=15, deadline=None, database=None)
@given(start=st.integers(0, 260), length=st.integers(0, 30), byte=st.integers(0, 255))
def test_damaged_key_is_a_line_or_still_a_key(
    keys: Path, start: int, length: int, byte: int
) -> None:
    """The parser of paramiko fails in many ways, and pyinfra would end at some of them."""
    content = base64.b64decode("".join((keys / "plain").read_text().splitlines()[1:-1]))
    damaged = content[:start] + bytes([byte]) + content[start + length :]
    file = keys / f"damaged-{hashlib.sha256(damaged).hexdigest()[:16]}"
    file.write_text(_as_pem(damaged))
    found = mistakes(ssh_key=str(file))
    assert [line for line in found if not line.startswith("ssh_key: ")] == []
    assert len(found) <= 1


def test_key_with_a_passphrase_needs_it(keys: Path) -> None:
    sealed = str(keys / "sealed")
    assert mistakes(ssh_key=sealed, ssh_key_password="secret") == []
    for data in ({}, {"ssh_key_password": ""}, {"ssh_key_password": "wrong"}):
        (line,) = mistakes(ssh_key=sealed, **data)
        assert line.startswith("ssh_key: ")
        assert line.endswith("; expected the file of a private key")
        assert "wrong" not in line


@pytest.mark.parametrize(
    "name", ["cut", "damaged", "pkcs8", "empty", "noise", "public.pub", "nowhere", "", "a\0b"]
)
def test_file_that_is_no_private_key_is_named(keys: Path, name: str) -> None:
    """The last but one is a folder."""
    (line,) = mistakes(ssh_key=f"{keys}/{name}")
    assert line.startswith("ssh_key: ")
    assert str(keys) in line
    assert line.endswith("; expected the file of a private key")


def test_only_keys_of_the_right_type_are_looked_at_closer(keys: Path) -> None:
    assert mistakes(ssh_key=7, ssh_port="x", ssh_hostname="bad host") == [
        "ssh_key: got 7; expected str",
        "ssh_port: got 'x'; expected int",
        f"ssh_hostname: got 'bad host'; {EXPECTED_HOST}",
    ]


def test_local_host_needs_no_ssh() -> None:
    (line,) = access_mistakes(host("@local", _sudo=1))
    assert line == "inventory data of @local: _sudo: got 1; expected bool"
    assert list(access_mistakes(host("@local", ssh_hostname="a b"))) == []


def test_types_are_reported_by_key_without_secrets() -> None:
    found = wrong_types(host(ssh_password=5, ssh_port="hunter2", ssh_user="root"))
    assert found == {
        "ssh_password": "ssh_password: got int; expected str",
        "ssh_port": "ssh_port: got 'hunter2'; expected int",
    }


def test_place_of_a_mistake_is_the_host() -> None:
    assert located(host("hub"), "x: wrong") == "inventory data of hub: x: wrong"
