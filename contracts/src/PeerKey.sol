// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import {Math} from "@openzeppelin/contracts/utils/math/Math.sol";
import {RSA} from "@openzeppelin/contracts/utils/cryptography/RSA.sol";

/// libp2p's RSA identities: whether a peer id belongs to a public key, and whether that key signed a message.
///
/// A public key is libp2p's PublicKey message around a key of 2048 bits with the exponent 65537, which is what nodes
/// make; a peer id is the SHA-256 multihash of that message in base 58 ("Qm...").
library PeerKey {
    // PublicKey {type: RSA, data: SubjectPublicKeyInfo {rsaEncryption, modulus of 256 bytes, exponent}}
    bytes private constant BEFORE_MODULUS =
        hex"080012a602_30820122300d06092a864886f70d01010105000382010f003082010a0282010100";
    bytes private constant AFTER_MODULUS = hex"0203010001";
    bytes private constant EXPONENT = hex"010001";
    uint256 private constant MODULUS_BYTES = 256;

    uint256 private constant ID_DIGITS = 46;
    uint256 private constant SHA256_MULTIHASH = 0x1220; // the function's code, and the digest's length
    uint256 private constant HALF = 58 ** (ID_DIGITS / 2);

    /// Whether the key of `peerId` is `publicKey` and signed `message` (PKCS#1 v1.5 with SHA-256).
    function signed(string memory peerId, bytes calldata publicKey, bytes memory message, bytes calldata signature)
        internal
        view
        returns (bool)
    {
        uint256 start = BEFORE_MODULUS.length;
        if (publicKey.length != start + MODULUS_BYTES + AFTER_MODULUS.length) return false;
        bytes calldata modulus = publicKey[start:start + MODULUS_BYTES];
        if (keccak256(publicKey) != keccak256(bytes.concat(BEFORE_MODULUS, modulus, AFTER_MODULUS))) return false;
        return isIdOf(peerId, sha256(publicKey)) && RSA.pkcs1Sha256(sha256(message), signature, EXPONENT, modulus);
    }

    /// Whether `peerId` is base 58 of the multihash with this digest.
    ///
    /// The multihash has 272 bits, so it is read as two halves of 23 digits and compared as (16, 256) bits.
    function isIdOf(string memory peerId, bytes32 digest) internal pure returns (bool) {
        bytes memory text = bytes(peerId);
        if (text.length != ID_DIGITS) return false;
        uint256[2] memory halves;
        for (uint256 i = 0; i < ID_DIGITS; i++) {
            uint256 digit = _digit(uint8(text[i]));
            if (digit == 58) return false;
            uint256 half = i / (ID_DIGITS / 2);
            halves[half] = halves[half] * 58 + digit;
        }
        (uint256 high, uint256 low) = Math.mul512(halves[0], HALF);
        unchecked {
            low += halves[1];
        }
        if (low < halves[1]) high++; // carried
        return high == SHA256_MULTIHASH && low == uint256(digest);
    }

    /// What a character is worth in base 58, which leaves out 0, I, O and l; 58 for one that is not in it.
    function _digit(uint256 character) private pure returns (uint256) {
        if (character >= 0x31 && character <= 0x39) return character - 0x31; // 1 to 9
        if (character >= 0x41 && character <= 0x48) return character - 0x41 + 9; // A to H
        if (character >= 0x4a && character <= 0x4e) return character - 0x4a + 17; // J to N
        if (character >= 0x50 && character <= 0x5a) return character - 0x50 + 22; // P to Z
        if (character >= 0x61 && character <= 0x6b) return character - 0x61 + 33; // a to k
        if (character >= 0x6d && character <= 0x7a) return character - 0x6d + 44; // m to z
        return 58;
    }
}
