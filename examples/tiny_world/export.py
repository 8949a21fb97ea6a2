"""Write the averaged weights of a run as a model folder: `python -m examples.tiny_world.export RUN OUT`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from examples.tiny_world.channels import spread_channels
from examples.tiny_world.model import save_folder
from examples.tiny_world.train import CHECKPOINT
from examples.tiny_world.trainer import averaged_model


def main(
    run: Annotated[Path, typer.Argument(help="Folder of the training run.")],
    out: Annotated[Path, typer.Argument(help="Model folder to write.")],
    spread: Annotated[float, typer.Option(help="Deviation of the channel scales in powers of two; 0: none.")] = 1.0,
) -> None:
    """Write the model folder of a (finished or running) training run; see `channels.py` for --spread.

    Example: python -m examples.tiny_world.export runs/tiny examples/tiny-qwen2vl
    """
    state = torch.load(run / CHECKPOINT, weights_only=True)
    model = averaged_model(state["average"])
    spread_channels(model, spread)
    save_folder(model, out)
    Console().print(f"wrote {out} from step {state['step']}")


if __name__ == "__main__":
    typer.run(main)
