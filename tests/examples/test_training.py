"""Training: resumable to the bit, deterministic, and refusing a checkpoint of another recipe."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from examples.tiny_world.packing import make_batch
from examples.tiny_world.recipe import Recipe
from examples.tiny_world.trainer import Trainer

RECIPE = Recipe(vision_steps=2, joint_steps=4, vision_batch=3, joint_batch=2, warmup=2, shape_head_from=3)


def train(trainer: Trainer, steps: int) -> Trainer:
    for _ in range(steps):
        trainer.train_step(make_batch(*trainer.recipe.scenes_of(trainer.step)))
    return trainer


def test_four_steps_equal_two_and_two(tmp_path: Path) -> None:
    whole = train(Trainer.fresh(RECIPE), 4)
    half = train(Trainer.fresh(RECIPE), 2)
    half.save(tmp_path / "checkpoint.pt")
    resumed = Trainer.fresh(replace(RECIPE))
    resumed.load(tmp_path / "checkpoint.pt")
    train(resumed, 2)
    assert resumed.step == whole.step == 4
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name
    for name, value in whole.average.items():
        assert torch.equal(value, resumed.average[name]), name


def test_both_stages_learn_something() -> None:
    """A step must lower the loss on its own batch: vision stage first, then the joint stage."""
    recipe = replace(RECIPE, vision_steps=6, joint_steps=8, warmup=1)
    trainer = Trainer.fresh(recipe)
    batch = make_batch(*recipe.scenes_of(0))
    losses = [trainer.train_step(batch) for _ in range(recipe.vision_steps)]
    assert losses[-1]["labels"] < losses[0]["labels"] - 0.1
    batch = make_batch(*recipe.scenes_of(recipe.vision_steps))
    losses = [trainer.train_step(batch) for _ in range(recipe.joint_steps)]
    assert losses[-1]["answers"] < losses[0]["answers"] - 0.5


def test_another_recipe_is_refused_and_a_longer_one_accepted(tmp_path: Path) -> None:
    Trainer.fresh(RECIPE).save(tmp_path / "checkpoint.pt")
    Trainer.fresh(replace(RECIPE, joint_steps=400)).load(tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match="was trained with"):
        Trainer.fresh(replace(RECIPE, lr=1e-4)).load(tmp_path / "checkpoint.pt")


def test_learning_rate_rises_holds_and_falls() -> None:
    recipe = Recipe()
    factors = [recipe.lr_factor(step) for step in range(recipe.steps)]
    assert max(factors) == 1.0
    assert 0 < factors[0] < 0.1
    assert 0 < factors[recipe.vision_steps] < 0.1
    assert 0 < factors[-1] < 0.01
    assert all(factor == 1.0 for factor in factors[recipe.vision_steps + recipe.warmup : recipe.decay_start])
