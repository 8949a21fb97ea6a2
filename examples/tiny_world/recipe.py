"""The recipe of a training run: its numbers, learning-rate schedule and optimizer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from examples.tiny_world.scenes import SPLITS


@dataclass(frozen=True)
class Recipe:
    """Stage 1 trains the vision tower to name what is under each token, stage 2 everything on the questions.

    The learning rate rises over `warmup` steps at the start of each stage; in the last `decay` share of stage 2
    it falls linearly to zero. From step `shape_head_from` on, a second head names whole shapes at one token each.
    """

    seed: int = 0
    vision_steps: int = 400
    joint_steps: int = 3000
    vision_batch: int = 48
    joint_batch: int = 16
    lr: float = 1.5e-3
    weight_decay: float = 0.05
    warmup: int = 40
    decay: float = 0.35
    label_weight: float = 0.3
    shape_head_from: int = 1600
    ema: float = 0.995

    @property
    def steps(self) -> int:
        """Steps of both stages."""
        return self.vision_steps + self.joint_steps

    @property
    def decay_start(self) -> int:
        """First step with a falling learning rate."""
        return self.steps - int(self.decay * self.joint_steps)

    def lr_factor(self, step: int) -> float:
        """Multiplier of the learning rate at a step."""
        since_stage = step - self.vision_steps if step >= self.vision_steps else step
        rise = min(1.0, (since_stage + 1) / self.warmup)
        fall = min(1.0, (self.steps - step) / max(1, self.steps - self.decay_start))
        return min(rise, fall)

    def scenes_of(self, step: int) -> tuple[int, int]:
        """First scene number and number of scenes of a step; no scene is ever seen twice."""
        first = SPLITS["training"].start + (self.seed << 32)
        if step < self.vision_steps:
            return first + step * self.vision_batch, self.vision_batch
        seen = self.vision_steps * self.vision_batch + (step - self.vision_steps) * self.joint_batch
        return first + seen, self.joint_batch


def build_optimizer(model: nn.Module, head: nn.Module, shape_head: nn.Module, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW; weight decay for matrices only."""
    parameters = [*model.parameters(), *head.parameters()]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": recipe.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        {"params": list(shape_head.parameters()), "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, 0.97), foreach=True)
