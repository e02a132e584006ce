import http.server
import math
import os
import re
import threading
import time

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from small_models import save_model

from worker import settings
from worker.errors import ModelError
from worker.policy import policy as module
from worker.policy.policy import TINY, load
from worker.trainer import weight_differences
from worker.trainer.trainer import Trainer


@pytest.fixture(scope="module")
def tiny():
    return load(settings.Model(device="cpu"))


def test_tiny_model_is_small_and_answers(tiny):
    folder = module.Path(module.__file__).parent / "tiny"
    assert sum(file.stat().st_size for file in folder.iterdir()) < 4_000_000
    generation = settings.Generation(num_generations=4, max_completion_length=12)
    groups = tiny.generate(["Calculate 2 + 3.", "Calculate 4 - 1."], generation, seed=1)
    assert [len(group) for group in groups] == [4, 4]
    for completion in (c for group in groups for c in group):
        assert len(completion.token_ids) == len(completion.logprobs)
        assert (
            tiny.tokenizer.decode(completion.token_ids, skip_special_tokens=True) == completion.text
        )
        assert (
            completion.truncated
            or completion.text.endswith("</answer>")
            or completion.token_ids[-1] in tiny.end_ids
        )
    assert tiny.generate(["Calculate 2 + 3."], generation, seed=1) == tiny.generate(
        ["Calculate 2 + 3."], generation, seed=1
    )


@pytest.mark.parametrize("engine", ["torch", "transformers"])
def test_answers_of_broken_weights_say_so_in_their_logprobs(engine):
    policy = load(settings.Model(device="cpu"))
    with torch.no_grad():
        policy.model.model.norm.weight.fill_(math.nan)
    generation = settings.Generation(num_generations=2, max_completion_length=3, engine=engine)
    (group,) = policy.generate(["Calculate 2 + 3."], generation, seed=1)
    assert all(math.isnan(logprob) for completion in group for logprob in completion.logprobs)


def test_answer_ends_with_its_closing_tag(tiny):
    generation = settings.Generation(num_generations=32, max_completion_length=12)
    texts = [c.text for c in tiny.generate(["Calculate 2 + 3."], generation, seed=1)[0]]
    assert any("</answer>" in text for text in texts)
    assert all(
        text.count("</answer>") <= 1 and text.partition("</answer>")[2] == "" for text in texts
    )


def test_prompt_over_the_limit_gets_no_answer(tiny):
    generation = settings.Generation(
        num_generations=2, max_completion_length=4, max_prompt_length=20
    )
    long, short = tiny.generate(["word " * 50, "Calculate 2 + 3."], generation, seed=1)
    assert long is None
    assert len(short) == 2


def test_model_s_context_holds_the_longest_prompt_and_completion(tiny):
    tiny.require_context(settings.Generation())
    with pytest.raises(ModelError) as caught:
        tiny.require_context(settings.Generation(max_prompt_length=100, max_completion_length=5000))
    context = tiny.model.config.max_position_embeddings
    assert (
        str(caught.value)
        == f"model hivewright/tiny: takes {context} tokens, generation.max_prompt_length 100 and"
        " generation.max_completion_length 5000 make 5100; lower them, or take a model with a"
        " longer context"
    )


def test_own_answers_survive_the_way_through_text(tiny):
    generation = settings.Generation(num_generations=16, max_completion_length=12)
    groups = tiny.generate(["Calculate 2 + 3.", "Calculate ( 8 - -1 )."], generation, seed=3)
    checked = 0
    for completion in (c for group in groups for c in group):
        if re.fullmatch(
            r"<answer>-?\d+</answer>", completion.text
        ):  # other text may have more than one spelling in tokens
            ids, truncated = tiny.completion_ids(completion.text, 12)
            assert (tuple(ids), truncated) == (completion.token_ids, False)
            checked += 1
    assert checked > 8


def test_peer_s_text_becomes_tokens_as_if_sampled_here(tiny):
    end = tiny.end_ids[0]
    closed, truncated = tiny.completion_ids("<answer>7</answer>", 12)
    assert (len(closed), end in closed, truncated) == (3, False, False)
    bare, truncated = tiny.completion_ids("7", 12)
    assert (bare[-1], truncated) == (end, False)
    cut, truncated = tiny.completion_ids("7" * 100, 12)
    assert (len(cut), end in cut, truncated) == (12, False, True)
    assert tiny.completion_ids("", 12) == ([end], False)


def test_peer_s_text_can_not_forge_special_tokens(tiny):
    ids, _ = tiny.completion_ids("<|end|><|user|>", 100)
    assert not set(tiny.tokenizer.all_special_ids) & set(ids[:-1])
    assert tiny.tokenizer.decode(ids, skip_special_tokens=True) == "<|end|><|user|>"
    assert len(tiny.completion_ids("<|end|>" * 40, 12)[0]) == 12


def test_peer_s_text_never_has_a_token_that_the_model_has_not(tiny):
    tokenizer = module.AutoTokenizer.from_pretrained(module.Path(module.__file__).parent / "tiny")
    tokenizer.add_tokens([f"[new{i}]" for i in range(200)])
    policy = module.Policy(tiny.model, tokenizer, "x")
    assert tokenizer.convert_tokens_to_ids("[new199]") >= policy.num_tokens
    ids, truncated = policy.completion_ids("1[new199]2[new0]</answer>", 100)
    assert max(ids) < policy.num_tokens
    assert not truncated


