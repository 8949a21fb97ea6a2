"""vLLM's mixed-precision linears: Marlin, Machete, Humming and TritonW4A16 on a GPU, its 4-bit kernel on a CPU."""

import copy
import logging
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from vlmq_serve.format.scheme import Scheme
from vlmq_serve.format.weight import PackedWeight
from vlmq_serve.kernels.bench.candidates import PEER, Call, Candidate, copies, short

VLLM_KERNELS = (
    "MarlinLinearKernel",
    "MacheteLinearKernel",
    "HummingLinearKernel",
    "TritonW4A16LinearKernel",
    "CPUWNA16LinearKernel",
)

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
        label = _label(name, dtype)
        try:
            start_single_rank()
            calls, size = _vllm_calls(kind, config, weight, dtype, rotation)
        except Exception as error:
            # Other people's kernels fail in ways of their own; ours are still to be measured.
            logger.warning("%s is not measured: %s: %s", name, type(error).__name__, error)
            continue
        yield Candidate(label, PEER, str(weight.scheme), dtype, calls, size)


def _label(kernel: str, dtype: torch.dtype) -> str:
    return f"{kernel.removesuffix('LinearKernel')} {short(dtype)}"


def vllm_choice(scheme: Scheme, out_features: int, in_features: int, dtype: torch.dtype) -> str | None:
    """Label of the kernel that vLLM itself would choose for a layer; None without vLLM, or where it has none."""
    try:
        from vllm.model_executor.kernels.linear import choose_mp_linear_kernel

        from vlmq_serve.quant_methods.backend import layer_config

        shape = (in_features, out_features)
        return _label(choose_mp_linear_kernel(layer_config(scheme, dtype, shape, shape)).__name__, dtype)
    except (ImportError, ValueError) as error:
        logger.info("vLLM has no kernel for %s: %s", scheme, error)
        return None


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
    """vLLM's description of the layer."""
    from vlmq_serve.quant_methods.backend import layer_config

    shape = (weight.shape[1], weight.shape[0])
    return layer_config(weight.scheme, dtype, shape, shape)


def vllm_layer(weight: PackedWeight, dtype: torch.dtype) -> torch.nn.Module:
    """A layer with a copy of the weight, as vLLM would have loaded it."""
    from vlmq_serve.quant_methods.backend import add_parameters

    layer: Any = torch.nn.Module()
    copied = replace(weight, qweight=weight.qweight.clone(), scales=weight.scales.to(dtype, copy=True))
    add_parameters(layer, copied, dtype, [weight.shape[0]])
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
