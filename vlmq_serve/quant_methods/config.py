"""`VLMQConfig`: how vLLM learns which layer of a checkpoint is quantized, and how."""

import logging
from pathlib import Path
from typing import Any

import torch
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.models.utils import WeightsMapper
from vllm.platforms import current_platform

from vlmq_serve import __version__
from vlmq_serve.format.config import QUANT_METHOD, QuantizationSpec
from vlmq_serve.format.errors import VLMQError
from vlmq_serve.format.names import EMBEDDINGS, fused_members, part_of_model
from vlmq_serve.format.scheme import Scheme
from vlmq_serve.kernels import op, tables
from vlmq_serve.kernels.choice import available_paths
from vlmq_serve.quant_methods.embedding import VLMQEmbeddingMethod
from vlmq_serve.quant_methods.inventory import Inventory, read_inventory
from vlmq_serve.quant_methods.linear import VLMQLinearMethod
from vlmq_serve.quant_methods.names import map_spec, names_in_vllm
from vlmq_serve.quant_methods.options import BACKEND_OVERRIDE, read_options

logger = logging.getLogger(__name__)
MIN_CAPABILITY = 80
"""Compute capability of the oldest GPU that the kernels are compiled for (8.0, A100)."""


class VLMQConfig(QuantizationConfig):
    """The `quantization_config` of a checkpoint inside vLLM. Plain data: vLLM pickles it to its workers."""

    def __init__(self, spec: QuantizationSpec | None = None) -> None:
        super().__init__()
        if spec is None:  # vLLM's way with a method that is asked for, and of which the model says nothing
            raise VLMQError(
                f"--quantization: got {QUANT_METHOD!r} for a model without quantization_config in its config.json; "
                "leave it out, or serve what `vlmq calibrate` wrote"
            )
        self.spec = spec
        self.inventory: Inventory | None = None
        self.backend, self.kernel = read_options()
        self._applied_mappers: list[str] = []

    def __repr__(self) -> str:
        return f"VLMQConfig({self.spec.scheme}, {len(self.spec.overrides)} overrides, ignore={self.spec.ignore})"

    def get_name(self) -> str:
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return MIN_CAPABILITY

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "VLMQConfig":
        """Raises `VLMQError` for an unknown format_version, impossible bits and the like."""
        spec = QuantizationSpec.from_dict(config)
        if spec.simulated_activations is not None:
            logger.warning(
                "vlmq: the checkpoint was calibrated for activations of %d bits, by simulation; "
                "vLLM serves its weights with activations of 16 bits",
                spec.simulated_activations,
            )
        return cls(spec)

    def maybe_update_config(self, model_name: str, hf_config: Any = None, **_: Any) -> None:
        """Check the shard headers when the model is a folder; vLLM calls this before it loads anything.

        A name on the Hugging Face hub is not downloaded yet at this point: there, the checks after loading remain.
        """
        self.backend, self.kernel = read_options(hf_config)
        if hf_config is not None:
            # A compiled graph holds the kernel's name. vLLM finds its compiled graphs again by this config, so a
            # graph for another choice would be used with weights packed for this one.
            hf_config.vlmq_compiled_for = self._kernel_choice()
            setattr(hf_config, BACKEND_OVERRIDE, self.backend)
        folder = Path(model_name)
        if folder.is_dir():
            self.inventory = read_inventory(folder, self.spec)

    def _kernel_choice(self) -> str:
        """What decides the kernel besides the checkpoint: version, operators, what can serve here, force, a table."""
        device = torch.device(current_platform.device_type)
        available = available_paths(self.spec.scheme.bits, torch.bfloat16, device)
        # A table can leave layers to vLLM's kernels, which are other calls on other parameters.
        return " ".join((__version__, op.fingerprint(), *available, self.kernel or "", tables.fingerprint())).rstrip()

    def apply_vllm_mapper(self, hf_to_vllm_mapper: WeightsMapper) -> None:
        """Take over vLLM's names. Models call it once per nested model, some twice with the same mapper."""
        fingerprint = repr(hf_to_vllm_mapper)
        if fingerprint in self._applied_mappers:
            return
        self._applied_mappers.append(fingerprint)
        self.spec = map_spec(self.spec, hf_to_vllm_mapper)
        if self.inventory is not None:
            modules = frozenset(n for name in self.inventory.modules for n in names_in_vllm(name, hf_to_vllm_mapper))
            self.inventory = Inventory(modules, self.inventory.scales_dtype)

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """A method for every linear, for lm_head and for embeddings that are quantized; None leaves a layer to vLLM."""
        if "Experts" in type(layer).__name__ or "FusedMoE" in type(layer).__name__:
            self._refuse_experts(prefix)
            return None
        is_linear = isinstance(layer, LinearBase)
        is_head = isinstance(layer, ParallelLMHead)
        is_table = isinstance(layer, VocabParallelEmbedding) and part_of_model(prefix) == EMBEDDINGS
        if not (is_linear or is_head or is_table):
            return None
        scheme = self.scheme_of(prefix)
        if scheme is None:
            return UnquantizedLinearMethod() if is_linear else None
        scales_dtype = self.inventory.scales_dtype if self.inventory else None
        if is_table:
            return VLMQEmbeddingMethod(scheme, prefix, scales_dtype)
        return VLMQLinearMethod(scheme, prefix, scales_dtype, self.backend, self.kernel)

    def scheme_of(self, prefix: str) -> Scheme | None:
        """Scheme of the vLLM layer `prefix`, the same for all members of a fused layer; None when unquantized."""
        members = fused_members(prefix)
        self.spec.check_fused(members)
        scheme = self.spec.scheme_for(members[0])
        if scheme is not None and self.inventory is not None:
            absent = [member for member in members if member not in self.inventory.modules]
            if absent:
                raise VLMQError(
                    f"{absent[0]}: config.json says {scheme}, but the checkpoint holds no quantized weight for it; "
                    "calibrate again, or add the layer to `ignore` if its plain weight is there"
                )
        return scheme

    def _refuse_experts(self, prefix: str) -> None:
        if self.spec.scheme_for(prefix) is not None:
            raise VLMQError(
                f"{prefix}: got mixture-of-experts weights, vlmq quantizes dense linear layers; "
                "add the experts to `ignore` and calibrate again, or use a dense model"
            )
