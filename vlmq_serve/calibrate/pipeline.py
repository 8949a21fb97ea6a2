"""The entry point: a model folder, a data file and a recipe in, a quantized checkpoint with its report out."""

import os
import shutil
from pathlib import Path
from time import perf_counter

import torch
from torch import nn

from vlmq_serve.calibrate.cross_entropy import AnswerGradients
from vlmq_serve.calibrate.data import CalibrationData, SampleFeed, load_data
from vlmq_serve.calibrate.finish import finish_run
from vlmq_serve.calibrate.head import quantize_head
from vlmq_serve.calibrate.layer import quantize_layer, restore_layer
from vlmq_serve.calibrate.loading import choose_device, choose_dtype, hash_weights, load_model, load_processor
from vlmq_serve.calibrate.percentiles import find_blocks, search_percentiles
from vlmq_serve.calibrate.plan import Plan
from vlmq_serve.calibrate.planning import make_plan
from vlmq_serve.calibrate.progress import Progress, SilentProgress
from vlmq_serve.calibrate.recipe import Recipe
from vlmq_serve.calibrate.report import REPORT_FOLDER, RUN_FILE, LayerResult, RunReport
from vlmq_serve.calibrate.rounded_parts import Rounded, round_parts
from vlmq_serve.calibrate.rounding import round_layers
from vlmq_serve.calibrate.run import Run
from vlmq_serve.calibrate.signals import LayerSignals, layer_signals
from vlmq_serve.calibrate.stream_memory import available_bytes, judge_memory
from vlmq_serve.calibrate.streams import Streams, capture_streams
from vlmq_serve.calibrate.vision_clipping import simulate_vision
from vlmq_serve.calibrate.work import WorkFolder
from vlmq_serve.format.errors import VLMQError


