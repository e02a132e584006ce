"""Small random models in folders, as downloaded from Hugging Face.

Each has weights as safetensors, and a tokenizer, a chat template and end tokens like its family's.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

TEXT = [
    (
        "Answer the question. Think first if that helps; then give the final answer as <answer>your"
        " answer</answer>."
    ),
    "Calculate 12 + 34 - 5 * 678 / 90. What is the greatest common divisor? <answer>42</answer>",
] * 20

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
HEADERS = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{"
    " m.content | trim }}<|eot_id|>{% endfor %}{% if add_generation_prompt"
    " %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
TURNS = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not"
    " supported') }}{% endif %}{% for m in messages %}<start_of_turn>{{ m.role }}\n{{ m.content |"
    " trim }}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{%"
    " endif %}"
)
INST = (
    "{{ bos_token }}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{"
    " raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{%"
    " endif %}{% if m.role == 'user' %} [INST] {{ m.content }} [/INST]{% else %} {{ m.content }}{{"
    " eos_token }}{% endif %}{% endfor %}"
)
BARS = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)


@dataclass(frozen=True)
class Family:
    """The properties of a model family.

    `ends` are tokens in generation_config that end an answer, in addition to the tokenizer's.
    `decoder` is what generates, `options` are those of the configuration. `is_tied`: output layer
    and embedding are one weight. `tokenizer` is its class, if transformers has one for the family.
    """

    config: Callable[..., Any]
    decoder: str
    bos: str | None
    eos: str
    is_tied: bool
    template: str | None = None
    ends: tuple[str, ...] = ()
    pad: str | None = None
    is_byte_level: bool = True
    specials: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    tokenizer: str | None = None


GEMMA = {
    "bos": "<bos>",
    "eos": "<eos>",
    "pad": "<pad>",
    "is_byte_level": False,
    "is_tied": True,
    "tokenizer": "GemmaTokenizer",
}
GPT = {"bos": None, "eos": "<|endoftext|>"}
HEAD = {"head_dim": 8}
QWEN = {
    "bos": None,
    "eos": "<|im_end|>",
    "is_tied": True,
    "template": CHATML,
    "ends": ("<|endoftext|>",),
    "pad": "<|endoftext|>",
    "specials": ("<|im_start|>",),
}
LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
FAMILIES = {
    "llama": Family(
        transformers.LlamaConfig,
        "lean",
        "<|begin_of_text|>",
        "<|end_of_text|>",
        False,
        HEADERS,
        ("<|eot_id|>",),
        specials=("<|start_header_id|>", "<|end_header_id|>"),
        options={
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 128,
            }
        },
    ),
    "llama-base": Family(
        transformers.LlamaConfig,
        "lean",
        "<s>",
        "</s>",
        True,
        is_byte_level=False,
        tokenizer="LlamaTokenizer",
    ),
    "mistral": Family(
        transformers.MistralConfig,
        "lean",
        "<s>",
        "</s>",
        False,
        INST,
        is_byte_level=False,
        options={**HEAD, "sliding_window": 16},
    ),
    "qwen3": Family(
        transformers.Qwen3Config,
        "lean",
        None,
        "<|im_end|>",
        True,
        CHATML,
        ("<|endoftext|>",),
        pad="<|endoftext|>",
        specials=("<|im_start|>",),
        options=HEAD,
        tokenizer="Qwen2Tokenizer",
    ),
    "gemma": Family(
        transformers.GemmaConfig,
        "lean",
        template=TURNS,
        ends=("<end_of_turn>",),
        specials=("<start_of_turn>",),
        options=HEAD,
        **GEMMA,
    ),
    "gemma2": Family(
        transformers.Gemma2Config,
        "lean",
        template=TURNS,
        ends=("<end_of_turn>",),
        specials=("<start_of_turn>",),
        options={**HEAD, "sliding_window": 16, "query_pre_attn_scalar": 8},
        **GEMMA,
    ),
    "gemma3": Family(
        transformers.Gemma3TextConfig,
        "lean",
        template=TURNS,
        ends=("<end_of_turn>",),
        specials=("<start_of_turn>",),
        options={
            **HEAD,
            "sliding_window": 16,
            "query_pre_attn_scalar": 8,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        **GEMMA,
    ),
    "phi3": Family(
        transformers.Phi3Config,
        "cached",
        "<s>",
        "<|endoftext|>",
        False,
        BARS,
        ("<|end|>",),
        is_byte_level=False,
        specials=("<|system|>", "<|user|>", "<|assistant|>"),
        options={"sliding_window": 16},
    ),
    "gpt-neox": Family(
        transformers.GPTNeoXConfig,
        "cached",
        is_tied=False,
        **GPT,
        options={"rotary_pct": 0.25},
        tokenizer="GPTNeoXTokenizer",
    ),
    "gpt2": Family(
        transformers.GPT2Config, "cached", is_tied=True, **GPT, tokenizer="GPT2Tokenizer"
    ),
    "smollm3": Family(
        transformers.SmolLM3Config,
        "cached",
        None,
        "<|im_end|>",
        True,
        CHATML,
        pad="<|end_of_text|>",
        specials=("<|im_start|>",),
        options={"no_rope_layers": [1, 0]},
    ),
    "qwen3.5": Family(
        transformers.Qwen3_5TextConfig,
        "cached",
        options={**HEAD, **LINEAR},
        **QWEN,
    ),
    "qwen3-next": Family(
        transformers.Qwen3NextConfig,
        "cached",
        options={**HEAD, **LINEAR, **EXPERTS, "shared_expert_intermediate_size": 16},
        **QWEN,
    ),
    "lfm2": Family(
        transformers.Lfm2Config,
        "cached",
        None,
        "<|im_end|>",
        True,
        CHATML,
        specials=("<|im_start|>",),
        options={"layer_types": ["conv", "full_attention"]},
    ),
    "gemma3n": Family(
        transformers.Gemma3nTextConfig,
        "cached",
        template=TURNS,
        ends=("<end_of_turn>",),
        specials=("<start_of_turn>",),
        options={
            **HEAD,
            "sliding_window": 16,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": 300,
            "num_kv_shared_layers": 0,
            "laurel_rank": 4,
            "intermediate_size": [64, 64],
            "altup_num_inputs": 2,
            "activation_sparsity_pattern": [0.0, 0.0],
            "layer_types": ["sliding_attention", "full_attention"],
        },
        **{**GEMMA, "tokenizer": None},
    ),
    "gemma4": Family(
        transformers.Gemma4TextConfig,
        "cached",
        template=TURNS,
        ends=("<end_of_turn>",),
        specials=("<start_of_turn>",),
        options={
            **HEAD,
            "sliding_window": 16,
            "global_head_dim": 16,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": 300,
            "num_kv_shared_layers": 0,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        **{**GEMMA, "tokenizer": None},
    ),
    "gpt-oss": Family(
        transformers.GptOssConfig,
        "cached",
        None,
        "<|return|>",
        False,
        CHATML,
        specials=("<|im_start|>", "<|im_end|>"),
        options={**HEAD, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 16},
    ),
    "granite": Family(
        transformers.GraniteConfig,
        "cached",
        None,
        "<|end_of_text|>",
        True,
        BARS,
        specials=("<|user|>", "<|end|>"),
    ),
    "granite4": Family(
        transformers.GraniteMoeHybridConfig,
        "cached",
        None,
        "<|end_of_text|>",
        True,
        BARS,
        specials=("<|user|>", "<|end|>"),
        options={
            "layer_types": ["mamba", "attention"],
            "mamba_n_heads": 4,
            "mamba_d_head": 16,
            "mamba_d_state": 8,
            "mamba_n_groups": 1,
            "mamba_expand": 2,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "shared_intermediate_size": 16,
        },
    ),
    "llama4": Family(
        transformers.Llama4TextConfig,
        "cached",
        "<|begin_of_text|>",
        "<|end_of_text|>",
        False,
        HEADERS,
        ("<|eot_id|>",),
        specials=("<|start_header_id|>", "<|end_header_id|>"),
        options={
            **HEAD,
            "intermediate_size_mlp": 64,
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "interleave_moe_layer_step": 2,
            "attention_chunk_size": 64,
        },
    ),
}
NOT_IN = {  # keys that a family's configuration does not have
    "gpt-neox": {"num_key_value_heads"},
    "gpt2": {"num_key_value_heads", "intermediate_size"},
}


def make_tokenizer(family: Family) -> transformers.PreTrainedTokenizerFast:
    """Return a tokenizer like that of the family.

    It is byte-level as in GPT-2, Llama 3 and Qwen, or has pieces with a leading space as in Llama 2
    and Gemma.
    """
    specials = [
        t
        for t in (family.pad, family.bos, family.eos, *family.ends, *family.specials)
        if t is not None
    ]
    specials = list(dict.fromkeys(specials))
    if family.is_byte_level:
        tokenizer = tokenizers.Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        specials = ["<unk>", *specials]
        tokenizer = tokenizers.Tokenizer(
            models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True)
        )
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
        tokenizer.decoder = decoders.Sequence(
            [
                decoders.Replace("▁", " "),
                decoders.ByteFallback(),
                decoders.Fuse(),
                decoders.Strip(" ", 1, 0),
            ]
        )
        alphabet = ["\n", *map(chr, range(33, 127))]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    if family.bos is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{family.bos} $A",
            special_tokens=[(family.bos, tokenizer.token_to_id(family.bos))],
        )
    wrapped = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=family.bos,
        eos_token=family.eos,
        pad_token=family.pad,
        unk_token=None if family.is_byte_level else "<unk>",
    )
    wrapped.chat_template = family.template
    return wrapped


def save_model(name: str, folder: Path, **departures: Any) -> Path:
    """Write a model of a family, with changes of its configuration, and return its folder."""
    family = FAMILIES[name]
    tokenizer = make_tokenizer(family)
    end = tokenizer.convert_tokens_to_ids(family.eos)
    shape = {
        # A few rows more than the tokenizer has tokens, as many models have.
        "vocab_size": len(tokenizer) + 5,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "bos_token_id": None if family.bos is None else tokenizer.convert_tokens_to_ids(family.bos),
        "eos_token_id": end,
        "pad_token_id": None,
        "tie_word_embeddings": family.is_tied,
    }
    known = {key: value for key, value in shape.items() if key not in NOT_IN.get(name, ())}
    torch.manual_seed(0)
    config = family.config(**{**known, **family.options, **departures})
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                # Larger weights, because the outputs of small random ones hardly differ.
                parameter.mul_(4)
    model.generation_config.eos_token_id = [
        end,
        *tokenizer.convert_tokens_to_ids(list(family.ends)),
    ]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if family.tokenizer is not None:
        file = folder / "tokenizer_config.json"
        file.write_text(
            json.dumps({**json.loads(file.read_text()), "tokenizer_class": family.tokenizer})
        )
    return folder
