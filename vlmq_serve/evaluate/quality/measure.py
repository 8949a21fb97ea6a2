"""Measures one variant: calibrate in a process of its own, answer the questions, compare distributions."""

import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from functools import cached_property
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig
from transformers.utils import logging

from vlmq_serve.calibrate.chats import Chat, read_chats
from vlmq_serve.calibrate.families import find_adapter
from vlmq_serve.calibrate.loading import hash_weights, load_processor
from vlmq_serve.calibrate.pipeline import calibrate
from vlmq_serve.calibrate.planning import make_plan
from vlmq_serve.calibrate.progress import Progress
from vlmq_serve.calibrate.recipe import Recipe
from vlmq_serve.calibrate.report import write_json
from vlmq_serve.calibrate.samples import CalibrationSample, build_samples
from vlmq_serve.device import device_name
from vlmq_serve.evaluate.answers import answer_locally
from vlmq_serve.evaluate.divergence import Divergence, Predictions, measure_divergence, predict
from vlmq_serve.evaluate.loading import load_model
from vlmq_serve.evaluate.place import FP32_ON_CPU, Place, free_memory
from vlmq_serve.evaluate.quality.seeds import check_seeds, mean_overlap
from vlmq_serve.evaluate.quality.variants import Variant
from vlmq_serve.evaluate.run import Evaluation, evaluate_chats, read_evaluation
from vlmq_serve.evaluate.simulation import load_simulated
from vlmq_serve.format.errors import VLMQError

ShowProgress = Callable[[], AbstractContextManager[Progress]]


@dataclass(frozen=True)
class Cost:
    """Wall-clock seconds and highest memory (MiB) of a calibration, loading included; size of the model on disk."""

    seconds: float = 0.0
    peak_memory_mib: float = 0.0
    bytes: int = 0


@dataclass(frozen=True)
class Measured:
    """One variant with its answers, its distance from the source model and its cost."""

    variant: Variant
    evaluation: Evaluation
    divergence: Divergence
    cost: Cost


