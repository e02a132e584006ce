import copy
import json

import pytest
import torch
import transformers
from safetensors.torch import load_file

from tests.groups import scored_group
from worker import settings
from worker.errors import ModelError
from worker.policy import lora
from worker.policy.engines.architecture import Product
from worker.policy.engines.decoder import LeanDecoder, NativeBatch, PanelBatch
from worker.policy.engines.hf_decoder import CachedDecoder
from worker.policy.engines.torch_engine import TorchEngine
from worker.policy.policy import Policy, load
from worker.records import Task
from worker.trainer import checkpoint
from worker.trainer.trainer import Trainer

GENERATION = settings.Generation(num_generations=4, max_prompt_length=64, max_completion_length=12)
QUESTIONS = ["Calculate 2 + 3.", "Calculate ( 8 - -1 )."]
LORA = settings.Lora(rank=4, alpha=8)


@pytest.fixture(scope="module")
def pristine():
    torch.set_num_threads(1)
    return load(settings.Model(device="cpu"))


def make_trainer(pristine, dtype=torch.float32, **options) -> Trainer:
    policy = Policy(copy.deepcopy(pristine.model).to(dtype), pristine.tokenizer, pristine.name)
    return Trainer(
        policy, settings.Trainer(**{"learning_rate": 1e-3, "lora": LORA, **options}), GENERATION
    )


def make_groups(policy):
    return [
        scored_group(
            Task("basic_arithmetic", "0" * 12, 0, i),
            question,
            tuple(c.text for c in completions),
            (1.0, 0.0, 0.25, 0.0),
            token_ids=tuple(c.token_ids for c in completions),
            truncated=tuple(c.truncated for c in completions),
        )
        for i, (question, completions) in enumerate(
            zip(QUESTIONS, policy.generate(QUESTIONS, GENERATION, 0), strict=True)
        )
    ]


def logits(policy):
    with torch.no_grad():
        return policy.model(torch.tensor([policy.prompt_ids(QUESTIONS[0])])).logits


def test_only_adapters_are_trained_and_all_that_goes_forward_sees_them(pristine):
    groups = make_groups(pristine)
    trainer = make_trainer(pristine)
    assert lora.has_adapters(trainer.policy.model)
    assert not lora.has_adapters(pristine.model)
    assert torch.equal(logits(trainer.policy), logits(pristine))  # fresh ones change nothing
    base = {
        n: p.detach().clone()
        for n, p in trainer.policy.model.named_parameters()
        if n not in trainer.parameters
    }
    assert all(".lora_" in name for name in trainer.parameters)
    assert {name.split(".lora_")[0].rpartition(".")[2] for name in trainer.parameters} == {
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    }
    for _ in range(3):
        assert trainer.step(groups).grad_norm > 0
    for name, parameter in trainer.policy.model.named_parameters():
        if name in base:
            assert torch.equal(parameter, base[name])
            assert parameter.grad is None
    assert not torch.equal(logits(trainer.policy), logits(pristine))
    with lora.switched_off(trainer.policy.model):
        assert torch.equal(logits(trainer.policy), logits(pristine))
    assert all(p.requires_grad for p in trainer.parameters.values())


def test_adapters_learn_as_if_they_were_merged(pristine):
    """Compare the gradient of B with that of the merged weight: B is 0, so dB = scale x dW A^T."""
    groups = make_groups(pristine)
    whole, low = make_trainer(pristine, lora=None), make_trainer(pristine)
    for trainer in (whole, low):
        batch = [s for group in groups for s in trainer._read(group)]
        trainer._weigh(batch)
        trainer._backward(batch, is_first=True)
    name = "model.layers.1.self_attn.q_proj"
    gradient = whole.parameters[f"{name}.weight"].grad
    down = low.parameters[f"{name}.lora_A.default.weight"]
    up = low.parameters[f"{name}.lora_B.default.weight"]
    torch.testing.assert_close(
        up.grad, LORA.alpha / LORA.rank * gradient @ down.T, rtol=1e-4, atol=1e-7
    )


def test_adapters_of_bfloat16_weights_are_float32_and_start_the_same_everywhere(pristine):
    first = make_trainer(pristine, torch.bfloat16)
    state = torch.get_rng_state()
    second = make_trainer(pristine, torch.bfloat16)
    assert torch.equal(state, torch.get_rng_state())
    for ours, theirs in zip(first.parameters.values(), second.parameters.values(), strict=True):
        assert ours.dtype == torch.float32
        assert torch.equal(ours, theirs)
    assert first.step(make_groups(pristine)).grad_norm > 0


