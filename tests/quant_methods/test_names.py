"""Names of a checkpoint's config become names of vLLM's layers."""

from __future__ import annotations

import pytest

from vlmq_serve.format.config import QuantizationSpec
from vlmq_serve.format.scheme import Scheme
from vlmq_serve.quant_methods.names import map_module_name, map_spec

pytestmark = pytest.mark.unit


class PrefixMapper:
    """Rules of the form that vLLM's mappers have: prefixes of tensor names, None drops the tensor."""

    def __init__(self, rules: dict[str, str | None]) -> None:
        self.rules = rules

    def apply_list(self, values: list[str]) -> list[str]:
        mapped = []
        for value in values:
            start = next((start for start in self.rules if value.startswith(start)), "")
            target = self.rules.get(start, "")
            if target is not None:
                mapped.append(target + value.removeprefix(start))
        return mapped


MAPPER = PrefixMapper(
    {
        "model.language_model.": "language_model.model.",
        "model.visual.": "visual.",
        "lm_head.": "language_model.lm_head.",
        "model.": "language_model.model.",
        "dropped.": None,
    }
)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.visual", "visual"),
        ("lm_head", "language_model.lm_head"),
        ("model.language_model.layers.3.mlp.down_proj", "language_model.model.layers.3.mlp.down_proj"),
        ("model.layers.3.mlp.down_proj", "language_model.model.layers.3.mlp.down_proj"),
        ("dropped", "dropped"),
    ],
)
def test_a_module_is_mapped_as_the_prefix_of_its_tensors(name: str, expected: str) -> None:
    assert map_module_name(name, MAPPER) == expected


def test_a_mapped_spec_decides_by_vllm_names() -> None:
    override = {"model.language_model.layers.1.mlp.down_proj": Scheme(2, 32)}
    spec = map_spec(QuantizationSpec(Scheme(4), override, ("model.visual", "lm_head")), MAPPER)
    assert spec.scheme_for("language_model.model.layers.1.mlp.down_proj") == Scheme(2, 32)
    assert spec.scheme_for("language_model.model.layers.10.mlp.down_proj") == Scheme(4)
    assert spec.scheme_for("visual.blocks.0.attn.qkv") is None
    assert spec.scheme_for("language_model.lm_head") is None
    assert spec.scheme_for("lm_head") is None
