"""VLMQ's token importance on a real Qwen2-VL layer, against finite differences and hand-written gradients."""

import copy

import pytest
import torch
from torch import Tensor, nn
from transformers import Qwen2VLConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLDecoderLayer

from vlmq_serve.calibrate.capture import Batch
from vlmq_serve.calibrate.families.decoder import attention_block
from vlmq_serve.calibrate.families.qwen2_vl import QWEN2_VL
from vlmq_serve.calibrate.importance import TokenImportance, local_gradients
from vlmq_serve.calibrate.sources import _local, taps_of
from vlmq_serve.calibrate.streams import Streams

TOKENS, WIDTH = 9, 32


@pytest.fixture(scope="module")
def layer() -> nn.Module:
    torch.manual_seed(0)
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": 16, "hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 1,
            "num_attention_heads": 4, "num_key_value_heads": 2,
            "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4},
        }
    ).get_text_config()  # fmt: skip
    config._attn_implementation = "sdpa"  # eager takes its softmax in fp32, too coarse for finite differences
    return Qwen2VLDecoderLayer(config, 0).double().eval().requires_grad_(False)


@pytest.fixture(scope="module")
def kwargs() -> dict:
    angles = torch.randn(2, TOKENS, 8, dtype=torch.float64)
    mask = torch.full((TOKENS, TOKENS), float("-inf"), dtype=torch.float64).triu(1)[None, None]
    return {"position_embeddings": (angles.cos(), angles.sin()), "attention_mask": mask, "position_ids": None}


@pytest.fixture(scope="module")
def streams() -> tuple[Tensor, Tensor]:
    full = torch.randn(2, TOKENS, WIDTH, dtype=torch.float64)
    return full, full + 0.1 * torch.randn(2, TOKENS, WIDTH, dtype=torch.float64)


def loss_with_nudge(layer, kwargs, full, quantized, linear: str, nudge: Tensor) -> float:
    """The local loss when the output of `linear` on the quantized path is shifted by `nudge`."""
    target = attention_block(layer, full, kwargs)
    handle = layer.get_submodule(linear).register_forward_hook(lambda _, __, output: output + nudge)
    try:
        return float((attention_block(layer, quantized, kwargs) - target).square().sum())
    finally:
        handle.remove()


@pytest.mark.parametrize("linear", QWEN2_VL.importance_taps)
def test_gradients_equal_finite_differences(layer, kwargs, streams, linear):
    full, quantized = streams
    got = local_gradients(layer, attention_block, QWEN2_VL.importance_taps, full, quantized, kwargs)
    channels = layer.get_submodule(linear).out_features
    step, batch, token = 1e-5, 1, 5
    slopes = []
    for channel in range(channels):
        nudge = torch.zeros(2, TOKENS, channels, dtype=torch.float64)
        nudge[batch, token, channel] = step
        ends = [loss_with_nudge(layer, kwargs, full, quantized, linear, sign * nudge) for sign in (1, -1)]
        slopes.append(abs(ends[0] - ends[1]) / (2 * step))
    assert float(got[linear][batch, token]) == pytest.approx(sum(slopes) / channels, rel=1e-4)


def test_output_projection_has_the_closed_form(layer, kwargs, streams):
    """dL/dZ of o_proj is 2 (A(U) - A(F)) itself."""
    full, quantized = streams
    got = local_gradients(layer, attention_block, QWEN2_VL.importance_taps, full, quantized, kwargs)
    drift = attention_block(layer, quantized, kwargs) - attention_block(layer, full, kwargs)
    torch.testing.assert_close(got["self_attn.o_proj"], (2 * drift).abs().mean(-1).float())


def test_samples_of_a_batch_do_not_mix(layer, kwargs, streams):
    full, quantized = streams
    taps = QWEN2_VL.importance_taps
    together = local_gradients(layer, attention_block, taps, full, quantized, kwargs)
    first = {**kwargs, "position_embeddings": tuple(x[:1] for x in kwargs["position_embeddings"])}
    alone = local_gradients(layer, attention_block, taps, full[:1], quantized[:1], first)
    for name in taps:
        torch.testing.assert_close(together[name][:1], alone[name])


def test_layer_is_left_as_it_was(layer, kwargs, streams):
    before = copy.deepcopy(layer.state_dict())
    full, quantized = streams
    local_gradients(layer, attention_block, QWEN2_VL.importance_taps, full, quantized, kwargs)
    assert all(torch.equal(before[key], value) for key, value in layer.state_dict().items())
    assert all(parameter.grad is None for parameter in layer.parameters())
    assert not any(module._forward_hooks for module in layer.modules())


