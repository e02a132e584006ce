"""A node's identity: an RSA key in libp2p's own file format, and the peer id derived from it.

The file has the format of the libp2p daemon's keys and of RL Swarm's `swarm.pem`, so an identity
can be moved between them. A key is created once, by `hivewright enrol` (or by a bootnode, whose
identity earns nothing); a worker whose key is missing stops. Signatures are libp2p's: PKCS#1 v1.5
with SHA-256. Only RSA keys are supported, as in hivemind.
"""

import hashlib
import os
import secrets
from functools import lru_cache
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa

from worker.errors import IdentityError

# libp2p's PublicKey and PrivateKey messages: field 1 the type (0: RSA), field 2 the key as DER. A
# peer id is the hash of these bytes, so this one encoding is the only one that is accepted.
_RSA_HEADER = b"\x08\x00\x12"
_SHA256_MULTIHASH = b"\x12\x20"
_BASE58 = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"
_KEY_BITS = 2048
# Limits on an untrusted peer's key: the time of a verification grows with the square of its size.
_MAX_KEY_BITS = 4096
_PUBLIC_EXPONENT = 65537


class Identity:
    """A node's key, which signs.

    `public_key` is libp2p's PublicKey message; `peer_id` its hash, in base 58 ("Qm...").
    """

    def __init__(self, private_key: rsa.RSAPrivateKey) -> None:
        self._private_key = private_key
        der = private_key.public_key().public_bytes(
            serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        self.public_key = _wrap(der)
        self.peer_id = peer_id_of(self.public_key)

    def sign(self, data: bytes) -> bytes:
        """Return the signature over `data`; 256 bytes for a key of 2048 bits."""
        return self._private_key.sign(data, padding.PKCS1v15(), hashes.SHA256())

    def __repr__(self) -> str:
        return f"Identity({self.peer_id})"


def create(path: Path) -> Identity:
    """Create a new key at `path`, readable by its owner only.

    An existing file is never replaced, and no partial file is left. Raises IdentityError if the
    file exists or can't be written.
    """
    private_key = rsa.generate_private_key(public_exponent=_PUBLIC_EXPONENT, key_size=_KEY_BITS)
    der = private_key.private_bytes(
        serialization.Encoding.DER,
        serialization.PrivateFormat.TraditionalOpenSSL,
        serialization.NoEncryption(),
    )
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(_wrap(der))
                file.flush()
                os.fsync(file.fileno())
            os.link(draft, path)  # unlike a rename, a link fails if another process was faster
        finally:
            draft.unlink(missing_ok=True)
        _sync_folder(path.parent)
    except FileExistsError:
        raise IdentityError(
            f"identity {path}: already exists; an identity is created once, move the file away to"
            " create another"
        ) from None
    except OSError as error:
        raise IdentityError(
            f"identity {path}: can't be written: {error.strerror}; make its folder writable"
        ) from error
    return Identity(private_key)


def load(path: Path) -> Identity:
    """Return the key at `path`; it is never created here.

    Raises IdentityError if it is missing, not an RSA key of libp2p, or one that peers refuse.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise IdentityError(
            f"identity missing: {path}: no such file; "
            "restore the key from its backup, or run `hivewright enrol` for a new node"
        ) from None
    except OSError as error:
        raise IdentityError(
            f"identity missing: {path}: can't be read: {error.strerror}; expected a libp2p key file"
        ) from error
    try:
        private_key = serialization.load_der_private_key(_unwrap(data), password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        private_key = None
    if not isinstance(private_key, rsa.RSAPrivateKey):
        raise IdentityError(
            f"identity missing: {path}: {len(data)} bytes that are not a libp2p RSA key;"
            " restore the key from its backup"
        )
    if not _is_sound(private_key.public_key()):
        raise IdentityError(
            f"identity {path}: RSA key of {private_key.key_size} bits, which peers refuse;"
            f" expected {_KEY_BITS} to {_MAX_KEY_BITS} bits and the exponent {_PUBLIC_EXPONENT};"
            " run `hivewright enrol` for a new one"
        )
    return Identity(private_key)


def verify(
    peer_id: str,
    public_key: bytes,
    data: bytes,
    signature: bytes,
) -> bool:
    """Return whether `peer_id` signed `data`. Never raises.

    The key must hash to the peer id, and the signature must match.
    """
    if peer_id_of(public_key) != peer_id:
        return False
    try:
        key = serialization.load_der_public_key(_unwrap(public_key))
        if not isinstance(key, rsa.RSAPublicKey) or not _is_sound(key):
            return False
        key.verify(signature, data, padding.PKCS1v15(), hashes.SHA256())
    except (ValueError, InvalidSignature, UnsupportedAlgorithm):
        return False
    return True


def _is_sound(key: rsa.RSAPublicKey) -> bool:
    return _KEY_BITS <= key.key_size <= _MAX_KEY_BITS and key.public_numbers().e == _PUBLIC_EXPONENT


def peer_id_of(public_key: bytes) -> str:
    """Return the peer id of a libp2p PublicKey message."""
    return _base58(_SHA256_MULTIHASH + hashlib.sha256(public_key).digest())


def animal_name(peer_id: str) -> str:
    """Return a readable name, always the same for a peer, such as "quick brown otter".

    There are 2 million names, so it is not unique and not an identity.
    """
    digest = hashlib.sha256(peer_id.encode()).digest()
    chosen = []
    for position, words in enumerate(_WORDS):
        choices = words.split()
        number = int.from_bytes(digest[4 * position : 4 * position + 4], "big")
        chosen.append(choices[number % len(choices)])
    return " ".join(chosen)


def _wrap(der: bytes) -> bytes:
    return _RSA_HEADER + varint(len(der)) + der


def _unwrap(data: bytes) -> bytes:
    """Return the DER inside libp2p's message.

    Raises ValueError for anything but the one accepted encoding.
    """
    for length_bytes in (1, 2):
        der = data[len(_RSA_HEADER) + length_bytes :]
        if data == _wrap(der):
            return der
    raise ValueError("not a libp2p RSA key")


def varint(number: int) -> bytes:
    """Return a length as a varint, libp2p's encoding."""
    encoded = bytearray()
    while number >= 0x80:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*encoded, number])


