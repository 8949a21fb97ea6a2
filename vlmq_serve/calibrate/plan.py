"""What a calibration will do, from config.json and safetensors headers alone."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from vlmq_serve.calibrate.families import find_adapter
from vlmq_serve.calibrate.families.adapter import ModelAdapter
from vlmq_serve.calibrate.loading import choose_device, choose_dtype, resolve_model
from vlmq_serve.calibrate.recipe import Recipe
from vlmq_serve.calibrate.sources import taps_of
from vlmq_serve.format.config import QuantizationSpec
from vlmq_serve.format.errors import VLMQError
from vlmq_serve.format.headers import TensorInfo, read_json, read_tensor_index
from vlmq_serve.format.names import is_under
from vlmq_serve.format.scheme import Scheme
from vlmq_serve.format.weight import tensor_shapes

SCALE_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
_ASSUMED_TOKENS = 512
_RUNTIME_BYTES = 600 * 2**20  # Python with torch and transformers, measured
_ITEM_BYTES = {"qweight": 4, "zeros": 1}


@dataclass(frozen=True)
class LinearPlan:
    """One decoder linear: `name` as in the source's files, `local` within its layer; scheme None: left as it is."""

    name: str
    layer: int
    local: str
    shape: tuple[int, int]
    dtype: torch.dtype
    scheme: Scheme | None

    @property
    def bytes_before(self) -> int:
        return self.shape[0] * self.shape[1] * self.dtype.itemsize

    @property
    def bytes_after(self) -> int:
        if self.scheme is None:
            return self.bytes_before
        shapes = tensor_shapes(self.scheme, *self.shape)
        return sum(n * k * _ITEM_BYTES.get(suffix, self.dtype.itemsize) for suffix, (n, k) in shapes.items())


@dataclass(frozen=True)
class Plan:
    """Layers, linears, schemes, and bytes on disk before and after; nothing has been touched yet."""

    source: Path
    adapter: ModelAdapter
    recipe: Recipe
    linears: tuple[LinearPlan, ...]
    layers: int
    layer_prefix: str
    bytes_before: int

    @property
    def quantized(self) -> tuple[LinearPlan, ...]:
        return tuple(linear for linear in self.linears if linear.scheme is not None)

    @property
    def bytes_after(self) -> int:
        return self.bytes_before - sum(linear.bytes_before - linear.bytes_after for linear in self.linears)

    def tensor_name(self, layer: int, local: str) -> str:
        """Name in the source's files of a layer's own tensor."""
        return f"{self.layer_prefix}.{layer}.{local}"

    @cached_property
    def weighted(self) -> tuple[str, ...]:
        """Local names of the linears whose tokens are weighted, in order."""
        if self.recipe.method != "vlmq":
            return ()
        taps = taps_of(self.adapter, self.recipe.importance)
        chosen = self.recipe.weighted
        if chosen is None:
            return tuple(name for name in taps if name in self.adapter.importance_taps)
        return tuple(name for name in taps if any(is_under(name, entry) for entry in chosen))

    @cached_property
    def by_layer(self) -> tuple[dict[str, LinearPlan], ...]:
        """Per layer, its linears by local name."""
        table: tuple[dict[str, LinearPlan], ...] = tuple({} for _ in range(self.layers))
        for linear in self.linears:
            table[linear.layer][linear.local] = linear
        return table

    @property
    def estimated_bytes(self) -> int:
        """Rough peak memory: weights, both hidden-state streams (512 tokens a sample assumed), solver matrices."""
        item = choose_dtype(self.recipe, choose_device(self.recipe)).itemsize
        source_item = self.linears[0].dtype.itemsize
        if not self.recipe.needs_data:
            return _RUNTIME_BYTES + 16 * max(linear.shape[0] * linear.shape[1] for linear in self.linears)
        tokens = self.recipe.samples * (self.recipe.max_tokens or _ASSUMED_TOKENS)
        streams = 2 * tokens * self.linears[0].shape[1] * item
        widest = max(linear.shape[1] for linear in self.linears)
        return _RUNTIME_BYTES + self.bytes_before * item // source_item + streams + 6 * 4 * widest**2


