"""`VLMQEmbeddingMethod`: a packed table of embeddings in vLLM, whose rows are looked up as they are stored."""

from typing import Any

import torch
from torch.nn import Parameter
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase

from vlmq_serve.format.scheme import SUFFIXES, Scheme
from vlmq_serve.kernels.lookup import lookup
from vlmq_serve.quant_methods.linear import create_packed_weights, describe_weight
from vlmq_serve.quant_methods.loading import check_loaded, check_zeros


class VLMQEmbeddingMethod(QuantizeMethodBase):
    """Keeps the checkpoint's tensors; a head that is tied to them is refused before anything is loaded."""

    def __init__(self, scheme: Scheme, prefix: str, scales_dtype: torch.dtype | None = None) -> None:
        self.scheme = scheme
        self.prefix = prefix
        self.scales_dtype = scales_dtype
        self.params_dtype = torch.get_default_dtype()
        self.rows, self.cols = 0, 0

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
        """Allocate the checkpoint tensors; each rank holds some rows of the vocabulary, whole."""
        self.rows, self.cols, self.params_dtype = sum(output_partition_sizes), input_size, params_dtype
        dtype = self.scales_dtype or params_dtype
        create_packed_weights(layer, self.scheme, self.rows, input_size, dtype, extra["weight_loader"])

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Check that everything was loaded, but for a part of the model that vLLM leaves out and keeps on meta."""
        if layer.scales.is_meta:
            return
        tensors = {suffix: getattr(layer, suffix).data for suffix in SUFFIXES if hasattr(layer, suffix)}
        check_loaded(self.prefix, tensors, [self.rows])
        check_zeros(self.prefix, self.scheme, tensors.get("zeros"))
        for suffix, data in tensors.items():
            setattr(layer, suffix, Parameter(data, requires_grad=False))
        describe_weight(layer, self.rows, self.cols, self.params_dtype, tensors["qweight"].device)

    def embedding(self, layer: Any, input_: torch.Tensor) -> torch.Tensor:
        """Token ids [...] to embeddings [..., K] in the dtype of the model."""
        zeros = None if self.scheme.symmetric else layer.zeros
        return lookup(input_, layer.qweight, layer.scales, zeros, self.scheme.bits, self.params_dtype)

    def apply(self, layer: torch.nn.Module, *args: torch.Tensor, **kwargs: torch.Tensor) -> torch.Tensor:
        """Not a product: `lm_head` has a weight of its own."""
        raise NotImplementedError(f"{self.prefix}: embeddings are looked up")
