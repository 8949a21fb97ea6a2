"""Splits that a scheme allows, and the detection of tensors that never arrived."""

from __future__ import annotations

import pytest
import torch

from vlmq_serve.format.errors import VLMQError
from vlmq_serve.format.scheme import Scheme
from vlmq_serve.quant_methods.loading import UNLOADED_BYTE, UNLOADED_WORD, check_loaded, check_split

pytestmark = pytest.mark.unit
PREFIX = "language_model.model.layers.0.self_attn.qkv_proj"
ROWS = [64, 32, 32]


def loaded_tensors() -> dict[str, torch.Tensor]:
    return {
        "qweight": torch.zeros(128, 8, dtype=torch.int32),
        "scales": torch.ones(128, 2, dtype=torch.bfloat16),
        "zeros": torch.full((128, 2), 8, dtype=torch.uint8),
    }


def test_complete_layers_pass() -> None:
    check_loaded(PREFIX, loaded_tensors(), ROWS)


@pytest.mark.parametrize("suffix", ["qweight", "scales", "zeros"])
@pytest.mark.parametrize(("first", "rows", "member"), [(0, 64, "q_proj"), (64, 32, "k_proj"), (96, 32, "v_proj")])
def test_one_missing_member_is_named(suffix: str, first: int, rows: int, member: str) -> None:
    tensors = loaded_tensors()
    unloaded = {"qweight": UNLOADED_WORD, "scales": float("nan"), "zeros": UNLOADED_BYTE}[suffix]
    tensors[suffix][first : first + rows] = unloaded
    with pytest.raises(VLMQError, match=rf"layers\.0\.self_attn\.{member}\.{suffix}: was not loaded"):
        check_loaded(PREFIX, tensors, ROWS)


def test_a_single_row_of_largest_codes_is_no_fault() -> None:
    tensors = loaded_tensors()
    tensors["qweight"][5] = UNLOADED_WORD
    check_loaded(PREFIX, tensors, ROWS)


def test_one_infinite_scale_is_a_fault() -> None:
    tensors = loaded_tensors()
    tensors["scales"][70, 1] = float("inf")
    with pytest.raises(VLMQError, match=r"k_proj\.scales"):
        check_loaded(PREFIX, tensors, ROWS)


def test_layers_that_are_fused_in_the_checkpoint_have_one_name() -> None:
    tensors = {"scales": torch.full((128, 2), float("nan"))}
    with pytest.raises(VLMQError, match=r"visual\.blocks\.0\.attn\.qkv\.scales"):
        check_loaded("visual.blocks.0.attn.qkv", tensors, ROWS)


@pytest.mark.parametrize(("group", "parts"), [(128, 2), (64, 2), (64, 4), (-1, 2), (32, 4)])
def test_splits_between_groups_pass(group: int, parts: int) -> None:
    check_split("down_proj", Scheme(4, group), 8960, 8960 // parts)


def test_a_split_through_a_group_names_the_group_that_fits() -> None:
    with pytest.raises(VLMQError, match=r"down_proj: .*2240 of K=8960.*w4g128; calibrate with group size 64"):
        check_split("down_proj", Scheme(4, 128), 8960, 2240)


def test_a_split_through_a_block_of_codes_cannot_fit() -> None:
    with pytest.raises(VLMQError, match=r"no group size fits this split, or use fewer ranks"):
        check_split("down_proj", Scheme(4, -1), 96, 48)


def test_a_width_that_does_not_divide_names_the_layer() -> None:
    with pytest.raises(VLMQError, match=r"visual\.blocks\.0\.mlp\.down_proj: in_features: got K=3420"):
        check_split("visual.blocks.0.mlp.down_proj", Scheme(4, 64), 3420, 3420)
