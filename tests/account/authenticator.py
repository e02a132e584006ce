"""A passkey in software: it answers the options of the service as an authenticator does."""

import hashlib
import json
from typing import Any
from urllib.parse import urlsplit

from cryptography.hazmat.primitives.asymmetric.ec import ECDSA, SECP256R1, generate_private_key
from cryptography.hazmat.primitives.hashes import SHA256
from webauthn.helpers import bytes_to_base64url, encode_cbor

_PRESENT, _VERIFIED, _HAS_KEY = 0x01, 0x04, 0x40


class Authenticator:
    """One passkey for the page at `url`. `num_used` is its counter of signatures."""

    def __init__(self, url: str, name: bytes = b"credential") -> None:
        self._url = url
        self._name = name
        self._key = generate_private_key(SECP256R1())
        self.num_used = 0

    def make(self, options: dict[str, Any]) -> dict[str, Any]:
        """Return what `navigator.credentials.create` of a page returns."""
        point = self._key.public_key().public_numbers()
        public_key = {1: 2, 3: -7, -1: 1, -2: _word(point.x), -3: _word(point.y)}
        name = bytes(16) + len(self._name).to_bytes(2, "big") + self._name
        data = self._data(_PRESENT | _VERIFIED | _HAS_KEY) + name + encode_cbor(public_key)
        attestation = {"fmt": "none", "attStmt": {}, "authData": data}
        return self._credential(
            clientDataJSON=self._client_data("webauthn.create", options),
            attestationObject=encode_cbor(attestation),
        )

    def sign(self, options: dict[str, Any]) -> dict[str, Any]:
        """Return what `navigator.credentials.get` of a page returns."""
        self.num_used += 1
        data = self._data(_PRESENT | _VERIFIED)
        client_data = self._client_data("webauthn.get", options)
        signed = data + hashlib.sha256(client_data).digest()
        return self._credential(
            clientDataJSON=client_data,
            authenticatorData=data,
            signature=self._key.sign(signed, ECDSA(SHA256())),
        )

    def _data(self, flags: int) -> bytes:
        party = hashlib.sha256(str(urlsplit(self._url).hostname).encode()).digest()
        return party + bytes([flags]) + self.num_used.to_bytes(4, "big")

    def _client_data(self, kind: str, options: dict[str, Any]) -> bytes:
        shown = {"type": kind, "challenge": options["challenge"], "origin": self._url}
        return json.dumps(shown).encode()

    def _credential(self, **response: bytes) -> dict[str, Any]:
        name = bytes_to_base64url(self._name)
        encoded = {key: bytes_to_base64url(value) for key, value in response.items()}
        return {"id": name, "rawId": name, "type": "public-key", "response": encoded}


def _word(number: int) -> bytes:
    return number.to_bytes(32, "big")
