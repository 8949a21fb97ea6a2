"""From the Hugging Face names of a checkpoint's config to the names of vLLM's layers."""

from dataclasses import replace
from typing import Protocol

from vlmq_serve.format.config import QuantizationSpec


class NameMapper(Protocol):
    """The part of vLLM's `WeightsMapper` that is used here."""

    def apply_list(self, values: list[str]) -> list[str]: ...


def map_module_name(name: str, mapper: NameMapper) -> str:
    """vLLM's name of the module `name`.

    The rules of a mapper are made for tensors: they end in a dot ("model.visual." -> "visual."), which the bare name
    of a module does not have, so it is mapped as the prefix of a tensor. A module that a rule drops keeps its name.
    """
    mapped = mapper.apply_list([f"{name}."])
    return mapped[0].removesuffix(".") if mapped else name


def names_in_vllm(name: str, mapper: NameMapper) -> tuple[str, ...]:
    """Names under which vLLM may ask for `name`: the mapped one, and for a module at the top also the one it has.

    Qwen3-VL loads `lm_head` into `language_model.lm_head`, as its mapper says, and builds the layer as `lm_head`.
    """
    mapped = map_module_name(name, mapper)
    return (mapped,) if "." in name or mapped == name else (mapped, name)


def map_spec(spec: QuantizationSpec, mapper: NameMapper) -> QuantizationSpec:
    """`spec` with the names of its overrides and its ignore list as vLLM calls them."""
    return replace(
        spec,
        overrides={new: scheme for name, scheme in spec.overrides.items() for new in names_in_vllm(name, mapper)},
        ignore=tuple(new for name in spec.ignore for new in names_in_vllm(name, mapper)),
    )