def test_reference_is_the_model_without_adapters_not_a_copy(pristine):
    groups = make_groups(pristine)
    trainer = make_trainer(pristine, beta=0.5, learning_rate=1e-2, num_iterations=1)
    assert trainer._reference.model is trainer.policy.model
    alone = (
        make_trainer(pristine, num_iterations=1).step(groups).loss
    )  # on-policy it is the same at every step
    assert trainer.step(groups).loss == pytest.approx(alone, abs=1e-6)  # no distance yet
    trainer.step(groups)
    assert trainer.step(groups).loss > alone + 1e-4
    copied = Trainer(
        Policy(copy.deepcopy(pristine.model), pristine.tokenizer, pristine.name),
        settings.Trainer(beta=0.5, learning_rate=1e-2),
        GENERATION,
    )
    assert copied._reference.model is not copied.policy.model


def test_checkpoint_holds_the_adapters_only_and_goes_on_number_for_number(pristine, tmp_path):
    groups = make_groups(pristine)
    unbroken = make_trainer(pristine)
    expected = [unbroken.step(groups).grad_norm for _ in range(4)]
    first = make_trainer(pristine)
    observed = [first.step(groups).grad_norm for _ in range(2)]
    path = checkpoint.save(tmp_path, first, {"round": 2}, keep=1)
    assert load_file(path / "model.safetensors").keys() == first.parameters.keys()
    second = make_trainer(pristine)
    assert checkpoint.restore(tmp_path, second) == {"round": 2}
    observed += [second.step(groups).grad_norm for _ in range(2)]
    assert observed == expected
    with pytest.raises(
        ModelError, match=r"do not fit hivewright/tiny; set model.name and trainer.lora back"
    ):
        checkpoint.restore(tmp_path, make_trainer(pristine, lora=None))


def test_checkpoint_of_adapters_goes_on_beside_its_own_weights_only(pristine, tmp_path):
    path = checkpoint.save(tmp_path, make_trainer(pristine), {}, keep=1)
    with pytest.raises(
        ModelError,
        match=r"is of lora_alpha 8, and this node's is 800; set model.name and trainer.lora",
    ):
        checkpoint.restore(tmp_path, make_trainer(pristine, lora=settings.Lora(rank=4, alpha=800)))
    other = Policy(copy.deepcopy(pristine.model), pristine.tokenizer, pristine.name)
    with torch.no_grad():
        other.model.model.layers[1].mlp.up_proj.weight.mul_(1.1)
    with pytest.raises(
        ModelError,
        match=r"is of base_weights [0-9a-f]{16}, and this node's is [0-9a-f]{16}; set model.name",
    ):
        checkpoint.restore(tmp_path, Trainer(other, settings.Trainer(lora=LORA), GENERATION))
    # Weights in another type are the same weights, and an older record with fewer keys is accepted.
    assert checkpoint.restore(tmp_path, make_trainer(pristine, torch.bfloat16)) == {}
    record = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(
        json.dumps({k: v for k, v in record.items() if k not in ("lora_alpha", "base_weights")})
    )
    assert checkpoint.restore(tmp_path, make_trainer(pristine)) == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_weights_are_a_plain_model_that_says_the_same(pristine, tmp_path, dtype):
    trainer = make_trainer(pristine, dtype, learning_rate=1e-2)
    for _ in range(2):
        trainer.step(make_groups(pristine))
    lora.save_merged(trainer.policy.model, tmp_path / "model.safetensors")
    trainer.policy.model.config.save_pretrained(tmp_path)
    trainer.policy.tokenizer.save_pretrained(tmp_path)
    merged = load(
        settings.Model(name=str(tmp_path), device="cpu", dtype=str(dtype).removeprefix("torch."))
    )
    assert [name for name, _ in merged.model.named_parameters()] == [
        name for name, _ in pristine.model.named_parameters()
    ]
    tolerance = 1e-4 if dtype is torch.float32 else 0.2
    torch.testing.assert_close(logits(merged), logits(trainer.policy), atol=tolerance, rtol=0)
    assert not torch.allclose(logits(merged).float(), logits(pristine), atol=0.5)


def test_model_without_adapters_is_merged_already(pristine):
    for (ours, weight), (theirs, parameter) in zip(
        lora.merged_weights(pristine.model), pristine.model.named_parameters(), strict=True
    ):
        assert ours == theirs
        assert torch.equal(weight, parameter)


