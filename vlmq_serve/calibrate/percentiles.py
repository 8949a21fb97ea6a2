"""Block-wise search of clipping percentiles: Q-VLM (Wang et al., NeurIPS 2024), Eq. 3.

Within a block of one to three decoder layers, all linears of layer k are rounded to grids that span the percentiles
1 - p_k and p_k of each group. The p_k of the block are those of least error at the output of its last layer:

    argmin_p || B_p(U) - B(F) ||^2,    p_k in {1, 0.995, 0.99, 0.985, 0.98}, all combinations

With simulated activations a second search of the same kind follows, for the percentiles of what the linears of each
layer read, with the weights of the first. Both at once would be 5^6 combinations.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import accumulate, pairwise

import torch
from torch import Tensor, nn

from vlmq_serve.calibrate.activations import InputQuantizer, observe, quantized_inputs
from vlmq_serve.calibrate.dependency import conditional_entropy, partition
from vlmq_serve.calibrate.linear import Clipping
from vlmq_serve.calibrate.linear_plan import LinearPlan
from vlmq_serve.calibrate.plan import Plan
from vlmq_serve.calibrate.solvers.rtn import solve_rtn
from vlmq_serve.calibrate.solvers.solution import SolverOptions
from vlmq_serve.calibrate.streams import StreamItem, Streams

PERCENTILES = (1.0, 0.995, 0.99, 0.985, 0.98)
Quantizers = Mapping[str, InputQuantizer]
"""By local name of the linear."""
Trial = tuple[nn.Module, Quantizers]
"""A layer with rounded weights, and what quantizes the inputs of its linears."""


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
def search_percentiles(layers: Sequence[nn.Module], first: int, plan: Plan, streams: Streams) -> tuple[Clipping, ...]:
    """p of every layer of the block that begins with layer `first`; `layers` have their original weights."""
    for layer in layers:
        layer.to(streams.device)
    targets = [_run(plan, layers, first, item.full, item, streams).cpu() for item in streams]
    inputs = _input_quantizers(layers, first, plan, streams)
    rounded = [
        {p: _rounded(layer, linears, p) for p in PERCENTILES}
        for layer, linears in zip(layers, plan.by_layer[first : first + len(layers)], strict=True)
    ]

    def best(options: Sequence[Mapping[float, Trial]]) -> tuple[float, ...]:
        start = [hidden.cpu() for hidden in streams.quantized]
        found = _outputs(plan, options, first, start, streams)
        return min(found, key=lambda outputs: _error(outputs[1], targets))[0]

    weights = best(
        [{p: (table[p], whole[1.0]) for p in PERCENTILES} for table, whole in zip(rounded, inputs, strict=True)]
    )
    activations = (1.0,) * len(layers)
    if plan.recipe.activations is not None:
        chosen = [table[p] for table, p in zip(rounded, weights, strict=True)]
        activations = best(
            [{p: (layer, table[p]) for p in PERCENTILES} for layer, table in zip(chosen, inputs, strict=True)]
        )
    for layer in layers:
        layer.to("cpu")
    return tuple(Clipping(w, a) for w, a in zip(weights, activations, strict=True))


def _outputs(
    plan: Plan,
    options: Sequence[Mapping[float, Trial]],
    first: int,
    hidden: Sequence[Tensor],
    streams: Streams,
    chosen: tuple[float, ...] = (),
) -> Iterator[tuple[tuple[float, ...], Sequence[Tensor]]]:
    """All combinations with the block's outputs per batch. Those that begin alike share the layers they begin with."""
    if len(chosen) == len(options):
        yield chosen, hidden
        return
    for p, (layer, quantizers) in options[len(chosen)].items():
        with quantized_inputs(layer, quantizers):
            behind = [
                _forward(plan, layer, first + len(chosen), hidden[item.position].to(item.full), item, streams).cpu()
                for item in streams
            ]
        yield from _outputs(plan, options, first, behind, streams, (*chosen, p))


def _error(outputs: Sequence[Tensor], targets: Sequence[Tensor]) -> float:
    return sum(float((a.float() - b.float()).square().sum()) for a, b in zip(outputs, targets, strict=True))


def _input_quantizers(
    layers: Sequence[nn.Module], first: int, plan: Plan, streams: Streams
) -> list[dict[float, Quantizers]]:
    """Per layer and percentile the quantizers of what its linears read.

    Static ranges are those of the quantized path's inputs of the block, behind original weights.
    """
    scheme = plan.recipe.activations
    if scheme is None:
        return [{p: {} for p in PERCENTILES} for _ in layers]
    found: list[dict[float, Quantizers]] = []
    run = partial(_run_all, plan, layers, first, streams)
    for layer, linears in zip(layers, plan.by_layer[first : first + len(layers)], strict=True):
        names = [linear.local for linear in linears.values() if linear.scheme is not None]
        inputs: dict[str, list[Tensor]] = {name: [] for name in names}
        if scheme.is_static:
            inputs = _inputs_of(layer, names, run)
        found.append({p: {name: observe(scheme, inputs[name], p) for name in names} for p in PERCENTILES})
    return found


def _run_all(plan: Plan, layers: Sequence[nn.Module], first: int, streams: Streams) -> None:
    for item in streams:
        _run(plan, layers, first, item.quantized, item, streams)


def _inputs_of(layer: nn.Module, names: Sequence[str], run: Callable[[], None]) -> dict[str, list[Tensor]]:
    """What linears of `layer` read while `run` goes."""
    seen: dict[str, list[Tensor]] = {name: [] for name in names}

    def keep(name: str) -> Callable[..., None]:
        return lambda _, args: seen[name].append(args[0].detach())

    handles = [layer.get_submodule(name).register_forward_pre_hook(keep(name)) for name in names]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _rounded(layer: nn.Module, linears: Mapping[str, LinearPlan], percentile: float) -> nn.Module:
    made = copy.deepcopy(layer)
    for plan in linears.values():
        if plan.scheme is not None:
            weight = made.get_parameter(f"{plan.local}.weight")
            options = SolverOptions(plan.stored_dtype, "percentile", percentile=percentile)
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
