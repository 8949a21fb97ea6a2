"""What a calibration will do: the linears with their schemes, and sizes."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from vlmq_serve.calibrate.families.adapter import ModelAdapter
from vlmq_serve.calibrate.linear_plan import LinearPlan
from vlmq_serve.calibrate.recipe import Recipe
from vlmq_serve.calibrate.sources import taps_of
from vlmq_serve.format.names import is_under


@dataclass(frozen=True)
class Plan:
    """Layers, linears, schemes, and bytes on disk before and after; nothing has been touched yet.

    `linears` are those of the decoder; `vision`, `head` and `embeddings` what else is quantized. The overrides and the
    ignore list of `recipe` are complete: they give every linear its scheme.
    """

    source: Path
    adapter: ModelAdapter
    recipe: Recipe
    linears: tuple[LinearPlan, ...]
    layers: int
    layer_prefix: str
    bytes_before: int
    vision: tuple[LinearPlan, ...] = ()
    head: LinearPlan | None = None
    embeddings: LinearPlan | None = None

    @property
    def parts(self) -> tuple[tuple[LinearPlan, ...], ...]:
        """What is quantized beside the decoder, each with one record in the work folder."""
        return tuple(part for part in (self.vision, _alone(self.head), _alone(self.embeddings)) if part)

    @property
    def all_linears(self) -> tuple[LinearPlan, ...]:
        return (*self.linears, *(linear for part in self.parts for linear in part))

    @property
    def quantized(self) -> tuple[LinearPlan, ...]:
        return tuple(linear for linear in self.all_linears if linear.scheme is not None)

    @property
    def bytes_after(self) -> int:
        return self.bytes_before - sum(linear.bytes_before - linear.bytes_after for linear in self.all_linears)

    @property
    def bytes_needed(self) -> int:
        """Room on the disk: the work folder's packed layers, and a checkpoint as the writer reckons it, the source's
        tensors and a head that was tied."""
        untied = sum(linear.bytes_after for linear in self.quantized if linear.tied_to)
        return sum(linear.bytes_after for linear in self.quantized) + self.bytes_before + untied

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


def _alone(linear: LinearPlan | None) -> tuple[LinearPlan, ...]:
    return (linear,) if linear else ()
