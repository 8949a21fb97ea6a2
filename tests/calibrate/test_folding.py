"""Folded scales leave a layer's function as it was, also in the form that the checkpoint stores."""

import copy

import pytest
import torch
from transformers import Qwen2VLConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLDecoderLayer

from vlmq_serve.calibrate.families.decoder import ATTENTION, MLP, VALUES
from vlmq_serve.calibrate.folding import Folded, fold, fold_norm, producer_rows

TOKENS, WIDTH = 7, 32


@pytest.fixture
def layer():
    """bf16 values in fp32: what a loaded checkpoint holds."""
    torch.manual_seed(0)
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": 16, "hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 1,
            "num_attention_heads": 4, "num_key_value_heads": 2,
            "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4},
        }
    ).get_text_config()  # fmt: skip
    config._attn_implementation = "sdpa"
    made = Qwen2VLDecoderLayer(config, 0).eval().requires_grad_(False)
    for name, parameter in made.named_parameters():
        spread = 0.5 if "norm" in name or "bias" in name else 0.2
        parameter.copy_((torch.randn_like(parameter) * spread + ("norm" in name)).bfloat16())
    return made


def run(layer, block):
    torch.manual_seed(1)
    angles = torch.randn(1, TOKENS, 8)
    mask = torch.full((TOKENS, TOKENS), float("-inf")).triu(1)[None, None]
    kwargs = {"position_embeddings": (angles.cos(), angles.sin()), "attention_mask": mask, "position_ids": None}
    return block.forward(layer, torch.randn(1, TOKENS, WIDTH), kwargs)


def folded_copy(layer, producer, readers, scales):
    changed, folded = copy.deepcopy(layer), Folded()
    fold(changed, producer, dict.fromkeys(readers, torch.bfloat16), scales, folded)
    for name, weight in folded.weights.items():
        changed.get_parameter(f"{name}.weight").copy_(weight)
    return changed, folded


@pytest.mark.parametrize(("block", "group"), [(ATTENTION, 0), (MLP, 0), (MLP, 1)])
def test_function_stays_although_the_norm_is_rounded(layer, block, group):
    readers, producer = block.linear_groups[group], block.producers[group]
    channels = layer.get_parameter(f"{readers[0]}.weight").shape[1]
    scales = (torch.randn(channels) * 2).exp()
    changed, folded = folded_copy(layer, producer, readers, scales)
    torch.testing.assert_close(run(changed, block), run(layer, block), rtol=1e-4, atol=1e-5)
    assert not torch.equal(folded.weights[readers[0]], layer.get_parameter(f"{readers[0]}.weight"))
    assert all(tensor.dtype == torch.bfloat16 for tensor in folded.changed.values())


def test_values_that_several_heads_read(layer):
    """Scales of two powers, equal where heads share a row, so that the stored bias is exact as well."""
    rows = producer_rows(16, WIDTH, 8)
    scales = (2.0 ** torch.randint(-3, 4, (16,)))[rows]
    changed, folded = folded_copy(layer, VALUES, ("self_attn.o_proj",), scales)
    assert set(folded.changed) == {"self_attn.v_proj.bias"}
    torch.testing.assert_close(run(changed, ATTENTION), run(layer, ATTENTION), rtol=1e-5, atol=1e-6)


def test_rows_are_those_of_repeated_heads():
    heads, repeats, width = 3, 2, 4
    values = torch.arange(heads * width)
    repeated = values.view(heads, 1, width).expand(heads, repeats, width).reshape(-1)
    assert torch.equal(producer_rows(heads * width, heads * repeats * width, width), repeated)
    assert torch.equal(producer_rows(5, 5, None), torch.arange(5))


def test_norm_weights_that_are_zero_or_vanish_keep_scale_one():
    norm = torch.tensor([0.0, 1.0, 3.0])
    stored, scales = fold_norm(norm, torch.tensor([2.0, 1e45, 0.7]), torch.bfloat16)
    assert scales.tolist()[:2] == [1.0, 1.0]
    torch.testing.assert_close(stored.float() * scales, norm)
