"""Serve every variant, drive it with `vllm bench serve`, keep one JSON file per measurement."""

import json
import re
import subprocess
import zlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from vlmq_serve.bench.memory import MemoryWatch, sample
from vlmq_serve.bench.variants import Load, Variant
from vlmq_serve.device import device_name
from vlmq_serve.evaluate.server import Server, find_vllm, serve
from vlmq_serve.format.errors import VLMQError
from vlmq_serve.format.headers import shard_files

LOAD_TIMEOUT_S = 3600
FACTS_FILE = "server.json"
_KV_TOKENS = re.compile(r"KV cache size: ([\d,]+) tokens")
_DEVICE_WEIGHTS = re.compile(r"Model loading took ([\d.]+) ?GiB")
Notify = Callable[[str], None]


@dataclass(frozen=True)
class ServerFacts:
    """What a variant costs before and during requests. MiB; `ready` is after the start, `peak` during the loads."""

    variant: str
    dtype: str
    arguments: tuple[str, ...]
    device: str
    disk_mib: float
    startup_s: float
    kv_tokens: int
    ready_mib: float
    worker_mib: float
    peak_mib: float
    device_weights_mib: float
    device_mib: float


def missing_loads(variant: Variant, loads: Sequence[Load], out: Path) -> list[Load] | None:
    """The loads that `out` does not hold yet; None when the variant is finished.

    Raises `VLMQError` when what it holds was measured with another model, other arguments or on another device.
    """
    folder = out / variant.name
    if not (folder / FACTS_FILE).exists():
        return list(loads)
    known = json.loads((folder / FACTS_FILE).read_text(encoding="utf-8"))
    now: dict[str, Any] = {"arguments": [*variant.arguments], "dtype": variant.dtype}
    now |= {"device": device_name(), "disk_mib": _disk_mib(variant.folder)}
    for key, value in now.items():
        if known[key] != value:
            raise VLMQError(
                f"{folder}: was measured with {key} {known[key]!r}, got {value!r}; choose another output folder or "
                "remove this one"
            )
    return [load for load in loads if not (folder / f"{load.name}.json").exists()] or None


def run_variant(variant: Variant, loads: Sequence[Load], out: Path, notify: Notify, timeout_s: float = 1800) -> None:
    """Start the server of `variant`, measure all `loads`, stop it."""
    notify(f"{variant.name}: starting")
    with start(variant, out, timeout_s) as server:
        measure(variant, server, loads, out, notify)


def start(variant: Variant, out: Path, timeout_s: float) -> AbstractContextManager[Server]:
    """A context manager of the variant's server, with its log in `out/NAME`."""
    folder = out / variant.name
    folder.mkdir(parents=True, exist_ok=True)
    arguments = (*variant.arguments, "--dtype", variant.dtype)
    return serve(variant.folder, folder / "serve.log", arguments=arguments, timeout_s=timeout_s)


def measure(variant: Variant, server: Server, loads: Sequence[Load], out: Path, notify: Notify) -> None:
    """Run `loads` against `server`; its facts are kept at once, their peaks after every load."""
    folder = out / variant.name
    ready = sample(server.pid)
    facts = ServerFacts(
        variant.name, variant.dtype, variant.arguments, device_name(), _disk_mib(variant.folder),
        round(server.startup_s, 1), _kv_tokens(server.log), ready.processes_mib, ready.largest_mib,
        *_earlier_peaks(folder, ready.processes_mib, _device_weights(server.log), ready.device_mib),
    )  # fmt: skip
    with MemoryWatch(server.pid) as watch:
        _answer_once(server)
        _keep(folder, facts, watch)
        for load in loads:
            notify(f"{variant.name}: {load.name}")
            _run_load(variant, server, load, folder)
            _keep(folder, facts, watch)


def _earlier_peaks(folder: Path, peak: float, weights: float, device: float) -> tuple[float, float, float]:
    """Peaks of this start and of the starts before it."""
    path = folder / FACTS_FILE
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return max(peak, known.get("peak_mib", 0.0)), weights, max(device, known.get("device_mib", 0.0))