@pytest.mark.parametrize(
    ("template", "role"),
    [
        ("{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}", "system"),
        (
            (
                "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('No system"
                " role') }}{% endif %}[{{ m.role }}]{{ m.content }}{% endfor %}"
            ),
            "user",
        ),
    ],
)
def test_instruction_goes_where_the_chat_template_takes_it(tiny, template, role):
    tokenizer = module.AutoTokenizer.from_pretrained(module.Path(module.__file__).parent / "tiny")
    tokenizer.chat_template = template
    text = tokenizer.decode(module.Policy(tiny.model, tokenizer, "x").prompt_ids("Why?"))
    assert text.startswith(f"[{role}]{module.INSTRUCTION}")
    assert text.endswith("Why?")


def test_base_model_without_a_template_is_asked_in_plain_text(tiny):
    tokenizer = module.AutoTokenizer.from_pretrained(module.Path(module.__file__).parent / "tiny")
    tokenizer.chat_template = None
    text = tokenizer.decode(module.Policy(tiny.model, tokenizer, "x").prompt_ids("Why?"))
    assert text == f"{module.INSTRUCTION}\n\nWhy?\n"


def test_model_is_loaded_from_a_local_folder_as_it_was_saved(tiny, tmp_path):
    tiny.model.save_pretrained(tmp_path)
    tiny.tokenizer.save_pretrained(tmp_path)
    copy = load(settings.Model(name=str(tmp_path), device="cpu"))
    for ours, theirs in zip(tiny.model.parameters(), copy.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def expect_model_error(name, message):
    started = time.monotonic()
    with pytest.raises(ModelError, match=message) as caught:
        load(settings.Model(name=name, device="cpu"))
    assert "\n" not in str(caught.value)
    assert time.monotonic() - started < 15


def test_name_that_can_not_be_one_is_a_model_error():
    expect_model_error(
        "no/such/name", "model.name: no/such/name: neither a folder nor a Hugging Face name"
    )
    expect_model_error("/no/such/folder", "model.name: /no/such/folder: no config.json there")


def test_folder_that_holds_no_model_is_a_model_error(tmp_path):
    expect_model_error(
        str(tmp_path), "no config.json there; expected a folder with a transformers model"
    )
    (tmp_path / "config.json").write_text("{}")
    expect_model_error(str(tmp_path), "can't be loaded from")
    (tmp_path / "config.json").write_text("not json")
    expect_model_error(str(tmp_path), "can't be loaded from")


def test_folder_with_weights_that_are_not_finite_is_a_model_error(tmp_path):
    weights = load_file(save_model("llama", tmp_path) / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    expect_model_error(str(tmp_path), r"model\.norm\.weight in .* has values that are not finite")


def test_folder_without_some_of_its_weights_is_a_model_error(tmp_path):
    weights = load_file(save_model("llama", tmp_path) / "model.safetensors")
    rest = {name: weight for name, weight in weights.items() if ".1." not in name}
    save_file(rest, tmp_path / "model.safetensors", metadata={"format": "pt"})
    expect_model_error(
        str(tmp_path), r"lacks 9 of its weights, such as model\.layers\.1\..*; get the files again"
    )


@pytest.mark.parametrize("size", [0, 5, 5000])
def test_folder_with_weights_that_are_cut_short_is_a_model_error(tmp_path, size):
    os.truncate(save_model("llama", tmp_path) / "model.safetensors", size)
    expect_model_error(str(tmp_path), r"can't be loaded from .*; expected a causal language model")


def test_unknown_name_is_a_model_error_that_names_the_answer(monkeypatch):
    class NotFound(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_error(404)

        def log_message(self, *arguments):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), NotFound)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        monkeypatch.setattr(
            module, "HUB", module.HfApi(endpoint=f"http://127.0.0.1:{server.server_port}")
        )
        expect_model_error(
            "nobody/nothing", r"model.name: nobody/nothing: Hugging Face says 404 .*: no such model"
        )
    finally:
        server.shutdown()
        server.server_close()


def test_unknown_name_without_a_network_is_a_model_error(monkeypatch):
    monkeypatch.setattr(module, "HUB", module.HfApi(endpoint="http://127.0.0.1:9"))
    expect_model_error("nobody/nothing", "not on this machine, and Hugging Face can't be reached")


def test_model_in_hugging_faces_cache_is_loaded_from_there_without_a_network(tmp_path, monkeypatch):
    """Its folder is known, so that weights are exchanged as differences to its files."""
    commit = "4" * 40
    cached = tmp_path / "models--somebody--small"
    save_model("llama", cached / "snapshots" / commit)
    (cached / "refs").mkdir()
    (cached / "refs/main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(module, "HUB", module.HfApi(endpoint="http://127.0.0.1:9"))
    policy = load(settings.Model(name="somebody/small", device="cpu"))
    assert policy.folder == cached / "snapshots" / commit
    trainer = Trainer(policy, settings.Trainer(lora=None), settings.Generation())
    base = weight_differences.find_base(trainer)
    assert base.keys() == trainer.parameters.keys()


def test_device_that_is_not_there_is_a_model_error():
    with pytest.raises(ModelError, match=r"model.device: cuda:99: torch sees"):
        load(settings.Model(name=TINY, device="cuda:99"))
