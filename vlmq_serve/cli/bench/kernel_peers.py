"""Kernels of other packages, given the same weight: vLLM's mixed-precision linears and GemLite, where installed.

What a peer refuses is skipped. What it gets wrong shows in the error that is measured in the same run.
"""

import copy
import logging
import tempfile
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from vlmq_serve.format.packing import pack_codes
from vlmq_serve.format.scheme import WORD_BITS
from vlmq_serve.format.weight import PackedWeight
from vlmq_serve.kernels.bench.candidates import PEER, Call, Candidate, copies, short

VLLM_KERNELS = ("MarlinLinearKernel", "MacheteLinearKernel", "HummingLinearKernel", "TritonW4A16LinearKernel")

logger = logging.getLogger(__name__)


def vllm_peers(weight: PackedWeight, dtype: torch.dtype, rotation: int) -> Iterator[Candidate]:
    """Candidates for each kernel of vLLM that says that it can serve the weight."""
    try:
        from vllm.model_executor.kernels import linear as available
    except ImportError as error:
        logger.info("vLLM's kernels are not measured: %s", error)
        return
    config = vllm_config(weight, dtype)
    for name in VLLM_KERNELS:
        kind = getattr(available, name, None)
        able, reason = kind.can_implement(config) if kind else (False, "this vLLM has none")
        if not able:
            logger.info("%s is not measured: %s", name, reason)
            continue
        label = f"{name.removesuffix('LinearKernel')} {short(dtype)}"
        try:
            start_single_rank()
            calls, size = _vllm_calls(kind, config, weight, dtype, rotation)
        except Exception as error:
            # Other people's kernels fail in ways of their own; ours are still to be measured.
            logger.warning("%s is not measured: %s: %s", name, type(error).__name__, error)
            continue
        yield Candidate(label, PEER, str(weight.scheme), dtype, calls, size)


def start_single_rank() -> None:
    """A tensor-parallel group of one, which vLLM's parameters ask for; nothing where there is a group already."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import parallel_state

    if parallel_state.model_parallel_is_initialized():
        return
    with tempfile.NamedTemporaryFile() as meeting, set_current_vllm_config(VllmConfig()):
        place = f"file://{meeting.name}"
        parallel_state.init_distributed_environment(1, 0, place, local_rank=0, backend="gloo")
        parallel_state.initialize_model_parallel()


def vllm_config(weight: PackedWeight, dtype: torch.dtype) -> Any:
    """vLLM's description of the layer; unsigned codes with zero points, or biased ones when symmetric."""
    from vllm.model_executor.kernels.linear import MPLinearLayerConfig
    from vllm.scalar_type import scalar_types

    scheme = weight.scheme
    biased = {2: "uint2b2", 3: "uint3b4", 4: "uint4b8"}[scheme.bits]
    shape = (weight.shape[1], weight.shape[0])
    return MPLinearLayerConfig(
        full_weight_shape=shape,
        partition_weight_shape=shape,
        weight_type=getattr(scalar_types, biased if scheme.symmetric else f"uint{scheme.bits}"),
        act_type=dtype,
        group_size=scheme.group_size,
        zero_points=not scheme.symmetric,
    )


def vllm_layer(weight: PackedWeight, dtype: torch.dtype) -> torch.nn.Module:
    """A layer with the parameters that vLLM would load from a compressed-tensors checkpoint of this weight.

    weight_packed int32 [N, K*bits/32], weight_scale [N, K/G], weight_zero_point int32 [N*bits/32, K/G].
    """
    from vllm.model_executor.parameter import GroupQuantScaleParameter, PackedvLLMParameter

    def unused(*_: object) -> None:
        """Nothing is loaded from a file."""

    factor = Fraction(WORD_BITS, weight.scheme.bits)
    layer: Any = torch.nn.Module()
    layer.input_size_per_partition, layer.output_size_per_partition = weight.shape[1], weight.shape[0]
    layer.output_partition_sizes = [weight.shape[0]]
    layer.params_dtype = dtype
    layer.weight_packed = PackedvLLMParameter(
        data=weight.qweight.clone(), input_dim=1, output_dim=0, packed_dim=1, packed_factor=factor,
        weight_loader=unused,
    )  # fmt: skip
    layer.weight_scale = GroupQuantScaleParameter(
        data=weight.scales.to(dtype, copy=True), input_dim=1, output_dim=0, weight_loader=unused
    )
    if weight.zeros is not None:
        packed = pack_codes(weight.zeros.t().contiguous(), weight.scheme.bits).t().contiguous()
        layer.weight_zero_point = PackedvLLMParameter(
            data=packed, input_dim=1, output_dim=0, packed_dim=0, packed_factor=factor, weight_loader=unused
        )
    return layer


def _vllm_calls(
    kind: Any, config: Any, weight: PackedWeight, dtype: torch.dtype, rotation: int
) -> tuple[tuple[Call, ...], int]:
    calls: list[Call] = []
    size = 0
    while not calls or len(calls) < copies(size, rotation):
        # A kernel object of its own for each copy: some keep what they made of the layer.
        kernel = kind(
            copy.copy(config), w_q_param_name="weight_packed", w_s_param_name="weight_scale",
            w_zp_param_name="weight_zero_point",
        )  # fmt: skip
        layer = vllm_layer(weight, dtype)
        kernel.process_weights_after_loading(layer)
        size = sum(p.numel() * p.element_size() for p in layer.parameters())
        calls.append(_vllm_call(kernel, layer))
    return tuple(calls), size


def _vllm_call(kernel: Any, layer: torch.nn.Module) -> Call:
    def call(x: Tensor) -> Tensor:
        y: Tensor = kernel.apply_weights(layer, x)
        return y

    return call


def gemlite_peers(weight: PackedWeight, dtype: torch.dtype, rotation: int) -> Iterator[Candidate]:
    """GemLite's linear, tuned by its own shipped tables; it has no 3-bit weights."""
    try:
        from gemlite.core import DType, GemLiteLinearTriton
    except Exception as error:
        # Not only where it is missing: importing it asks for a CUDA device.
        logger.info("GemLite is not measured: %s", error)
        return
    scheme, (rows, cols) = weight.scheme, weight.shape
    if scheme.bits == 3:
        return
    kind = DType.BF16 if dtype == torch.bfloat16 else DType.FP16
    zeros: Any = scheme.mid_code if weight.zeros is None else weight.zeros.to(dtype)
    calls: list[Call] = []
    size = 0
    while not calls or len(calls) < copies(size, rotation):
        layer = GemLiteLinearTriton(scheme.bits, scheme.group_length(cols), cols, rows, kind, kind)
        layer.pack(weight.codes(), weight.scales.to(dtype), zeros, None)
        tensors = [t for t in layer.get_tensor_args() if isinstance(t, Tensor)]
        size = sum(t.numel() * t.element_size() for t in tensors)
        calls.append(layer.forward)
    yield Candidate(f"GemLite {short(dtype)}", PEER, str(scheme), dtype, tuple(calls), size)