@lru_cache(1024)
def _base58(data: bytes) -> str:
    """Return a multihash in base 58. Its first byte is never 0, so there are no leading zeros."""
    number, text = int.from_bytes(data, "big"), ""
    while number:
        number, digit = divmod(number, 58)
        text = _BASE58[digit] + text
    return text


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


_WORDS = (
    (
        "able agile alert amused ample ancient apt arctic astute avid balmy blunt bold bouncy brave"
        " brisk bubbly busy calm candid careful cheerful chilly clever cosy crafty crisp curious"
        " dainty daring deft dizzy docile dreamy droll eager earnest easy elegant exotic fair"
        " famous fancy fast fearless feisty fierce fleet fluffy fond frank freckled fresh frosty"
        " gentle giddy glad gleaming graceful grand happy hardy hasty hearty honest humble hungry"
        " jolly jumpy keen kind lanky lazy lively lofty loud loyal lucky mellow merry mighty modest"
        " moody musical neat nimble noble patient peaceful playful plucky polite prickly proud"
        " quick quiet rapid restless robust rowdy rugged rustic savage shaggy sharp shy silent"
        " skilled sleek sly smooth snappy soft spry steady sturdy subtle sunny swift tall tame"
        " tender thrifty tidy timid tough vivid wary wild wise witty zealous"
    ),
    (
        "amber aqua ashen auburn azure beige black blond blue brass brick bronze brown buff carmine"
        " cerulean chestnut cobalt copper coral cream crimson cyan dappled dun ebony emerald fawn"
        " flaxen gilded ginger golden green grey hazel indigo ivory jade khaki lavender lemon lilac"
        " lime magenta mahogany maroon mauve mottled mustard navy ochre olive opal orange orchid"
        " peach pearl pied pink plum purple red roan rose ruby russet rusty sable saffron sandy"
        " sapphire scarlet sepia silver slate speckled spotted striped tan tawny teal topaz"
        " turquoise umber violet white yellow"
    ),
    (
        "aardvark albatross alpaca ant antelope ape armadillo baboon badger barracuda bat beaver"
        " bee bison boar buffalo butterfly camel capybara caribou cassowary cat chamois cheetah"
        " chinchilla chough clam cobra cod cormorant cougar coyote crab crane cricket crow curlew"
        " deer dingo dolphin donkey dormouse dove dragonfly duck dugong dunlin eagle echidna eel"
        " eland elk emu falcon ferret finch flamingo fox frog gazelle gecko gerbil gibbon giraffe"
        " gnat gnu goat goldfinch goose gopher grouse gull hamster hare hawk hedgehog heron herring"
        " hippo hornet horse hyena ibex ibis iguana impala jackal jackdaw jaguar jay kangaroo"
        " kingfisher kiwi koala kudu lapwing lark lemur leopard lion lizard llama lobster lynx"
        " macaw magpie mallard manatee marmot marten meerkat mink mole mongoose moose mosquito moth"
        " mouse mule narwhal newt nightingale ocelot octopus okapi oryx ostrich otter owl oyster"
        " panda panther parrot partridge pelican penguin pheasant pigeon pony porcupine puffin puma"
        " quail rabbit raccoon raven reindeer robin rook salamander salmon sandpiper seal shrew"
        " skunk snail sparrow spider squid squirrel starling stoat stork swallow swan tapir termite"
        " tiger toad toucan trout turtle viper vole walrus wasp weasel whale wolf wolverine wombat"
        " woodpecker wren yak zebra"
    ),
)
