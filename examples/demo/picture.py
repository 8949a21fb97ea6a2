"""Draws images with question, answer and saliency into one PNG."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image
from torch import Tensor


@dataclass(frozen=True)
class Asked:
    """One image with what was asked, answered and expected; saliency [H, W] in vision tokens."""

    image: Image.Image
    question: str
    answer: str
    expected: str
    saliency: Tensor


def draw(asked: Sequence[Asked], path: Path, title: str) -> None:
    """Left the image, right the same image under a heat map of its tokens' calibration weights."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(len(asked), 2, figsize=(8, 4.2 * len(asked)), squeeze=False)
    for row, entry in zip(axes, asked, strict=True):
        width, height = entry.image.size
        row[0].imshow(entry.image, interpolation="nearest")
        right = entry.answer == entry.expected
        row[0].set_title(f"{entry.question}\nanswer: {entry.answer}", color="darkgreen" if right else "darkred")
        row[0].set_xlabel(f"expected: {entry.expected}")
        row[1].imshow(entry.image.convert("L"), cmap="gray", interpolation="nearest")
        heat = row[1].imshow(
            np.asarray(entry.saliency),
            cmap="inferno",
            alpha=0.6,
            extent=(-0.5, width - 0.5, height - 0.5, -0.5),
        )
        row[1].set_title("weight of each vision token\nin calibration (mean of all tokens is 1)")
        figure.colorbar(heat, ax=row[1], fraction=0.046)
        for axis in row:
            axis.set_xticks([])
            axis.set_yticks([])
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
