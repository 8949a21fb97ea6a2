"""The end of a run: report, checkpoint, clean-up."""

import platform
import shutil
from importlib import metadata
from pathlib import Path
from time import perf_counter
from typing import Any

import vlmq_serve
from vlmq_serve.calibrate.planning import make_spec
from vlmq_serve.calibrate.report import (
    INPUTS_FILE,
    REPORT_FOLDER,
    LayerResult,
    RunReport,
    peak_memory_mib,
    write_report,
)
from vlmq_serve.calibrate.run import Run
from vlmq_serve.calibrate.saliency import save_saliency
from vlmq_serve.format.shards import write_checkpoint
from vlmq_serve.format.tensor_file import save_tensors

SALIENCY_FILE = "saliency.safetensors"


def finish_run(run: Run, layers: list[LayerResult], started: float) -> RunReport:
    """Write the report and the checkpoint in one step, remove the work folder, and return the report."""
    run.progress.stage("write checkpoint", 1)
    producer = f"vlmq-serve {vlmq_serve.__version__}"
    spec = make_spec(run.plan.recipe, run.hashes, producer)
    report_folder = run.work.path / REPORT_FOLDER
    report_folder.mkdir(exist_ok=True)
    saliency = run.details.pop("saliency", None)
    if saliency and saliency["samples"]:
        save_saliency(report_folder / SALIENCY_FILE, run.work.saliency(), saliency["grids"], saliency["modality"])
        run.details["saliency"] = {"samples": saliency["samples"], "taps": saliency["taps"]}
    inputs = run.work.all_inputs()
    if inputs:
        save_tensors(inputs, report_folder / INPUTS_FILE)
        run.note("activations were simulated; a served checkpoint has its weights and activations of 16 bits")
    report = RunReport(
        out=run.out,
        method=run.plan.recipe.method,
        layers=tuple(layers),
        bytes_before=run.plan.bytes_before,
        bytes_after=run.plan.bytes_after,
        seconds={stage: round(seconds, 2) for stage, seconds in run.seconds.items()},
        peak_memory_mib=peak_memory_mib(),
        notes=tuple(run.notes),
        details=run.details | _provenance(run, producer) | {"total_seconds": round(perf_counter() - started, 2)},
    )
    write_report(report_folder, report)
    with _Replacing(run.out, run.overwrite):
        tied = {linear.name: linear.tied_to for linear in run.plan.quantized if linear.tied_to}
        changed = run.work.all_changed()
        write_checkpoint(run.plan.source, run.out, run.work.packed(), spec, report_folder, changed, tied)
    run.work.remove()
    run.progress.advance()
    return report


class _Replacing:
    """Moves an old `out` aside while the new one is written, and back if that fails."""

    def __init__(self, out: Path, overwrite: bool) -> None:
        self._out = out
        self._aside = out.with_name(out.name + ".replaced") if overwrite and out.exists() else None

    def __enter__(self) -> None:
        if self._aside is not None:
            shutil.rmtree(self._aside, ignore_errors=True)
            self._out.rename(self._aside)

    def __exit__(self, failure: type[BaseException] | None, *_: object) -> None:
        if self._aside is None:
            return
        if failure is not None and not self._out.exists():
            self._aside.rename(self._out)
        else:
            shutil.rmtree(self._aside, ignore_errors=True)


def _provenance(run: Run, producer: str) -> dict[str, Any]:
    return {
        "producer": producer,
        "model": str(run.plan.source),
        "model_type": run.plan.adapter.model_type,
        "layers": run.plan.layers,
        "recipe": run.plan.recipe.model_dump(mode="json"),
        "hashes": run.hashes,
        "versions": {
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in ("torch", "transformers", "safetensors")},
        },
    }
