"""`backend`: whether a layer is served by this package's kernels or by vLLM's own (Marlin, Machete, Humming, …).

triton   this package's kernels (on a CPU its CPU paths)
vllm     the kernel that vLLM's own order prefers for the layer; a layer that none can serve is an error
auto     triton, and vllm for layers of which a measured table (`kernels.tables`) says so; the default
"""

import logging
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.kernels.linear import MPLinearLayerConfig, choose_mp_linear_kernel
from vllm.model_executor.parameter import (
    ChannelQuantScaleParameter,
    GroupQuantScaleParameter,
    PackedvLLMParameter,
)
from vllm.scalar_type import scalar_types

from vlmq_serve.format.errors import VLMQError
from vlmq_serve.format.packing import pack_codes
from vlmq_serve.format.scheme import WORD_BITS, Scheme
from vlmq_serve.format.weight import PackedWeight
from vlmq_serve.kernels.tables import prefers_vllm
from vlmq_serve.quant_methods.options import AUTO, TRITON, VLLM

BIASED = {2: "uint2b2", 3: "uint3b4", 4: "uint4b8", 8: "uint8b128"}
"""vLLM's types of symmetric codes; those with zero points are `uint2` and so on."""

logger = logging.getLogger(__name__)


def layer_config(
    scheme: Scheme, dtype: torch.dtype, full: tuple[int, int], partition: tuple[int, int]
) -> MPLinearLayerConfig:
    """vLLM's description of a layer; full and partition: (K, N) of the layer and of this rank's share."""
    return MPLinearLayerConfig(
        full_weight_shape=full,
        partition_weight_shape=partition,
        weight_type=getattr(scalar_types, BIASED[scheme.bits] if scheme.symmetric else f"uint{scheme.bits}"),
        act_type=dtype,
        group_size=scheme.group_size,
        zero_points=not scheme.symmetric,
    )


def add_parameters(layer: Any, weight: PackedWeight, dtype: torch.dtype, partitions: list[int]) -> None:
    """Give `layer` what vLLM would have loaded from a compressed-tensors checkpoint of this weight.

    weight_packed int32 [N, K*bits/32], weight_scale [N, K/G], weight_zero_point int32 [N*bits/32, K/G], and the facts
    that vLLM's kernels read from a layer, where it does not have them.
    """
    (rows, cols), bits = weight.shape, weight.scheme.bits
    facts = {"input_size_per_partition": cols, "output_size_per_partition": rows, "params_dtype": dtype,
             "output_partition_sizes": partitions, "has_bias": getattr(layer, "bias", None) is not None}  # fmt: skip
    for name, value in facts.items():
        if not hasattr(layer, name):
            setattr(layer, name, value)
    factor = Fraction(WORD_BITS, bits)
    layer.weight_packed = PackedvLLMParameter(
        data=weight.qweight, input_dim=1, output_dim=0, packed_dim=1, packed_factor=factor, weight_loader=_loaded
    )
    scales = weight.scales.to(dtype)
    layer.weight_scale = (
        ChannelQuantScaleParameter(data=scales, output_dim=0, weight_loader=_loaded)
        if weight.scheme.group_size == -1
        else GroupQuantScaleParameter(data=scales, input_dim=1, output_dim=0, weight_loader=_loaded)
    )
    if weight.zeros is not None:
        layer.weight_zero_point = PackedvLLMParameter(
            data=pack_codes(weight.zeros.t().contiguous(), bits).t().contiguous(), input_dim=1, output_dim=0,
            packed_dim=0, packed_factor=factor, weight_loader=_loaded,
        )  # fmt: skip


def _loaded(*_: object) -> None:
    """The weight is there already."""


class VLLMKernel:
    """One layer on a kernel of vLLM's."""

    def __init__(self, kind: type, config: MPLinearLayerConfig) -> None:
        self.name = kind.__name__
        self._kernel = kind(
            config, w_q_param_name="weight_packed", w_s_param_name="weight_scale",
            w_zp_param_name="weight_zero_point",
        )  # fmt: skip

    def take(self, layer: Any, weight: PackedWeight, partitions: list[int]) -> None:
        """Repack the weight into the layer; once, while loading."""
        add_parameters(layer, weight, self._kernel.config.act_type, partitions)
        self._kernel.process_weights_after_loading(layer)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None) -> Tensor:
        """x [..., K] to [..., N]."""
        y: Tensor = self._kernel.apply_weights(layer, x.reshape(-1, x.shape[-1]), bias)
        return y.reshape(*x.shape[:-1], y.shape[-1])


def find_kernel(
    backend: str, prefix: str, scheme: Scheme, dtype: torch.dtype, full: tuple[int, int], partition: tuple[int, int],
    device: torch.device,
) -> VLLMKernel | None:  # fmt: skip
    """vLLM's kernel for a layer, or None where this package's own serve it.

    Raises `VLMQError` where the user asked for vLLM's and none can serve the layer.
    """
    wanted = backend == VLLM or (backend == AUTO and prefers_vllm(device, scheme.bits, partition[1], partition[0]))
    if not wanted:
        return None
    try:
        if dtype == torch.float32:
            raise ValueError("they multiply in float16 or bfloat16")
        config = layer_config(scheme, dtype, full, partition)
        kind = choose_mp_linear_kernel(config)
    except ValueError as error:
        reasons = " ".join(str(error).split())
        if backend == VLLM:
            raise VLMQError(
                f"{prefix}: backend {VLLM!r}: no kernel of vLLM serves {scheme} in {dtype} here ({reasons}); "
                f"use {AUTO!r} or {TRITON!r}"
            ) from None
        logger.warning("%s: the table asks for vLLM's kernels, of which none serves %s: %s", prefix, scheme, reasons)
        return None
    return VLLMKernel(kind, config)