def test_lean_decoder_generates_with_adapters_and_follows_them(pristine):
    trainer = make_trainer(pristine, learning_rate=1e-2)
    generation = GENERATION.model_copy(update={"dtype": "float32"})
    engine = trainer.policy._load_engine(generation)
    assert isinstance(engine.decoder, LeanDecoder)
    fresh = trainer.policy.generate(QUESTIONS, generation, seed=1)
    assert fresh == pristine.generate(QUESTIONS, generation, seed=1)
    for _ in range(3):
        trainer.step(make_groups(pristine))
    trained = trainer.policy.generate(QUESTIONS, generation, seed=1)
    assert trained != fresh
    engine.decoder = CachedDecoder(trainer.policy.model)
    reference = trainer.policy.generate(QUESTIONS, generation, seed=1)
    for ours, theirs in zip(
        (c for g in trained for c in g), (c for g in reference for c in g), strict=True
    ):
        assert ours.token_ids == theirs.token_ids
        assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-4)


def test_step_in_c_computes_adapters_as_layers_one_by_one_do(pristine):
    trainer = make_trainer(pristine, learning_rate=1e-2)
    for _ in range(3):
        trainer.step(make_groups(pristine))
    decoder = LeanDecoder(trainer.policy.model, torch.bfloat16)
    prompts, tokens = [[5, 6, 7], [9] * 11], torch.tensor([4, 8])
    whole, logits = decoder.start(prompts, 8)
    assert isinstance(whole, PanelBatch)
    layers = NativeBatch(decoder.weights, prompts, 8, decoder.native)
    torch.testing.assert_close(layers.logits_RV, logits)
    found = whole.step(tokens)
    torch.testing.assert_close(found, layers.step(tokens), rtol=0, atol=1e-4)
    for name, parameter in trainer.policy.model.named_parameters():
        if "lora_B" in name:
            parameter.data.zero_()
    without, _ = decoder.start(prompts, 8)
    assert (without.step(tokens) - found).abs().max() > 0.01  # the adapters were in it


@pytest.mark.filterwarnings(
    "ignore:Model has `tie_word_embeddings=True`:UserWarning"
)  # peft's own word on it
def test_adapter_in_a_weight_that_is_tied_is_refused(pristine):
    assert pristine.model.config.tie_word_embeddings
    with pytest.raises(
        ModelError, match=r"'lm_head'\): this model's output layer and its embedding are one weight"
    ):
        make_trainer(pristine, lora=settings.Lora(target_modules=("q_proj", "lm_head")))


def test_layers_that_the_model_has_not_are_a_model_error_that_names_those_it_has(pristine):
    with pytest.raises(ModelError) as caught:
        make_trainer(pristine, lora=settings.Lora(target_modules=("query",)))
    assert "trainer.lora: target_modules ('query',)" in str(caught.value)
    assert "q_proj" in str(caught.value)
    chosen = make_trainer(pristine, lora=settings.Lora(target_modules=("q_proj", "v_proj")))
    assert {name.split(".lora_")[0].rpartition(".")[2] for name in chosen.parameters} == {
        "q_proj",
        "v_proj",
    }


def test_inventory_key_of_adapters_is_a_mapping():
    parsed = settings.from_flat(
        {"trainer_lora": {"rank": 8, "target_modules": ["q_proj"]}}, "inventory data"
    )
    assert parsed.trainer.lora == settings.Lora(rank=8, target_modules=("q_proj",))


def test_young_adapters_beside_bfloat16_weights_are_sampled_and_saved_whole(tmp_path):
    """Add entries of 1e-4 to 896 x 896 weights: bfloat16 would lose most of them."""
    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        vocab_size=64,
        hidden_size=896,
        intermediate_size=896,
        num_hidden_layers=1,
        num_attention_heads=14,
        num_key_value_heads=14,
        tie_word_embeddings=False,
    )
    model = transformers.AutoModelForCausalLM.from_config(config).bfloat16().eval()
    lora.attach(model, settings.Lora(rank=8, alpha=16))
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            parameter.data.uniform_(-1e-4, 1e-4)
    layer = model.model.layers[0].self_attn.o_proj
    added = layer.get_delta_weight("default").detach().float()
    base = layer.base_layer.weight.detach()
    merged_in_bfloat16 = (base.float() + added).bfloat16().float() - base.float()
    assert float((merged_in_bfloat16 - added).norm() / added.norm()) > 0.5  # what would be lost
    lora.save_merged(model, tmp_path / "model.safetensors")
    saved = load_file(tmp_path / "model.safetensors")["model.layers.0.self_attn.o_proj.weight"]
    assert float((saved - base.float() - added).norm() / added.norm()) < 0.01
    lora.save_config(model, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "float32"
    x = torch.randn(5, 896)
    assert isinstance(TorchEngine(model, "bfloat16").decoder, LeanDecoder)
    product = Product([layer], torch.bfloat16)
    with_adapter = product(x)
    for name, parameter in layer.named_parameters():
        if "lora_B" in name:
            parameter.data.zero_()
    product.refresh(adapters_only=True)
    difference = with_adapter - product(x)
    assert float((difference - x @ added.t()).norm() / (x @ added.t()).norm()) < 0.05