def calibrate(
    model: str | Path,
    out: str | Path,
    data: str | Path | None,
    recipe: Recipe,
    *,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> RunReport:
    """Quantize `model` (folder or hub id) by `recipe` and write the checkpoint to `out`, the report to `out/vlmq`.

    `data` is a JSON-lines file of chats with images; only method rtn does without (and then reports weight errors
    only). Finished layers are kept in `out.partial`; `resume` goes on from there, if model, data and recipe are the
    same; Ctrl-C raises `Interrupted`, which says whether there is something to go on from. `out` must not exist unless
    `overwrite`. Bad input is a `VLMQError` and leaves nothing behind.
    """
    started = perf_counter()
    out, data = Path(out), None if data is None else Path(data)
    shown = progress or SilentProgress()
    plan = make_plan(model, recipe)
    _check_output(out, plan, overwrite)
    if data is None and recipe.needs_data:
        raise VLMQError(f"data: method {recipe.method!r} needs a data file of chats with images; only rtn does without")
    chats = load_data(data, recipe) if data is not None else None
    shown.stage("hash model", 1)
    before = perf_counter()
    hashes = {"source_weights": hash_weights(plan.source)} | ({"data": chats.digest} if chats else {})
    seconds = {"hash": perf_counter() - before}
    shown.advance()
    work = WorkFolder(out, plan, {"recipe": recipe.model_dump(mode="json"), "hashes": hashes})
    work.check(resume, overwrite)
    run = Run(plan, out, work, shown, resume and work.path.exists(), overwrite, hashes, seconds)
    try:
        layers = round_layers(run.plan, run.work, run.resume, shown) if chats is None else _calibrate(run, chats)
        return finish_run(run, layers, started)
    except KeyboardInterrupt:
        raise work.interrupted() from None


def _check_output(out: Path, plan: Plan, overwrite: bool) -> None:
    """Before hours of work: `out` must be free, outside of the source, and on a disk with room."""
    if out.exists() and not overwrite:
        raise VLMQError(f"{out}: exists already; choose another output folder, or overwrite it (--overwrite)")
    if out.exists() and not (out / REPORT_FOLDER / RUN_FILE).is_file():
        raise VLMQError(f"{out}: was not written by vlmq calibrate and is not overwritten; choose another folder")
    source, target = plan.source.resolve(), out.resolve()
    if target == source or source in target.parents:
        raise VLMQError(f"{out}: lies in the source model's folder; choose a folder outside of {plan.source}")
    existing = next(folder for folder in target.parents if folder.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise VLMQError(f"{out}: cannot be created, since {existing} is no folder that you may write to")
    free = shutil.disk_usage(existing).free
    need = plan.bytes_needed
    if free < need:
        raise VLMQError(f"{existing}: {free / 2**30:.1f} GiB free, {need / 2**30:.1f} GiB needed; free some space")


def _calibrate(run: Run, data: CalibrationData) -> list[LayerResult]:
    recipe, adapter = run.plan.recipe, run.plan.adapter
    device = choose_device(recipe.device)
    dtype = choose_dtype(recipe.dtype, device)
    run.details |= {"device": str(device), "dtype": str(dtype).removeprefix("torch.")}
    run.progress.stage("load model", 1)
    started = perf_counter()
    processor = load_processor(run.plan.source)  # first: it takes seconds to fail, the model minutes to load
    model = load_model(run.plan.source, dtype)
    adapter.check_config(model.config)
    rounded = round_parts(model, run.plan, run.work if run.resume else None)
    feed = SampleFeed(
        processor,
        data,
        adapter.image_token_id(model.config),
        recipe.max_tokens,
        recipe.max_pixels,
        recipe.save_saliency if recipe.method == "vlmq" else 0,
    )
    run.progress.advance()
    run.seconds["load"] = perf_counter() - started
    started = perf_counter()
    _check_memory(run, feed, dtype)
    run.progress.stage("read images and questions", len(data.chats))
    layers = adapter.decoder_layers(model)
    gradients = None
    if recipe.needs_answer_gradients:
        gradients = AnswerGradients(model, layers, adapter.linears, device)
    watch = gradients.add if gradients else None
    tower = simulate_vision(model, adapter, feed, recipe, device)
    if tower is not None:
        run.details["vision"] = tower.to_dict()
    streams = capture_streams(model, adapter, feed, device, recipe.batch_tokens, run.progress, watch, tower)
    model.to("cpu")
    run.seconds["capture"] = perf_counter() - started
    _describe_data(run, data, feed, streams)
    run.work.prepare(run.resume)
    parts = _hand_over(rounded, run.work)
    results = _run_layers(run, layers, streams, gradients)
    if run.plan.head is not None:
        norm = adapter.decoder(model).get_submodule("norm")
        parts.append(quantize_head(run.plan.head, norm, run.plan, streams, run.work))
    return results + sorted(parts, key=lambda part: part.index)


def _hand_over(rounded: list[Rounded], work: WorkFolder) -> list[LayerResult]:
    """From here on only the work folder holds the packed weights of what is rounded before the decoder."""
    results = []
    while rounded:
        result, packed = rounded.pop()
        work.store(result, packed)
        results.append(result)
    return results


def _check_memory(run: Run, feed: SampleFeed, dtype: torch.dtype) -> None:
    """Sizes are known once the processor has seen all images, which costs little beside the tower's work on them."""
    run.progress.stage("count tokens", len(feed.data.chats))
    sizes = []
    for size in feed.sizes():
        sizes.append(size)
        run.progress.advance()
    if not sizes:
        raise VLMQError(f"max_tokens: got {feed.max_tokens}, all {len(feed.data.chats)} samples are longer; raise it")
    width, recipe = run.plan.linears[0].shape[1], run.plan.recipe
    learns = recipe.simulated_vision
    remark = judge_memory(sizes, recipe.batch_tokens, width, dtype.itemsize, available_bytes(), learns)
    if remark is not None:
        run.note(remark)


def _describe_data(run: Run, data: CalibrationData, feed: SampleFeed, streams: Streams) -> None:
    wanted = run.plan.recipe.samples
    if len(data.chats) < wanted:
        run.note(f"the data file holds {data.available} chats, {wanted} samples were asked for: all, whatever the seed")
    if feed.dropped:
        run.note(f"{feed.dropped} of {len(data.chats)} samples have more than {feed.max_tokens} tokens: dropped")
    run.details["data"] = {
        "file": str(data.file),
        "chats": data.available,
        "samples": len(data.chats) - feed.dropped,
        "dropped": feed.dropped,
        "tokens": streams.count_tokens(),
    }
    run.details["saliency"] = {
        "samples": feed.kept_lines(),
        "taps": list(run.plan.weighted),
        "grids": feed.grids,
        "modality": feed.modality,
    }


def _run_layers(
    run: Run, layers: nn.ModuleList, streams: Streams, gradients: AnswerGradients | None
) -> list[LayerResult]:
    results = run.work.finished()
    if results:
        run.note(f"resumed after {len(results)} of {run.plan.layers} layers")
    signals = layer_signals(run.plan, streams, gradients.layers if gradients else None)
    run.progress.stage("quantize layers", run.plan.layers)
    started = perf_counter()
    blocks = find_blocks(list(layers), run.plan, streams) if run.plan.recipe.method == "qvlm" else {}
    for index, linears in enumerate(run.plan.by_layer):
        if index in blocks and blocks[index] > len(results):  # some layer of the block is still to be done
            found = search_percentiles(list(layers[index : blocks[index]]), index, run.plan, streams)
            signals[index : blocks[index]] = [LayerSignals(clipping=clipping) for clipping in found]
            run.details.setdefault("percentiles", {})[str(index)] = [clipping.weights for clipping in found]
            if run.plan.recipe.activations is not None:
                kept = [clipping.activations for clipping in found]
                run.details.setdefault("activation_percentiles", {})[str(index)] = kept
        if index < len(results):
            restore_layer(layers[index], linears, run.plan, run.work, streams)
        else:
            done = quantize_layer(layers[index], linears, run.plan, streams, signals[index])
            run.work.store(done.result, done.packed, done.saliency, done.changed, done.inputs)
            results.append(done.result)
        layers[index] = nn.Identity()  # frees the layer: nothing reads it any more
        error = results[index].errors.get("all")
        run.progress.advance("" if error is None else f"layer {index}: relative error {error:.2e}")
    run.seconds["layers"] = perf_counter() - started
    return results
