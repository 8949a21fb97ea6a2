"""Learns the clipping of the simulated vision tower (Q-VLM, Wang et al., NeurIPS 2024): the factors of `vision` that
minimise `vision_loss`. Rounding passes gradients straight through; the decoder keeps its weights."""

from collections.abc import Sequence

import torch
from torch import nn

from vlmq_serve.calibrate.capture import batch_inputs, group_by_length
from vlmq_serve.calibrate.data import SampleFeed
from vlmq_serve.calibrate.families.adapter import ModelAdapter
from vlmq_serve.calibrate.recipe import Recipe
from vlmq_serve.calibrate.samples import VISION, CalibrationSample
from vlmq_serve.calibrate.vision import SMALLEST_FACTOR, Factors, VisionSimulation, vision_linears
from vlmq_serve.calibrate.vision_loss import vision_loss

LEARNING_SAMPLES, LEARNING_BATCH = 64, 8
LEARNING_RATE = 0.01


def simulate_vision(
    model: nn.Module, adapter: ModelAdapter, feed: SampleFeed, recipe: Recipe, device: torch.device
) -> VisionSimulation | None:
    """The tower that the recipe asks for, its factors learned; None where it stays at 16 bits."""
    if not recipe.simulated_vision or recipe.activation_bits is None:
        return None
    model.to(device)
    seeing = [sample for sample in feed.first(LEARNING_SAMPLES) if bool((sample.modality == VISION).any())]
    factors = learn_factors(model, adapter, seeing, recipe, device)
    model.to("cpu")
    return VisionSimulation(recipe.bits, recipe.activation_bits, factors)


def equal_batches(samples: Sequence[CalibrationSample]) -> list[Sequence[CalibrationSample]]:
    """At most 8 samples each, equally long ones."""
    longest = max((sample.length for sample in samples), default=1)
    groups = list(group_by_length(samples, LEARNING_BATCH * longest))
    # A group is limited by its tokens: of short samples it holds more than 8.
    return [group[i : i + LEARNING_BATCH] for group in groups for i in range(0, len(group), LEARNING_BATCH)]


def learn_factors(
    model: nn.Module, adapter: ModelAdapter, samples: Sequence[CalibrationSample], recipe: Recipe, device: torch.device
) -> dict[str, Factors]:
    """c_w and c_a of every linear of the tower, learned on `samples` with images in batches of 8.

    `model` is on the device. Without epochs or samples all are 1.
    """
    assert recipe.activation_bits is not None  # the recipe has been checked
    names = vision_linears(model, adapter)
    raw = torch.ones(len(names), 2, device=device, requires_grad=True)
    optimizer = torch.optim.Adam([raw], LEARNING_RATE)
    batches = equal_batches(samples)
    for _ in range(recipe.vision_epochs):
        for batch in batches:
            factors = {name: Factors(row[0], row[1]) for name, row in zip(names, raw, strict=True)}
            simulation = VisionSimulation(recipe.bits, recipe.activation_bits, factors)
            modality = torch.stack([sample.modality for sample in batch])
            with torch.enable_grad():
                loss = vision_loss(model, adapter, batch_inputs(batch, device), modality, simulation, recipe)
                optimizer.zero_grad()
                loss.backward()
            optimizer.step()
            raw.data.clamp_(SMALLEST_FACTOR, 1)
    found = raw.detach().cpu().tolist()
    return {name: Factors(*row) for name, row in zip(names, found, strict=True)}
