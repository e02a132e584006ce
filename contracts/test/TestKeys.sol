// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import {Math} from "@openzeppelin/contracts/utils/math/Math.sol";

/// Two libp2p keys that exist for these tests only, and their signatures. The peer ids come from worker.swarm.identity.
library TestKeys {
    struct Key {
        string peerId;
        bytes publicKey;
        bytes modulus;
        bytes privateExponent;
    }

    function publicKeyOf(bytes memory modulus) internal pure returns (bytes memory) {
        return bytes.concat(
            hex"080012a60230820122300d06092a864886f70d01010105000382010f003082010a0282010100", modulus, hex"0203010001"
        );
    }

    /// PKCS#1 v1.5 with SHA-256, by its definition.
    function sign(Key memory key, bytes memory message) internal view returns (bytes memory) {
        bytes memory padding = new bytes(202);
        for (uint256 i = 0; i < padding.length; i++) padding[i] = 0xff;
        bytes memory padded = bytes.concat(
            hex"0001", padding, hex"003031300d060960864801650304020105000420", sha256(message)
        );
        return Math.modExp(padded, key.privateExponent, key.modulus);
    }

    function first() internal pure returns (Key memory key) {
        key.peerId = "QmdM3w5M8uwy4gcHhDTytr1iZGZpifhYoQc3v8tTjDNCau";
        key.modulus =
            hex"ab99c283e8abe2271783999f944245788da405e8bbad3acbddcc1b9a90d93f38cb4593d59d12e6291f5324875d9e7783"
            hex"4af4e96ee9f2dcc414411336d4c88f80ca35cbf2dd23813a6b51158cdb8878f84ac618b0624996c540bf2c8253f9f057"
            hex"9cad1604e4ea00cd30d2e2da24a06de99f3b5ae3e9695dff04b8eb8961d7e82ebb4c3494e7e57d1606a6476142121b00"
            hex"be0e1d5fefdbc320609dcba8a2e554a45d967bcf65696d84d81bfd7ba6544178e90437f52b8c18f7ce87dbf980bb7942"
            hex"88a9e5ab32c316d73b0f5fc20cc1100fd4cab9c910753356975af83b2fea3e87b827bb521408aae67921f6a9abe4ce1e"
            hex"8ca97b8ae936bdcf95a3d515327dd3c7";
        key.privateExponent =
            hex"0d4e2744661289bf01363d7f9f95c1e0368f4cbbfe6d509d450dd1e81aaa159a583c85596f4beb57adeb9aedfa06d2fa"
            hex"75a1e6c5a85321e5fc320d84d75bd3b0a73d239aa9a5da9bc67d6b7fd7f7cd75670ad4183d0ebaa781bd30fccbf919b7"
            hex"19595c5735cea51043e45e1d8ef077854148ef63b391ed6d5c16e0806efb382fe2ea10d3be445a3ecef0298c2d3c8965"
            hex"f61c4fe89f5126b70046245a776307a32c1c017ffcd677179ec7f7852c2db4a5d28c59a4bf45cd3aec01ef5d65acfe09"
            hex"b3b8a6e52519242a19121f51fd873a0267dcf748c6cea2a9ddbc12be32fa8b38862e78b1d9449dede78a6f8505d0d3ab"
            hex"59a1251235867e505968e79a0426b575";
        key.publicKey = publicKeyOf(key.modulus);
    }

    function second() internal pure returns (Key memory key) {
        key.peerId = "QmZRzK4c3dnSGXEdPFRE4zZ18qZ9FKsjos5J2uZR6sPFrQ";
        key.modulus =
            hex"b55eec3a5433f6bc13bf3b31490330a1cff1a8f7036069b7f9ac61840c7a256496e7e6b2aea2df4704addd413609c512"
            hex"16b12f4ecd0468c71b6c234e7953e8573fb3e214f328af8ccddac68c3d3f00c4fb1ac23a071c639e0b8c826d45d0ef55"
            hex"c2ceb40362f48a433658541d0b8dd2261747b3f2d806176dcc4e864015593756edcb1a9349b1282e681f55dd377de930"
            hex"fd893f4ba6c21c9d199733d9180a7ba75d770f9c6f6b1ab6046b4bd96483a9abc48a45523e266b834ae823d9dfc3872a"
            hex"910d7b14eda35d575adae6acaf0803382cbc3bb9ff8f21a46692d19d3b264a7fe05bb11fc389da845ca190c49ed44519"
            hex"7c5548209d1685c210d0496dd9d55fc9";
        key.privateExponent =
            hex"047aa825d69f83e7e82af058cabf4feba719863d3771a19ac009404d450b9d31cb4245e1c2cb55ed4891cca588229ca1"
            hex"d23aa4faf2b839a83526aa068d9b8360e83b568982e9cdd011e365c4dfdc56f6066786456d9887634750bc85db540a1d"
            hex"1997063e112b0de1140e0161c83fc3e159f0d4e259f06892b719775a4cccabbfa88b2635874b6e17b7fb57b8710ddf82"
            hex"7d966b79b66350c5c1469da3273caa52070679362856893412443bb8933c769e0bd09c68d1e955542e737dce279c2288"
            hex"d60afb669b573ae7244a901f850d0eaa67fcdb3acbab040698fe0623173103f5d09f0f332e8c265256c99b5ec953e527"
            hex"9bec534db14b59bd1b521ab4593938b3";
        key.publicKey = publicKeyOf(key.modulus);
    }
}