@dataclass(frozen=True)
class Bench:
    """What all variants share. `work` keeps a result per variant, named after all that it depends on."""

    model: Path
    calibration: Path
    questions: Path
    work: Path
    show: ShowProgress
    limit: int | None = None
    divergence_chats: int = 256
    max_new_tokens: int = 8
    keep_checkpoints: bool = False
    place: Place = FP32_ON_CPU

    @cached_property
    def _inputs(self) -> dict[str, Any]:
        files = {
            path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (self.calibration, self.questions)
        }
        numbers = (self.limit, self.divergence_chats, self.max_new_tokens)
        place = {} if self.place == FP32_ON_CPU else {"place": [self.place.device.type, self.place.dtype_name]}
        return {"weights": hash_weights(self.model), "files": files, "numbers": numbers, **place}

    @cached_property
    def _reference(self) -> Predictions:
        """Of the source model, which is gone before the first variant is loaded: one model at a time."""
        with self.show() as progress:
            model = load_model(self.model, self.place.dtype, self.place.device)
            predictions = predict(model, self._compared(progress, "read with bf16"))
        del model
        free_memory()
        return predictions

    def check(self, variants: Sequence[Variant]) -> None:
        """Every recipe must fit the model, seeds differ, and every file be readable before the first variant runs."""
        read_chats(self.questions)
        check_seeds(variants, len(read_chats(self.calibration)), self.calibration.name)
        for variant in variants:
            if variant.recipe is not None:
                make_plan(self.model, variant.recipe)

    def describe(self, variants: Sequence[Variant]) -> list[str]:
        """What the tables say of their data."""
        overlap = mean_overlap(variants, len(read_chats(self.calibration)))
        draws = "" if overlap is None else f" Two calibration seeds draw chats of which {overlap:.0%} are the same."
        over = "questions, one calibration seed" if overlap is None else "questions and calibration seeds"
        chats = read_chats(self.questions)[: self.limit]
        compared = min(len(chats), self.divergence_chats)
        return [
            f"Model `{self.model.name}`, calibrated on `{self.calibration.name}`, {len(chats)} questions of "
            f"`{self.questions.name}`, greedy answers in {self.place}, exact match. 95 % intervals over {over}. "
            f"KL to bf16: nats per token of {compared} questions with their expected answers. Seconds (median) and "
            f"peak memory (highest) of one calibration in a process of its own, {device_name()}, "
            f"{torch.get_num_threads()} threads.{draws}",
        ]

    def record(self, variant: Variant) -> Path:
        """Where the result of a variant is kept; settings at their defaults do not name it, so that results outlive
        new ones."""
        settings = None if variant.recipe is None else variant.recipe.model_dump(mode="json", exclude_defaults=True)
        text = json.dumps({**self._inputs, "recipe": settings}, sort_keys=True)
        return self.work / f"{variant.name}-{hashlib.sha256(text.encode()).hexdigest()[:10]}.json"

    def measure(self, variant: Variant) -> Measured:
        """The kept result, or a new one."""
        kept = self.record(variant)
        if not kept.exists():
            self.work.mkdir(parents=True, exist_ok=True)
            folder, cost = self._make(variant, kept.with_suffix(""))
            answers, divergence = self._question(variant, folder)
            content = answers.to_json() | {"divergence": asdict(divergence), "cost": asdict(cost)}
            free_memory()
            if folder != self.model and not self.keep_checkpoints:
                shutil.rmtree(folder)
            write_json(kept, content)
        raw = json.loads(kept.read_text(encoding="utf-8"))
        return Measured(variant, read_evaluation(kept), Divergence(**raw["divergence"]), Cost(**raw["cost"]))

    def _make(self, variant: Variant, folder: Path) -> tuple[Path, Cost]:
        if variant.recipe is None:
            return self.model, Cost(bytes=sum(f.stat().st_size for f in self.model.glob("*.safetensors")))
        shutil.rmtree(folder, ignore_errors=True)  # a checkpoint without its answers: an interrupted run
        # A process of its own, so that its highest memory is that of this calibration.
        arguments = (self.model, folder, self.calibration, variant.recipe, self.show)
        try:
            with ProcessPoolExecutor(1, get_context("spawn"), _end_with_parent) as pool:
                return folder, pool.submit(_calibrate, *arguments).result()
        except BrokenProcessPool:
            raise VLMQError(
                f"{variant.name}: the process of its calibration was killed, as the system does where memory is short; "
                "free some, or use fewer samples; finished variants are kept"
            ) from None

    def _question(self, variant: Variant, folder: Path) -> tuple[Evaluation, Divergence]:
        reference = None if variant.recipe is None else self._reference
        load = load_model if reference is None else load_simulated
        model = load(folder, self.place.dtype, self.place.device)
        processor = load_processor(folder)

        def answer(chats: Sequence[Chat]) -> Iterator[str]:
            replies = answer_locally(model, processor, chats, max_new_tokens=self.max_new_tokens)
            return (reply.text for reply in replies)

        with self.show() as progress:
            progress.stage("answer questions", len(read_chats(self.questions)[: self.limit]))
            evaluation = evaluate_chats(
                variant.name,
                self.questions,
                answer,
                place=self.place,
                limit=self.limit,
                on_answer=lambda *_: progress.advance(),
            )
            if reference is None:
                return evaluation, Divergence(0.0, 0.0)
            samples = self._compared(progress, "compare with bf16")
            return evaluation, measure_divergence(reference, model, samples)

    def _compared(self, progress: Progress, stage: str) -> Iterator[CalibrationSample]:
        """The questions with their answers, as every model reads them: inputs come from the source's processor."""
        chats = read_chats(self.questions)[: self.limit][: self.divergence_chats]
        config = AutoConfig.from_pretrained(self.model)
        progress.stage(stage, len(chats))
        for sample in build_samples(load_processor(self.model), chats, find_adapter(self.model).image_token_id(config)):
            progress.advance()
            yield sample


def _end_with_parent() -> None:
    """Runs in the child process: left alone by a killed command, it would calibrate on, beside the next run."""
    parent = parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _calibrate(model: Path, out: Path, data: Path, recipe: Recipe, show: ShowProgress) -> Cost:
    """Runs in the child process."""
    logging.disable_progress_bar()  # transformers' own; it would break up ours
    with show() as progress:
        report = calibrate(model, out, data if recipe.needs_data else None, recipe, overwrite=True, progress=progress)
    return Cost(report.details["total_seconds"], report.peak_memory_mib, report.bytes_after)
