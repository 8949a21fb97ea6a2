"""Names of linear layers: the Hugging Face names of a checkpoint and the fused layers of vLLM."""

from collections.abc import Iterable

FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
VISION_PARTS = ("visual", "vision_tower", "vision_model")
"""A part of the name of everything in a vision tower."""
HEAD = "lm_head"
EMBEDDINGS = "embeddings"
"""The part of a model whose module, in every family, is called `embed_tokens`."""
EMBEDDING_MODULE = "embed_tokens"


def part_of_model(name: str) -> str:
    """Where the weight `name` belongs: `vision`, `lm_head`, `embeddings` or `decoder`."""
    parts = name.split(".")
    if any(part in VISION_PARTS for part in parts):
        return "vision"
    return {HEAD: HEAD, EMBEDDING_MODULE: EMBEDDINGS}.get(parts[-1], "decoder")


def kind_of(name: str) -> str:
    """The name without its numbers: linears of one kind have one shape."""
    return ".".join(part for part in name.split(".") if not part.isdigit())


def fused_members(prefix: str) -> list[str]:
    """Names of the checkpoint linears behind a vLLM layer: [prefix] itself when it is not fused."""
    parent, _, leaf = prefix.rpartition(".")
    dot = f"{parent}." if parent else ""
    return [dot + member for member in FUSED.get(leaf, (leaf,))]


def fused_groups(names: Iterable[str]) -> dict[str, list[str]]:
    """Group checkpoint linears by the vLLM layer that will hold them: `{...qkv_proj: [q, k, v], ...}`."""
    owner = {member: fused for fused, members in FUSED.items() for member in members}
    groups: dict[str, list[str]] = {}
    for name in names:
        parent, _, leaf = name.rpartition(".")
        fused = owner.get(leaf, leaf)
        groups.setdefault(f"{parent}.{fused}" if parent else fused, []).append(name)
    return groups


def is_under(name: str, entry: str) -> bool:
    """True when `name` is the module `entry` or lies below it, also when `entry` leaves leading parents out.

    `model.visual.blocks.0.mlp.fc1` is under `visual`; `language_model.lm_head` is under `lm_head`.
    """
    return f".{entry}." in f".{name}."
