"""All checks of a checkpoint in order, cheap ones first."""

from collections.abc import Callable, Iterator
from pathlib import Path

from vlmq_serve.format.config import QuantizationSpec
from vlmq_serve.format.consistency import config_problems
from vlmq_serve.format.errors import VLMQError
from vlmq_serve.format.headers import TensorInfo, find_problems, quantized_modules, read_json, read_tensor_index
from vlmq_serve.verify.content import content_problems
from vlmq_serve.verify.files import check_files
from vlmq_serve.verify.finding import Finding, Level, judge
from vlmq_serve.verify.forward import forward_problems, pick_linears
from vlmq_serve.verify.split import COMMON_RANKS, split_problems
from vlmq_serve.verify.vllm_rules import check_with_vllm


def verify(folder: str | Path, ranks: int = 1, on_tensor: Callable[[str], None] = lambda _: None) -> Iterator[Finding]:
    """Findings of the checkpoint `folder`, to be served on `ranks` ranks; never raises for a faulty checkpoint."""
    folder = Path(folder)
    try:
        raw = read_json(folder / "config.json").get("quantization_config")
        if raw is None:
            raise VLMQError(f"{folder}: is not quantized (no quantization_config in config.json)")
        spec = QuantizationSpec.from_dict(raw)
        yield from check_files(folder)
        tensors = read_tensor_index(folder)
    except VLMQError as error:
        yield Finding(Level.ERROR, "files", str(error))
        return
    headers = _check_headers(folder, tensors, spec)
    yield from headers
    if any(finding.level == Level.ERROR for finding in headers):
        skipped = "contents, splits, forward pass and vLLM's rules: correct the errors above first"
        yield Finding(Level.SKIPPED, "contents", skipped)
        return
    yield from judge(
        "contents", content_problems(tensors, spec, on_tensor), f"values of {len(tensors)} tensors are plausible"
    )
    if spec.simulated_activations is not None:
        bits = spec.simulated_activations
        yield Finding(Level.NOTE, "config", f"calibrated for simulated {bits}-bit activations; served with 16-bit ones")
    yield from _check_splits(folder, tensors, spec, ranks)
    chosen = pick_linears(tensors, spec)
    fine = f"{len(chosen)} linears, {chosen[0]} to {chosen[-1]}, give the products of their dequantized weights"
    yield from judge("forward", forward_problems(folder, chosen, spec), fine)
    yield from check_with_vllm(folder, ranks)


def _check_headers(folder: Path, tensors: dict[str, TensorInfo], spec: QuantizationSpec) -> list[Finding]:
    problems = find_problems(tensors, spec)
    modules = quantized_modules(tensors)
    findings = judge("tensors", problems, f"{len(tensors)} tensors, {len(modules)} packed linears, none missing")
    config = config_problems(tensors, spec, read_json(folder / "config.json"))
    return findings + judge("config", config, f"{spec.scheme}, {len(spec.overrides)} overrides, fits the tensors")


def _check_splits(
    folder: Path, tensors: dict[str, TensorInfo], spec: QuantizationSpec, ranks: int
) -> Iterator[Finding]:
    config = read_json(folder / "config.json")
    fits = {n: split_problems(tensors, spec, config, n) for n in sorted({*COMMON_RANKS, ranks})}
    yield from judge("split", fits[ranks], f"can be split over {ranks} rank{'s' if ranks > 1 else ''}")
    for count, problems in fits.items():
        if problems and count != ranks:
            yield Finding(Level.NOTE, "split", f"not on {count} ranks: {problems[0]}")
