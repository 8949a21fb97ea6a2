"""Train the tiny Qwen2-VL model: `python -m examples.tiny_world.train RUN`."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from torch.utils.data import DataLoader, Dataset

from examples.tiny_world.packing import Batch, make_batch
from examples.tiny_world.recipe import Recipe
from examples.tiny_world.trainer import Trainer, averaged_model, validate

CHECKPOINT = "checkpoint.pt"


class StepBatches(Dataset):
    """The batch of every step of a recipe, by step number."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe

    def __len__(self) -> int:
        return self.recipe.steps

    def __getitem__(self, step: int) -> Batch:
        return make_batch(*self.recipe.scenes_of(step))


def batches(recipe: Recipe, first: int, last: int, workers: int = 1) -> Iterator[Batch]:
    """Batches of steps `first` to `last` - 1, drawn in a background process."""
    loader = DataLoader(StepBatches(recipe), batch_size=None, sampler=range(first, last), num_workers=workers)
    return iter(loader)


def run(trainer: Trainer, folder: Path, until: int, every: int, console: Console) -> None:
    """Train to step `until`; every `every` steps write the checkpoint and a line of `log.jsonl`."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    start, clock = trainer.step, time.monotonic()
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("training", total=until, completed=start)
        for batch in batches(trainer.recipe, start, until):
            losses = trainer.train_step(batch)
            text = " ".join(f"{name} {value:.3f}" for name, value in losses.items())
            progress.update(task, completed=trainer.step, description=text)
            if trainer.step % every == 0 or trainer.step == until:
                trainer.save(folder / CHECKPOINT)
                seconds = (time.monotonic() - clock) / (trainer.step - start)
                record: dict[str, Any] = {"step": trainer.step, "seconds_per_step": round(seconds, 3), **losses}
                if trainer.step > trainer.recipe.vision_steps:
                    record["accuracy"] = validate(averaged_model(trainer.average))
                with (folder / "log.jsonl").open("a") as log:
                    log.write(json.dumps(record) + "\n")
                console.log(record)


def main(
    folder: Annotated[Path, typer.Argument(help="Folder of the run; continues what it finds there.")],
    seed: Annotated[int, typer.Option(help="Seed of weights and scenes.")] = 0,
    vision_steps: Annotated[int, typer.Option(help="Steps of the vision-only stage.")] = Recipe.vision_steps,
    joint_steps: Annotated[int, typer.Option(help="Steps of the joint stage.")] = Recipe.joint_steps,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
    every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 100,
    compiled: Annotated[bool, typer.Option("--compile/--no-compile", help="Use torch.compile.")] = False,
) -> None:
    """Train the tiny Qwen2-VL model on synthetic posters; resumable, deterministic given seed and threads.

    Example: python -m examples.tiny_world.train runs/tiny --compile
    """
    console = Console()
    torch.set_num_threads(threads)
    recipe = Recipe(seed=seed, vision_steps=vision_steps, joint_steps=joint_steps)
    console.print(recipe)
    trainer = Trainer.fresh(recipe, compiled)
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / CHECKPOINT).exists():
        trainer.load(folder / CHECKPOINT)
        console.print(f"continuing at step {trainer.step}")
    run(trainer, folder, recipe.steps, every, console)


if __name__ == "__main__":
    typer.run(main)
