"""Block-wise search of clipping percentiles: Q-VLM (Wang et al., NeurIPS 2024), Eq. 3, for weights.

Within a block of one to three decoder layers, all linears of layer k are rounded to grids that span the percentiles
1 - p_k and p_k of each group. The p_k of the block are those of least error at the output of its last layer:

    argmin_p || B_p(U) - B(F) ||^2,    p_k in {1, 0.995, 0.99, 0.985, 0.98}, all combinations
"""

import copy
from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise, product

import torch
from torch import Tensor, nn

from vlmq_serve.calibrate.dependency import conditional_entropy, partition
from vlmq_serve.calibrate.plan import LinearPlan, Plan
from vlmq_serve.calibrate.solvers.rtn import solve_rtn
from vlmq_serve.calibrate.solvers.solution import SolverOptions
from vlmq_serve.calibrate.streams import StreamItem, Streams

PERCENTILES = (1.0, 0.995, 0.99, 0.985, 0.98)


@torch.no_grad()
def find_blocks(layers: Sequence[nn.Module], plan: Plan, streams: Streams) -> dict[int, int]:
    """First layer of each block to the layer behind it, from outputs on the first batch of the full path."""
    item = next(iter(streams))
    hidden, outputs = item.full, []
    for index, layer in enumerate(layers):
        layer.to(streams.device)
        hidden = _forward(plan, layer, index, hidden, item, streams)
        layer.to("cpu")
        outputs.append(hidden)
    depths = partition([conditional_entropy(a, b) for a, b in pairwise(outputs)], plan.recipe.dependency_threshold)
    ends = list(accumulate(depths))
    return {end - depth: end for end, depth in zip(ends, depths, strict=True)}


@torch.no_grad()
def search_percentiles(layers: Sequence[nn.Module], first: int, plan: Plan, streams: Streams) -> tuple[float, ...]:
    """p of every layer of the block that begins with layer `first`; `layers` have their original weights."""
    linears = plan.by_layer[first : first + len(layers)]
    for layer in layers:
        layer.to(streams.device)
    targets = [_run(plan, layers, first, item.full, item, streams).cpu() for item in streams]
    rounded = [
        {p: _rounded(layer, table, p) for p in PERCENTILES} for layer, table in zip(layers, linears, strict=True)
    ]
    best, chosen = float("inf"), (1.0,) * len(layers)
    for combination in product(PERCENTILES, repeat=len(layers)):
        trial = [choices[p] for choices, p in zip(rounded, combination, strict=True)]
        error = 0.0
        for item in streams:
            output = _run(plan, trial, first, item.quantized, item, streams)
            error += float((output.float() - targets[item.position].to(output).float()).square().sum())
        if error < best:
            best, chosen = error, combination
    for layer in layers:
        layer.to("cpu")
    return chosen


def _rounded(layer: nn.Module, linears: Mapping[str, LinearPlan], percentile: float) -> nn.Module:
    made = copy.deepcopy(layer)
    for plan in linears.values():
        if plan.scheme is not None:
            weight = made.get_parameter(f"{plan.local}.weight")
            options = SolverOptions(plan.dtype, "percentile", percentile=percentile)
            weight.data.copy_(solve_rtn(weight.detach().float(), plan.scheme, options).dequantize())
    return made


def _run(
    plan: Plan, layers: Sequence[nn.Module], first: int, hidden: Tensor, item: StreamItem, streams: Streams
) -> Tensor:
    for offset, layer in enumerate(layers):
        hidden = _forward(plan, layer, first + offset, hidden, item, streams)
    return hidden


def _forward(plan: Plan, layer: nn.Module, index: int, hidden: Tensor, item: StreamItem, streams: Streams) -> Tensor:
    hidden = plan.adapter.layer_forward(layer, hidden, item.kwargs)
    if plan.adapter.behind_layer is None:
        return hidden
    inputs = streams.batches[item.position].decoder_inputs
    return plan.adapter.behind_layer(index, hidden.cpu(), inputs).to(hidden)
