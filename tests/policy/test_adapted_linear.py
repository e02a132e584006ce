import copy

import pytest
import torch
from peft.tuners.lora import Linear
from transformers import LlamaConfig, LlamaForCausalLM

from worker import settings
from worker.policy import lora
from worker.policy.adapted_linear import AdaptedLinear


def make_model(dtype):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        attention_bias=True,
    )
    model = LlamaForCausalLM(config).to(dtype).requires_grad_(False)
    lora.attach(model, settings.Lora())
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return model


def logprobs_and_gradients(model):
    ids = torch.arange(40).view(2, 20)
    logprobs = model(ids).logits.float().log_softmax(-1)[..., 7]
    logprobs.sum().backward()
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(g is not None and g.dtype == torch.float32 for g in gradients)
    return logprobs.detach(), torch.cat([g.flatten() for g in gradients])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 0.02)])
def test_values_and_gradients_are_those_of_peft(dtype, tolerance):
    model = make_model(dtype)
    theirs = copy.deepcopy(model)
    lora.use_peft_layers(theirs)
    assert not any(isinstance(layer, AdaptedLinear) for layer in theirs.modules())
    found, gradient = logprobs_and_gradients(model)
    expected, expected_gradient = logprobs_and_gradients(theirs)
    assert (found - expected).abs().max() < tolerance * 5
    assert (gradient - expected_gradient).norm() < tolerance * expected_gradient.norm()
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


def test_an_adapter_that_is_switched_off_adds_nothing():
    model = make_model(torch.float32)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        adapted = model(ids).logits
        with lora.switched_off(model):
            plain = model(ids).logits
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
        assert torch.equal(model(ids).logits, plain)
    assert not torch.equal(adapted, plain)


def test_every_linear_layer_that_is_adapted_multiplies_in_the_type_of_its_weights():
    model = make_model(torch.bfloat16)
    layers = [m for m in model.modules() if isinstance(m, Linear)]
    assert layers
    assert {type(layer) for layer in layers} == {AdaptedLinear}
    assert layers[0](torch.ones(3, 32, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("has_bias", [True, False])
def test_a_model_may_change_an_output_in_place(has_bias):
    model = make_model(torch.float32)
    attention = model.model.layers[0].self_attn
    layer = attention.q_proj if has_bias else model.model.layers[0].mlp.up_proj
    assert (layer.base_layer.bias is not None) == has_bias
    x = torch.randn(2, 3, 32)
    plain = layer(x)
    out = layer(x)
    out *= 2
    out.sum().backward()
    assert torch.equal(out, plain * 2)
    assert layer.lora_B["default"].weight.grad.abs().sum() > 0
