"""Checks around loading: which splits a scheme allows, and whether every part of a layer has arrived.

vLLM does not notice a tensor that a quantized checkpoint lacks: the layer keeps what it was allocated with. So the
tensors are allocated with values that no checkpoint holds, and a part that still holds them was never loaded.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from vlmq_serve.format.errors import VLMQError
from vlmq_serve.format.names import fused_members
from vlmq_serve.format.scheme import ALLOWED_GROUP_SIZES, CODES_PER_BLOCK, Scheme

UNLOADED_WORD = -1
"""Every code at its largest value; a single row may look like this, the whole weight of a linear does not."""
UNLOADED_BYTE = 255
"""Larger than any zero point below 8 bits."""


def check_split(prefix: str, scheme: Scheme, in_features: int, per_rank: int) -> None:
    """Raise `VLMQError` where `scheme` does not fit a layer of `in_features`, of which a rank holds `per_rank`."""
    try:
        scheme.num_groups(in_features)
    except VLMQError as error:
        raise VLMQError(f"{prefix}: {error}") from None
    if per_rank == in_features:
        return
    group = scheme.group_size
    if per_rank % CODES_PER_BLOCK or (group > 0 and per_rank % group):
        fits = [g for g in ALLOWED_GROUP_SIZES if g > 0 and per_rank % g == 0]
        advice = f"calibrate with group size {max(fits)}" if fits else "no group size fits this split"
        raise VLMQError(
            f"{prefix}: tensor parallelism gives each rank {per_rank} of K={in_features}, which breaks a group of "
            f"{scheme}; {advice}, or use fewer ranks"
        )


def check_loaded(prefix: str, tensors: Mapping[str, Tensor], partitions: Sequence[int]) -> None:
    """Raise `VLMQError` for the first tensor of a layer that was not loaded completely.

    tensors: `qweight`, `scales` and, if any, `zeros` of the layer, rows of all its members one after the other;
    partitions: rows of each member.
    """
    members = fused_members(prefix)
    if len(members) != len(partitions):
        members = [prefix] * len(partitions)
    for suffix, tensor in tensors.items():
        for member, part in zip(members, tensor.split(list(partitions)), strict=True):
            if _is_unloaded(part):
                raise VLMQError(
                    f"{member}.{suffix}: was not loaded (missing from the checkpoint, or not finite); "
                    "`vlmq verify` lists what a checkpoint lacks, copy it again or calibrate again"
                )


def check_zeros(prefix: str, scheme: Scheme, zeros: Tensor | None) -> None:
    """Raise `VLMQError` where a zero point [N, K/G] is no code of `scheme`: the weights would be far off."""
    highest = int(zeros.max()) if zeros is not None and zeros.numel() else 0
    if highest > scheme.max_code:
        raise VLMQError(
            f"{prefix}.zeros: got {highest}, the largest zero point of {scheme} is {scheme.max_code}; "
            "copy the checkpoint again or calibrate again"
        )


def _is_unloaded(part: Tensor) -> bool:
    if part.is_floating_point():
        return not bool(torch.isfinite(part).all())
    return bool((part == (UNLOADED_BYTE if part.dtype == torch.uint8 else UNLOADED_WORD)).all())
