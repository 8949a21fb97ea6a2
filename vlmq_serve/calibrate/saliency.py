"""Token importance as pictures, and the file that keeps it."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from vlmq_serve.format.errors import VLMQError
from vlmq_serve.format.tensor_file import save_tensors


def saliency_map(weights: Tensor, grid_thw: Sequence[int] | Tensor, merge_size: int) -> Tensor:
    """Weights of one image's vision tokens, [t*h*w], over the image: [H, W] in merged patches, mean over t.

    `grid_thw` counts patches in time, height and width before `merge_size` x `merge_size` of them become one token.
    """
    frames, height, width = (int(n) for n in grid_thw)
    rows, columns = height // merge_size, width // merge_size
    if weights.numel() != frames * rows * columns:
        raise VLMQError(
            f"saliency: got {weights.numel()} weights for a grid of {frames} x {rows} x {columns} tokens; "
            "give the vision tokens of this image only"
        )
    return weights.reshape(frames, rows, columns).float().mean(0)


def save_saliency(
    path: Path, per_layer: Sequence[dict[int, Tensor]], grids: dict[int, Tensor], modality: dict[int, Tensor]
) -> None:
    """Write `sample.N.importance` fp32 [layers, taps, T], `.modality` uint8 [T] and `.image_grid_thw` int64 [I, 3]."""
    tensors = {}
    for index, grid in grids.items():
        stacked = [layer[index] for layer in per_layer if index in layer]
        if stacked:
            tensors[f"sample.{index}.importance"] = torch.stack(stacked).contiguous()
            tensors[f"sample.{index}.modality"] = modality[index].contiguous()
            tensors[f"sample.{index}.image_grid_thw"] = grid.contiguous()
    save_tensors(tensors, path)
