"""Write the calibration and evaluation files: `python -m examples.tiny_world.data examples/data`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from examples.tiny_world.draw import data_url
from examples.tiny_world.packing import questions_of
from examples.tiny_world.questions import KINDS
from examples.tiny_world.scenes import SPLITS, scene_from_seed

CALIBRATION_CHATS = 512
EVALUATION_CHATS = 2048


def chats(split: str, count: int) -> Iterator[dict]:
    """The first `count` chats of a split: each about a poster of its own, the kinds of question in turn."""
    for i in range(count):
        scene = scene_from_seed(SPLITS[split].start + i)
        (question,) = questions_of(scene, (KINDS[i % len(KINDS)],))
        content = [{"type": "image", "image": data_url(scene)}, {"type": "text", "text": question.text}]
        messages = [{"role": "user", "content": content}, {"role": "assistant", "content": question.answer}]
        yield {"messages": messages, "task": question.kind}


def main(
    folder: Annotated[Path, typer.Argument(help="Folder for the two files.")],
    calibration: Annotated[int, typer.Option(min=1, help="Chats to calibrate with.")] = CALIBRATION_CHATS,
    evaluation: Annotated[int, typer.Option(min=1, help="Held-out questions.")] = EVALUATION_CHATS,
) -> None:
    """Write calibration.jsonl (512 chats) and evaluation.jsonl (2,048 chats); the same files every time.

    More calibration chats begin with the same 512: a pool from which several calibration seeds draw different ones.

    Example: python -m examples.tiny_world.data examples/data

    Example: python -m examples.tiny_world.data out/pool --calibration 4096
    """
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in (("calibration", calibration), ("evaluation", evaluation)):
        path = folder / f"{split}.jsonl"
        path.write_text("".join(json.dumps(chat, ensure_ascii=False) + "\n" for chat in chats(split, count)))
        Console().print(f"wrote {path}: {count} chats, {path.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    typer.run(main)
