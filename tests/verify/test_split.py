"""Which checkpoints can be split over 1, 2, 4 and 8 ranks, and which group size would have fitted."""

from pathlib import Path

import pytest

from vlmq_serve.format.config import QuantizationSpec
from vlmq_serve.format.headers import TensorInfo
from vlmq_serve.format.scheme import Scheme, tensor_shapes
from vlmq_serve.verify.split import split_problems

pytestmark = pytest.mark.unit
# Widths of Qwen2-VL-2B and 7B: hidden, intermediate, heads, key and value heads.
SIZES = {"2b": (1536, 8960, 12, 2), "7b": (3584, 18944, 28, 4)}


def problems(size: str, scheme: str, ranks: int, prefix: str = "model.layers.0") -> list[str]:
    hidden, wide, heads, shared = SIZES[size]
    shapes = {
        f"{prefix}.self_attn.q_proj": (hidden, hidden),
        f"{prefix}.self_attn.k_proj": (shared * 128, hidden),
        f"{prefix}.self_attn.o_proj": (hidden, hidden),
        f"{prefix}.mlp.gate_proj": (wide, hidden),
        f"{prefix}.mlp.down_proj": (hidden, wide),
    }
    spec = QuantizationSpec(Scheme.parse(scheme))
    tensors = {
        f"{name}.{suffix}": TensorInfo(Path("x"), "I32", packed, 0)
        for name, shape in shapes.items()
        for suffix, packed in tensor_shapes(spec.scheme, *shape).items()
    }
    config = {"text_config": {"num_attention_heads": heads, "num_key_value_heads": shared}}
    return split_problems(tensors, spec, config, ranks)


@pytest.mark.parametrize(("size", "scheme", "ranks"), [
    ("2b", "w4g128", 1), ("2b", "w3g128", 2), ("2b", "w4g64", 4), ("7b", "w2g128", 4), ("7b", "w4g-1", 4),
])  # fmt: skip
def test_these_fit(size: str, scheme: str, ranks: int) -> None:
    assert problems(size, scheme, ranks) == []


def test_the_group_size_that_would_fit_is_named() -> None:
    (problem,) = problems("2b", "w4g128", 4)
    assert "down_proj" in problem
    assert "2240 of K=8960" in problem
    assert "calibrate with group size 64" in problem


def test_heads_that_cannot_be_split_are_named() -> None:
    assert problems("2b", "w4g64", 8)[0] == "12 attention heads cannot be split over 8 ranks"
    assert problems("7b", "w4g64", 8)[0] == "28 attention heads cannot be split over 8 ranks"


def test_the_vision_tower_can_stay_whole() -> None:
    assert problems("2b", "w4g128", 2, prefix="model.visual.blocks.0") == []