def test_equal_paths_give_uniform_weights(layer, kwargs, streams):
    full, _ = streams
    got = local_gradients(layer, attention_block, QWEN2_VL.importance_taps, full, full, kwargs)
    for gradient in got.values():
        importance = TokenImportance.from_gradients([gradient])
        assert importance.uniform
        assert torch.equal(importance.weights[0], torch.ones(2, TOKENS))


@pytest.mark.parametrize("exponent", [1, 2])
def test_weights_are_powers_with_mean_one_over_all_samples(exponent):
    gradients = [torch.rand(3, 7) * 1e-8, torch.rand(2, 4) * 1e-10]
    importance = TokenImportance.from_gradients(gradients, exponent)
    flat = torch.cat([w.reshape(-1) for w in importance.weights]).double()
    raw = torch.cat([g.reshape(-1) for g in gradients]).double() ** exponent
    torch.testing.assert_close(flat, raw / raw.mean(), rtol=1e-5, atol=1e-12)
    assert not importance.uniform


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_gradients_that_are_not_finite_give_uniform_weights(bad):
    importance = TokenImportance.from_gradients([torch.tensor([[1.0, bad, 2.0]])])
    assert importance.uniform


def test_weights_must_be_positive_with_mean_one():
    with pytest.raises(RuntimeError, match="mean 1"):
        TokenImportance((torch.tensor([[0.5, 0.5]]),))
    with pytest.raises(RuntimeError, match="mean 1"):
        TokenImportance((torch.tensor([[3.0, -1.0]]),))


def test_per_sample_weights_have_mean_one_in_every_sample():
    gradients = [torch.rand(3, 7) * torch.tensor([[1e-8], [1.0], [0.0]])]
    weights = TokenImportance.from_gradients(gradients, exponent=2, per_sample=True).weights[0]
    torch.testing.assert_close(weights.mean(1), torch.ones(3))
    torch.testing.assert_close(weights[1], gradients[0][1] ** 2 / (gradients[0][1] ** 2).mean())
    assert torch.equal(weights[2], torch.ones(7))


@pytest.mark.parametrize(
    ("source", "linear"),
    [("attention_heads", "self_attn.v_proj"), ("layer", "self_attn.k_proj"), ("layer", "mlp.down_proj")],
)
def test_other_losses_equal_finite_differences(layer, kwargs, streams, source, linear):
    full, quantized = streams

    def compared(hidden: Tensor) -> Tensor:
        """The part of the layer that the loss compares, by the layer's own forward."""
        if source == "layer":
            return layer(hidden, **kwargs)
        seen = []
        handle = layer.self_attn.o_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        layer(hidden, **kwargs)
        handle.remove()
        return seen[0]

    batch = Batch((0, 1), torch.zeros(2, TOKENS, dtype=torch.uint8), kwargs)
    both = Streams(torch.device("cpu"), [batch], [full], [quantized])
    got = _local(layer, QWEN2_VL, source, taps_of(QWEN2_VL, source), both)[linear][0]
    target = compared(full)
    channels, step, token = layer.get_submodule(linear).out_features, 1e-3, 5  # the second norm is fp32
    slopes = []
    for channel in range(channels):
        nudge = torch.zeros(2, TOKENS, channels, dtype=torch.float64)
        nudge[1, token, channel] = step
        ends = []
        for sign in (1, -1):
            change = sign * nudge
            handle = layer.get_submodule(linear).register_forward_hook(lambda _, __, out, change=change: out + change)
            ends.append(float((compared(quantized) - target).square().sum()))
            handle.remove()
        slopes.append(abs(ends[0] - ends[1]) / (2 * step))
    assert float(got[1, token]) == pytest.approx(sum(slopes) / channels, rel=0.01)


def test_the_cut_before_the_output_projection_has_no_gradient_there():
    assert taps_of(QWEN2_VL, "attention_heads") == ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    assert taps_of(QWEN2_VL, "attention") == QWEN2_VL.importance_taps
    assert taps_of(QWEN2_VL, "layer") == taps_of(QWEN2_VL, "cross_entropy") == QWEN2_VL.linears


def test_effective_tokens():
    assert TokenImportance((torch.ones(2, 5),)).effective_tokens == 10
    one = TokenImportance((torch.tensor([[4.0, 0, 0, 0]]),))
    assert one.effective_tokens == pytest.approx(1)
    half = TokenImportance.from_gradients([torch.tensor([[1.0, 4.0, 16.0]])], exponent=0.5)
    torch.testing.assert_close(half.weights[0], torch.tensor([[1.0, 2.0, 4.0]]) * 3 / 7)
    assert half.effective_tokens == pytest.approx(49 / 21)
