"""`VLMQLinearMethod`: parameters, loading and forward pass of one quantized linear layer in vLLM."""

from fractions import Fraction
from typing import Any

import torch
from torch.nn import Parameter
from vllm.model_executor.layers.linear import LinearMethodBase, register_weight_loader_v2_supported_method
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.parameter import ChannelQuantScaleParameter, GroupQuantScaleParameter, PackedvLLMParameter

from vlmq_serve import kernels
from vlmq_serve.format.scheme import SUFFIXES, WORD_BITS, Scheme, tensor_shapes
from vlmq_serve.format.weight import PackedWeight
from vlmq_serve.quant_methods.backend import VLLMKernel, find_kernel
from vlmq_serve.quant_methods.loading import UNLOADED_BYTE, UNLOADED_WORD, check_loaded, check_split, check_zeros
from vlmq_serve.quant_methods.memory import give_back_freed_memory
from vlmq_serve.quant_methods.options import AUTO

PREPARED = ("qweight", "vlmq_scales", "vlmq_zeros")
"""Parameters of a layer once it is repacked. vLLM's LoRA layers look for the first name to find the device."""


@register_weight_loader_v2_supported_method
class VLMQLinearMethod(LinearMethodBase):
    """Loads checkpoint tensors as they are, repacks them once for the kernel, then multiplies with the result.

    scales_dtype: dtype of the scales in the checkpoint where that is known, else the dtype of the model; backend and
    forced: see `options`.
    """

    def __init__(
        self, scheme: Scheme, prefix: str, scales_dtype: torch.dtype | None = None, backend: str = AUTO,
        forced: str | None = None,
    ) -> None:  # fmt: skip
        self.scheme = scheme
        self.prefix = prefix
        self.scales_dtype = scales_dtype
        self.params_dtype = torch.get_default_dtype()
        self.partitions: list[int] = []
        self.in_features = 0
        self.full = (0, 0)
        self.path = ""
        self.backend = backend
        self.forced = forced
        self.kernel: VLLMKernel | None = None

    # vLLM passes these by position from some layers and by keyword from others: names and order are its interface.
    def create_weights(
        self,
        layer: torch.nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra: Any,
    ) -> None:
        """Allocate the checkpoint tensors, filled with values that no checkpoint holds (see `loading`)."""
        check_split(self.prefix, self.scheme, input_size, input_size_per_partition)
        rows, dtype = sum(output_partition_sizes), self.scales_dtype or params_dtype
        create_packed_weights(layer, self.scheme, rows, input_size_per_partition, dtype, extra["weight_loader"])
        self.params_dtype = params_dtype
        self.partitions = list(output_partition_sizes)
        self.in_features = input_size_per_partition
        self.full = (input_size, output_size)

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Check that everything was loaded, repack for the kernel of the layer's device, drop what was loaded.

        Nothing to do where that is done already, nor for a part of the model that vLLM leaves out and keeps on meta.
        Once more where vLLM reloads weights: it puts the parameters of the checkpoint back, and copies what comes out
        into the tensors that serve.
        """
        if not hasattr(layer, "scales") or layer.scales.is_meta:
            return
        tensors = {suffix: getattr(layer, suffix).data for suffix in SUFFIXES if hasattr(layer, suffix)}
        check_loaded(self.prefix, tensors, self.partitions)
        check_zeros(self.prefix, self.scheme, tensors.get("zeros"))
        weight = PackedWeight(tensors["qweight"], tensors["scales"], tensors.get("zeros"), self.scheme)
        device, share = weight.qweight.device, (self.in_features, sum(self.partitions))
        self.kernel = find_kernel(self.backend, self.prefix, self.scheme, self.params_dtype, self.full, share, device)
        prepared = None if self.kernel else kernels.prepare(weight, self.params_dtype, device, self.forced)
        for suffix in tensors:
            delattr(layer, suffix)
        if self.kernel is not None:
            self.kernel.take(layer, weight, self.partitions)
            self.path = self.kernel.name
        elif prepared is not None:
            for name, data in zip(PREPARED, (prepared.qdata, prepared.scales, prepared.zeros), strict=True):
                layer.register_parameter(name, Parameter(data, requires_grad=False))
            self.path = prepared.path
        if isinstance(layer, VocabParallelEmbedding):
            describe_weight(layer, *weight.shape, self.params_dtype, device)
        del weight, tensors, prepared
        give_back_freed_memory(device)

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x [..., K] times the weight transposed, plus bias: [..., N] in the dtype of x."""
        if self.kernel is not None:
            return self.kernel.apply(layer, x, bias)
        y = kernels.gemm(
            x,
            layer.qweight,
            layer.vlmq_scales,
            layer.vlmq_zeros,
            self.scheme.bits,
            self.scheme.group_length(self.in_features),
            sum(self.partitions),
            self.path,
        )
        return y if bias is None else y + bias


def create_packed_weights(
    layer: torch.nn.Module, scheme: Scheme, rows: int, cols: int, scales_dtype: torch.dtype, loader: Any
) -> None:
    """Parameters of `layer` for a packed weight [rows, cols] in checkpoint layout, as `loading` wants them before."""
    shapes = tensor_shapes(scheme, rows, cols)
    qweight = PackedvLLMParameter(
        data=torch.full(shapes["qweight"], UNLOADED_WORD, dtype=torch.int32),
        input_dim=1,
        output_dim=0,
        packed_dim=1,
        packed_factor=Fraction(WORD_BITS, scheme.bits),
        weight_loader=loader,
    )
    _set_dummy_value(qweight, 0)
    layer.register_parameter("qweight", qweight)
    scales = torch.full(shapes["scales"], float("nan"), dtype=scales_dtype)
    layer.register_parameter("scales", _group_parameter(scheme, scales, loader))
    if "zeros" in shapes:
        zeros = _group_parameter(scheme, torch.full(shapes["zeros"], UNLOADED_BYTE, dtype=torch.uint8), loader)
        _set_dummy_value(zeros, scheme.mid_code)
        layer.register_parameter("zeros", zeros)


def _group_parameter(scheme: Scheme, data: torch.Tensor, loader: Any) -> Parameter:
    """[N, K/G], split along K with the layer; a whole-row group belongs to every part of the row."""
    if scheme.group_size == -1:
        return ChannelQuantScaleParameter(data=data, output_dim=0, weight_loader=loader)
    return GroupQuantScaleParameter(data=data, input_dim=1, output_dim=0, weight_loader=loader)


def _set_dummy_value(parameter: Any, value: int) -> None:
    """Tell vLLM what `--load-format dummy` writes into an integer tensor, which it would leave as allocated."""
    parameter.dummy_weight_value = value


def describe_weight(layer: torch.nn.Module, rows: int, cols: int, dtype: torch.dtype, device: torch.device) -> None:
    """Give a packed head or table the `weight` whose shape, dtype and device vLLM reads for LoRA and EAGLE drafts.

    One NaN in memory, and no parameter: nothing loads, saves or moves it, and whoever multiplies with it sees that.
    """
    layer.weight = torch.full((1, 1), float("nan"), dtype=dtype, device=device).expand(rows, cols)
