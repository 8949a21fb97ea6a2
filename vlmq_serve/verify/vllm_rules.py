"""Runs `ranks` in a process of its own and turns what it found into findings."""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from vlmq_serve.verify.finding import Finding, Level

CHECK = "vllm"
TIMEOUT_S = 600
_NO_DEVICE = "Failed to infer device type"
_SHOWN = 5


def check_with_vllm(folder: Path, ranks: int) -> list[Finding]:
    """Open the checkpoint by vLLM's rules on `ranks` ranks; skipped, with the reason, where vLLM cannot run."""
    if importlib.util.find_spec("vllm") is None:
        return [_skipped("vllm is not installed: its names, fused layers and shapes were not checked")]
    modes = _run(folder, ranks)
    results = modes["weights"]
    errors = _errors(results, ranks)
    if errors and _NO_DEVICE in errors[0]:
        return [_skipped("this vLLM finds no device that it was built for; use a CPU build of vLLM to check here")]
    if "data" in modes:
        whole = modes["data"]
        if not _errors(whole, ranks):
            note = f"the vision tower cannot be split ({errors[0]}); serve with --mm-encoder-tp-mode data"
            return [Finding(Level.NOTE, CHECK, note), _fine(whole, ranks)]
        errors = _errors(whole, ranks)  # what remains when the vision tower is left whole
    if errors:
        return [Finding(Level.ERROR, CHECK, error) for error in errors[:_SHOWN]]
    return [_fine(results, ranks)]


def _run(folder: Path, ranks: int) -> dict[str, list[dict[str, Any]]]:
    """Results of the ranks by mode of the vision tower; a process that fails is an error of one rank."""
    with tempfile.TemporaryDirectory() as scratch:
        target = Path(scratch) / "result.json"
        command = [sys.executable, "-m", f"{__package__}.ranks", str(folder), str(ranks), str(target)]
        # The result depends on the folder only, so nothing is looked up outside.
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
        try:
            done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=TIMEOUT_S)
        except subprocess.TimeoutExpired:
            return {"weights": [{"error": f"no result after {TIMEOUT_S} s"}]}
        if not target.exists():
            last = (done.stderr.strip().splitlines() or ["no output"])[-1]
            return {"weights": [{"error": f"the check ended with status {done.returncode}: {last}"}]}
        results: dict[str, list[dict[str, Any]]] = json.loads(target.read_text(encoding="utf-8"))
        return results


def _errors(results: list[dict[str, Any]], ranks: int) -> list[str]:
    """Distinct errors, in order; ranks mostly find the same ones."""
    errors = [result["error"] for result in results if result["error"]]
    if not errors and len(results) < ranks:
        errors = [f"{ranks - len(results)} of {ranks} ranks ended without a result"]
    missing = [name for result in results for name in result.get("missing", [])]
    errors += [f"{name}: vLLM found no tensor for it; the checkpoint is incomplete" for name in missing]
    return list(dict.fromkeys(errors))


def _fine(results: list[dict[str, Any]], ranks: int) -> Finding:
    first = results[0]
    message = (
        f"opened by vLLM on {ranks} rank{'s' if ranks > 1 else ''}: {first['parameters']} parameters, all loaded, "
        f"{first['quantized']} of them packed weights"
    )
    return Finding(Level.OK, CHECK, message)


def _skipped(reason: str) -> Finding:
    return Finding(Level.SKIPPED, CHECK, reason)