def make_plan(model: str | Path, recipe: Recipe) -> Plan:
    """Check model and recipe against each other; every misfit is one `VLMQError`."""
    source = resolve_model(model)
    adapter = find_adapter(source)
    if recipe.ignore is None:
        recipe = recipe.model_copy(update={"ignore": adapter.left_alone})
    if "quantization_config" in read_json(source / "config.json"):
        raise VLMQError(f"{source}: is quantized already (quantization_config in config.json); give the original model")
    tensors = read_tensor_index(source)
    prefix = adapter.source_prefix(tensors)
    spec = make_spec(recipe, {})
    layers = 0
    while f"{prefix}.{layers}.{adapter.linears[0]}.weight" in tensors:
        layers += 1
    linears = tuple(
        _plan_linear(tensors, f"{prefix}.{layer}.{local}", layer, local, spec)
        for layer in range(layers)
        for local in adapter.linears
    )
    _check_names(recipe, [linear.name for linear in linears], tensors)
    _check_weighted(recipe, adapter)
    spec.check_fused(linear.name for linear in linears)
    plan = Plan(source, adapter, recipe, linears, layers, prefix, sum(t.nbytes for t in tensors.values()))
    if not plan.quantized:
        raise VLMQError(f"ignore: {list(recipe.ignore or ())} leaves no decoder linear to quantize; remove entries")
    return plan


def make_spec(recipe: Recipe, hashes: dict[str, str], producer: str = "unknown") -> QuantizationSpec:
    """The `quantization_config` that a recipe leads to."""
    settings = recipe.model_dump(
        mode="json", exclude={"bits", "group_size", "symmetric", "overrides", "ignore", "method"}
    )
    return QuantizationSpec(
        recipe.scheme, recipe.override_schemes, recipe.ignore or (), recipe.method, settings, producer, hashes
    )


def _plan_linear(
    tensors: dict[str, TensorInfo], name: str, layer: int, local: str, spec: QuantizationSpec
) -> LinearPlan:
    info = tensors.get(f"{name}.weight")
    if info is None:
        raise VLMQError(f"{name}.weight: not among the model's tensors; the checkpoint is incomplete")
    if info.dtype not in SCALE_DTYPES or len(info.shape) != 2:
        raise VLMQError(f"{name}.weight: got {info.dtype} {info.shape}, allowed 2-d {sorted(SCALE_DTYPES)}")
    scheme = spec.scheme_for(name)
    if scheme is not None:
        try:
            scheme.num_groups(info.shape[1])
        except VLMQError as error:
            raise VLMQError(f"{name}: {error}") from None
    return LinearPlan(name, layer, local, (info.shape[0], info.shape[1]), SCALE_DTYPES[info.dtype], scheme)


def _check_names(recipe: Recipe, linears: list[str], tensors: dict[str, TensorInfo]) -> None:
    """A misspelt module name must not pass as one that fits nothing."""
    for entry in recipe.overrides:
        if not any(is_under(name, entry) for name in linears):
            raise VLMQError(
                f"overrides: {entry!r} fits no decoder linear; names look like {linears[0]!r} or 'down_proj'"
            )
    for entry in recipe.ignore or ():
        # lm_head has no tensor of its own where it is tied to the embeddings.
        if entry != "lm_head" and not any(is_under(name, entry) for name in tensors):
            raise VLMQError(
                f"ignore: {entry!r} fits no module; names look like {linears[0]!r}, 'visual' or 'down_proj'"
            )


def _check_weighted(recipe: Recipe, adapter: ModelAdapter) -> None:
    taps = taps_of(adapter, recipe.importance)
    for entry in recipe.weighted or ():
        if not any(is_under(name, entry) for name in taps):
            raise VLMQError(
                f"weighted: {entry!r} has no gradient of the {recipe.importance} loss; it has some at {', '.join(taps)}"
            )
