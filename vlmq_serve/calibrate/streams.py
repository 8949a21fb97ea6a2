"""The two activation streams: hidden states of the full-precision path and of the quantized path."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vlmq_serve.calibrate.capture import Batch, capture_first_inputs, group_by_length, move
from vlmq_serve.calibrate.families.adapter import BehindLayer, ModelAdapter
from vlmq_serve.calibrate.progress import Progress
from vlmq_serve.calibrate.samples import MODALITIES, CalibrationSample
from vlmq_serve.calibrate.vision import VisionSimulation, quantized_tower


class StreamItem(NamedTuple):
    """One batch on the compute device: hidden states [B, T, C] of both paths, modality [B, T], layer arguments."""

    position: int
    full: Tensor
    quantized: Tensor
    modality: Tensor
    kwargs: dict[str, Any]


@dataclass
class Streams:
    """Hidden states that enter the next layer, kept on the CPU; one batch at a time visits the compute device."""

    device: torch.device
    batches: list[Batch] = field(default_factory=list)
    full: list[Tensor] = field(default_factory=list)
    quantized: list[Tensor] = field(default_factory=list)

    def __iter__(self) -> Iterator[StreamItem]:
        for i, batch in enumerate(self.batches):
            full, quantized = self.full[i].to(self.device), self.quantized[i].to(self.device)
            kwargs = move(batch.kwargs, self.device)
            yield StreamItem(i, full, quantized, batch.modality.to(self.device), kwargs)

    def advance(self, position: int, full: Tensor, quantized: Tensor) -> None:
        """Replace a batch's hidden states by those that leave the layer."""
        self.full[position], self.quantized[position] = full.cpu(), quantized.cpu()

    def pass_layer(self, index: int, behind_layer: BehindLayer) -> None:
        """What the family does to the hidden states behind decoder layer `index`, on both paths."""
        for position, batch in enumerate(self.batches):
            for path in (self.full, self.quantized):
                path[position] = behind_layer(index, path[position], batch.decoder_inputs)

    def count_tokens(self) -> dict[str, int]:
        """Tokens per modality."""
        counts = torch.zeros(len(MODALITIES), dtype=torch.long)
        for batch in self.batches:
            counts += torch.bincount(batch.modality.reshape(-1).long(), minlength=len(MODALITIES))
        return dict(zip(MODALITIES, counts.tolist(), strict=True))


def capture_streams(
    model: nn.Module,
    adapter: ModelAdapter,
    samples: Iterable[CalibrationSample],
    device: torch.device,
    batch_tokens: int,
    progress: Progress,
    watch: Callable[[list[CalibrationSample]], None] | None = None,
    tower: VisionSimulation | None = None,
) -> Streams:
    """Run embeddings and vision tower over the samples; both streams start equal.

    With a simulated `tower` the quantized stream starts behind that one. `watch` sees every batch of samples in the
    order of the streams.
    """
    streams = Streams(device)
    parts = [model.get_submodule(path) for path in adapter.before_layers]
    for part in parts:
        part.to(device)
    for group in group_by_length(samples, batch_tokens):
        hidden, batch = capture_first_inputs(model, adapter, group, device)
        streams.batches.append(batch)
        streams.full.append(hidden)
        if tower is not None:
            with quantized_tower(model, tower):
                hidden, _ = capture_first_inputs(model, adapter, group, device)
        streams.quantized.append(hidden)
        if watch is not None:
            watch(group)
        for sample in group:
            progress.advance(sample.where)
    for part in parts:
        part.to("cpu")
    return streams