def _keep(folder: Path, facts: ServerFacts, watch: MemoryWatch) -> None:
    peak = max(facts.peak_mib, watch.peak_mib)
    now = replace(facts, peak_mib=peak, device_mib=max(facts.device_mib, watch.peak_device_mib))
    (folder / FACTS_FILE).write_text(json.dumps(asdict(now), indent=1) + "\n", encoding="utf-8")


def _answer_once(server: Server) -> None:
    """The first request pays for what is set up lazily; it belongs to the start and not to a measurement."""
    from vlmq_serve.evaluate.endpoint import connect

    client, model = connect(server.base_url)
    client.chat.completions.create(model=model, messages=[{"role": "user", "content": "hi"}], max_tokens=2)


def bench_command(variant: Variant, server: Server, load: Load, folder: Path) -> list[str]:
    """The `vllm bench serve` call of one load.

    Fixed lengths and a seed that depends on the load alone: all variants get the same requests, and no load gets
    those of another, which the server would find in its prefix cache.
    """
    command = [
        find_vllm(), "bench", "serve", "--backend", "openai-chat", "--endpoint", "/v1/chat/completions",
        "--base-url", server.base_url.removesuffix("/v1"), "--model", server.model, "--tokenizer", str(variant.folder),
        "--num-prompts", str(load.count), "--num-warmups", "1", "--max-concurrency", str(load.concurrency),
        "--request-rate", str(load.rate), "--seed", str(zlib.crc32(load.name.encode()) % 10**6), "--temperature", "0",
        "--ignore-eos", "--disable-tqdm", "--save-result", "--result-dir", str(folder),
        "--result-filename", f"{load.name}.part",
        "--random-input-len", str(load.prompt_tokens), "--random-output-len", str(load.output_tokens),
    ]  # fmt: skip
    if load.image is None:
        return [*command, "--dataset-name", "random"]
    width, height = load.image
    return [
        *command, "--dataset-name", "random-mm", "--random-mm-base-items-per-request", "1",
        "--random-mm-limit-mm-per-prompt", '{"image": 1, "video": 0}',
        "--random-mm-bucket-config", f"{{({height}, {width}, 1): 1.0}}",
    ]  # fmt: skip


def _run_load(variant: Variant, server: Server, load: Load, folder: Path) -> None:
    command = bench_command(variant, server, load, folder)
    done = subprocess.run(command, capture_output=True, text=True, timeout=LOAD_TIMEOUT_S)
    part = folder / f"{load.name}.part"
    result: dict[str, Any] = json.loads(part.read_text(encoding="utf-8")) if part.exists() else {}
    if done.returncode or result.get("completed") != load.count:
        lines = "\n".join((done.stdout + done.stderr).splitlines()[-15:])
        raise VLMQError(
            f"{variant.name} {load.name}: {result.get('completed', 0)} of {load.count} requests answered; "
            f"`vllm bench serve` ends with:\n{lines}"
        )
    # The times of every single token would be most of the file.
    slim = {key: value for key, value in result.items() if not isinstance(value, list)}
    (folder / f"{load.name}.json").write_text(json.dumps(slim, indent=1) + "\n", encoding="utf-8")
    part.unlink()


def _disk_mib(folder: Path) -> float:
    return round(sum(path.stat().st_size for path in shard_files(folder)) / 2**20, 1)


def _kv_tokens(log: Path) -> int:
    found = _KV_TOKENS.findall(log.read_text(encoding="utf-8", errors="replace"))
    return int(found[-1].replace(",", "")) if found else 0


def _device_weights(log: Path) -> float:
    """What vLLM says that the weights take on a GPU, MiB; it does not say it on a CPU."""
    found = _DEVICE_WEIGHTS.findall(log.read_text(encoding="utf-8", errors="replace"))
    return round(1024 * float(found[-1]), 1) if found else 0.0
