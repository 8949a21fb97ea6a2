"""What the token weights of VLMQ follow, and whom they favour: the figures of docs/methods.md on that.

    python -m benchmarks.quality.token_weights examples/tiny-qwen2vl --data examples/data/calibration.jsonl \
        --method vlmq vlmq:exponent=2 vlmq:importance=cross_entropy \
        --output benchmarks/results/token-weights-tiny-qwen2vl.csv

Calibrates layer by layer as `vlmq calibrate` does, writes no checkpoint, and a CSV with a row for each method, layer
and linear that has weights. Layers without a gradient, as the first of the attention loss, are left out.

spread              of the weights over tokens: standard deviation in units of the mean
error_spread        the same of ||(W_q - W) u_t||, what rounding this linear does to its output
drift_correlation   rank correlation of the weight with ||u_t - f_t||, how far the layer's input has moved
heaviest_*          of the heaviest tenth of the tokens: what part of all weight it holds, and of which modality it is
mean_*              mean weight by modality, 1 for all tokens together
"""

import argparse
import csv
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.quality.token_statistics import modalities_of_heaviest, rank_correlation, share_of_heaviest, spread
from vlmq_serve.calibrate.capture import linear_input
from vlmq_serve.calibrate.cross_entropy import AnswerGradients
from vlmq_serve.calibrate.data import SampleFeed, load_data
from vlmq_serve.calibrate.importance import TokenImportance
from vlmq_serve.calibrate.layer import quantize_layer
from vlmq_serve.calibrate.loading import choose_device, choose_dtype, load_model, load_processor
from vlmq_serve.calibrate.metrics import mean_by_modality
from vlmq_serve.calibrate.plan import Plan
from vlmq_serve.calibrate.planning import make_plan
from vlmq_serve.calibrate.progress import Progress
from vlmq_serve.calibrate.recipe import Recipe, make_recipe
from vlmq_serve.calibrate.rounded_parts import round_parts
from vlmq_serve.calibrate.signals import LayerSignals, layer_signals
from vlmq_serve.calibrate.simulation import parse_setting
from vlmq_serve.calibrate.sources import measure_importance
from vlmq_serve.calibrate.streams import Streams, capture_streams
from vlmq_serve.cli.console import RichProgress, hide_loading_bars, one_line_errors, out
from vlmq_serve.evaluate.quality.variants import parse_method
from vlmq_serve.format.errors import VLMQError


@dataclass(frozen=True)
class Row:
    """The token weights of one linear."""

    layer: int
    linear: str
    tokens: int
    effective_tokens: float
    spread: float
    error_spread: float
    drift_correlation: float
    heaviest_weight: float
    heaviest_vision: float
    heaviest_prompt: float
    heaviest_answer: float
    mean_vision: float
    mean_prompt: float
    mean_answer: float


@one_line_errors
def main() -> None:
    """Measure and write the table."""
    options = _options()
    hide_loading_bars()
    rows = []
    for label in options.method:
        method, settings = parse_method(label)
        shared = {"method": method, "samples": options.samples, "seed": options.seed}
        recipe = make_recipe(**{**parse_setting(options.scheme), **shared, **settings})
        with RichProgress() as progress:
            rows += [{"method": label, **_cells(row)} for row in measure(options.model, options.data, recipe, progress)]
    options.output.parent.mkdir(parents=True, exist_ok=True)
    with options.output.open("w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, ["method", *(field.name for field in fields(Row))], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    out.print(f"wrote {options.output}, {len(rows)} rows", highlight=False, soft_wrap=True)


def _cells(row: Row) -> dict[str, object]:
    return {k: float(f"{v:.3g}") if isinstance(v, float) else v for k, v in asdict(row).items()}


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--method", nargs="+", default=["vlmq"], help="with settings if need be: vlmq:exponent=2")
    parser.add_argument("--scheme", default="w2g-1")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True)
    return parser.parse_args()


