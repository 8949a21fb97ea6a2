"""The training state, one step of it, its checkpoint and its accuracy on held-out scenes."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Qwen2VLForConditionalGeneration

from examples.tiny_world.draw import LABEL_SIZES, WHOLE_SHAPES
from examples.tiny_world.forward import packed_logits, to_patches, vision_tokens
from examples.tiny_world.model import build_model
from examples.tiny_world.packing import Batch, make_batch, prefix_tokens
from examples.tiny_world.questions import KINDS
from examples.tiny_world.recipe import Recipe, build_optimizer
from examples.tiny_world.scenes import SPLITS

Losses = tuple[Tensor, Tensor]


def label_loss(head: nn.Linear, vision: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of the auxiliary head, mean over label groups; vision [B, 64, H], labels [B, 64, 5]."""
    groups = head(vision).flatten(0, 1).split(list(LABEL_SIZES), dim=-1)
    losses = [F.cross_entropy(logits, labels[..., i].flatten()) for i, logits in enumerate(groups)]
    return torch.stack(losses).mean()


def answer_loss(model: Qwen2VLForConditionalGeneration, vision: Tensor, prefix: Tensor, batch: Batch) -> Tensor:
    """Cross-entropy over the answer tokens and the <|im_end|> behind them."""
    logits = packed_logits(model, vision, prefix, batch.slots, batch.places)
    losses = F.cross_entropy(logits.flatten(0, 2), batch.targets.flatten(), reduction="none")
    return (losses * batch.weights.flatten()).sum() / batch.weights.sum()


@dataclass
class Trainer:
    """Everything a run carries from step to step."""

    recipe: Recipe
    model: Qwen2VLForConditionalGeneration
    head: nn.Linear
    shape_head: nn.Linear
    average: dict[str, Tensor]
    optimizer: torch.optim.AdamW
    see: Callable[[Tensor], Tensor]
    loss: Callable[[Tensor, Tensor, Batch], Losses]
    step: int = 0

    @classmethod
    def fresh(cls, recipe: Recipe, compiled: bool = False) -> Trainer:
        """A trainer at step 0; `compiled` uses torch.compile (a fifth faster, needs a C++ compiler)."""
        model = build_model(recipe.seed)
        with torch.random.fork_rng():
            torch.manual_seed(recipe.seed)
            width = model.config.text_config.hidden_size
            head, shape_head = nn.Linear(width, sum(LABEL_SIZES)), nn.Linear(width, WHOLE_SHAPES)

        def see(images: Tensor) -> Tensor:
            return vision_tokens(model.model.visual, to_patches(images))

        def joint_loss(vision: Tensor, prefix: Tensor, batch: Batch) -> Losses:
            return answer_loss(model, vision, prefix, batch), label_loss(head, vision, batch.labels)

        if compiled:
            see, joint_loss = torch.compile(see), torch.compile(joint_loss)
        average = {name: value.clone() for name, value in model.state_dict().items()}
        optimizer = build_optimizer(model, head, shape_head, recipe)
        return cls(recipe, model, head, shape_head, average, optimizer, see, joint_loss)

    def train_step(self, batch: Batch) -> dict[str, float]:
        """One update on a batch; returns the losses in nats."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.lr * self.recipe.lr_factor(self.step)
        vision = self.see(batch.images)
        if self.step < self.recipe.vision_steps:
            labels = label_loss(self.head, vision, batch.labels)
            losses, total = {"labels": labels}, labels
        else:
            answers, labels = self.loss(vision, prefix_tokens(), batch)
            losses = {"answers": answers, "labels": labels}
            total = answers + self.recipe.label_weight * labels
            if self.step >= self.recipe.shape_head_from:
                shapes = F.cross_entropy(self.shape_head(vision).flatten(0, 1), batch.shapes.flatten())
                losses, total = {**losses, "shapes": shapes}, total + self.recipe.label_weight * shapes
        total.backward()
        nn.utils.clip_grad_norm_([p for group in self.optimizer.param_groups for p in group["params"]], 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._update_average()
        self.step += 1
        return {name: value.item() for name, value in losses.items()}

    @torch.no_grad()
    def _update_average(self) -> None:
        keep = min(self.recipe.ema, (1 + self.step) / (10 + self.step))
        for name, value in self.model.state_dict().items():
            self.average[name].lerp_(value, 1 - keep)

    def save(self, path: Path) -> None:
        """Write the checkpoint; a crash leaves the previous one."""
        state = {
            "recipe": asdict(self.recipe),
            "step": self.step,
            "model": self.model.state_dict(),
            "head": self.head.state_dict(),
            "shape_head": self.shape_head.state_dict(),
            "average": self.average,
            "optimizer": self.optimizer.state_dict(),
        }
        partial = path.with_suffix(".partial")
        torch.save(state, partial)
        os.replace(partial, path)

    def load(self, path: Path) -> None:
        """Continue from a checkpoint of the same recipe; `joint_steps` may differ until the rate falls.

        Raises ValueError when the recipe differs otherwise.
        """
        state = torch.load(path, weights_only=True)
        saved = Recipe(**state["recipe"])
        if state["step"] <= min(saved.decay_start, self.recipe.decay_start):
            saved = replace(saved, joint_steps=self.recipe.joint_steps)
        if saved != self.recipe:
            raise ValueError(f"{path} was trained with {saved}, not {self.recipe}; use its recipe or a new folder")
        self.step = state["step"]
        self.model.load_state_dict(state["model"])
        self.head.load_state_dict(state["head"])
        self.shape_head.load_state_dict(state["shape_head"])
        self.average = state["average"]
        self.optimizer.load_state_dict(state["optimizer"])


def averaged_model(average: dict[str, Tensor]) -> Qwen2VLForConditionalGeneration:
    """A model with the averaged weights."""
    model = build_model(0)
    model.load_state_dict(average)
    return model.eval()


@torch.no_grad()
def validate(model: Qwen2VLForConditionalGeneration, scenes: int = 64, batch: int = 32) -> dict[str, float]:
    """Share of exactly right greedy answers per kind on the first validation scenes.

    With the right answer as input, the answer is right exactly when every answer token is the most likely one, so
    no generation is needed.
    """
    right = torch.zeros(len(KINDS))
    for start in range(0, scenes, batch):
        data = make_batch(SPLITS["validation"].start + start, min(batch, scenes - start), KINDS)
        vision = vision_tokens(model.model.visual, to_patches(data.images))
        best = packed_logits(model, vision, prefix_tokens(), data.slots, data.places).argmax(-1)
        right += ((best == data.targets) | (data.weights == 0)).all(-1).float().sum(0)
    return dict(zip(KINDS, (right / scenes).tolist(), strict=True))