def measure(model: Path, data: Path, recipe: Recipe, progress: Progress) -> Iterator[Row]:
    """Calibrate `model` layer by layer, and say of each what its token weights are."""
    plan = make_plan(model, recipe)
    if not plan.weighted:
        raise VLMQError(f"method: {recipe.method!r} weighs no tokens; use vlmq")
    loaded = load_model(plan.source, choose_dtype(recipe.dtype, choose_device(recipe.device)))
    layers = plan.adapter.decoder_layers(loaded)
    streams, signals = _prepare(loaded, layers, plan, data, progress)
    progress.stage("quantize layers", plan.layers)
    for index in range(plan.layers):
        yield from measure_layer(layers[index], index, plan, streams, signals[index])
        progress.advance()


def _prepare(
    model: nn.Module, layers: nn.ModuleList, plan: Plan, data: Path, progress: Progress
) -> tuple[Streams, list[LayerSignals]]:
    recipe, adapter, device = plan.recipe, plan.adapter, choose_device(plan.recipe.device)
    round_parts(model, plan, None)
    chats = load_data(data, recipe)
    image_token = adapter.image_token_id(model.config)
    feed = SampleFeed(load_processor(plan.source), chats, image_token, recipe.max_tokens, recipe.max_pixels)
    gradients = AnswerGradients(model, layers, adapter.linears, device) if recipe.needs_answer_gradients else None
    progress.stage("read images and questions", len(chats.chats))
    watch = gradients.add if gradients else None
    streams = capture_streams(model, adapter, feed, device, recipe.batch_tokens, progress, watch)
    model.to("cpu")
    return streams, layer_signals(plan, streams, gradients.layers if gradients else None)


@torch.no_grad()
def measure_layer(layer: nn.Module, index: int, plan: Plan, streams: Streams, signals: LayerSignals) -> Iterator[Row]:
    """Rows of a layer that still has its weights; quantizes it and moves the streams behind it."""
    layer.to(streams.device)
    weights = measure_importance(layer, plan.adapter, plan.recipe, plan.weighted, streams, signals.gradients)
    entering = list(streams.quantized)
    pairs = zip(entering, streams.full, strict=True)
    drift = _together((u.float() - f.float()).norm(dim=-1) for u, f in pairs)
    modality = _together(batch.modality for batch in streams.batches)
    before = {name: layer.get_parameter(f"{name}.weight").clone() for name in weights}
    quantize_layer(layer, plan.by_layer[index], plan, streams, signals)
    errors = rounding_errors(layer, before, plan, streams, entering)
    for name, importance in weights.items():
        if not importance.uniform:
            yield describe(index, name, importance, errors[name], drift, modality)


def rounding_errors(
    layer: nn.Module, before: Mapping[str, Tensor], plan: Plan, streams: Streams, entering: list[Tensor]
) -> dict[str, Tensor]:
    """||(W_q - W) u_t||, fp32 [tokens], of linears by name; `entering`: what the quantized path's layer has read."""
    layer.to(streams.device)
    errors: dict[str, list[Tensor]] = {name: [] for name in before}
    for item in streams:
        hidden = entering[item.position].to(streams.device)
        for name, weight in before.items():
            seen = linear_input(layer, plan.adapter.layer_forward, name, hidden, item.kwargs)
            moved = layer.get_parameter(f"{name}.weight") - weight
            errors[name].append(nn.functional.linear(seen, moved).float().norm(dim=-1).cpu())
    layer.to("cpu")
    return {name: _together(found) for name, found in errors.items()}


def describe(index: int, name: str, importance: TokenImportance, error: Tensor, drift: Tensor, modality: Tensor) -> Row:
    """The figures of one linear from tensors [tokens]."""
    weights = _together(importance.weights)
    kinds, means = modalities_of_heaviest(weights, modality), mean_by_modality(weights, modality)
    return Row(
        index,
        name,
        weights.numel(),
        importance.effective_tokens,
        spread(weights),
        spread(error),
        rank_correlation(weights, drift),
        share_of_heaviest(weights),
        *(kinds[kind] for kind in ("vision", "prompt", "answer")),
        *(means[kind] for kind in ("vision", "prompt", "answer")),
    )


def _together(parts: Iterable[Tensor]) -> Tensor:
    return torch.cat([part.reshape(-1) for part in parts])


if __name__ == "__main__":
    main()
