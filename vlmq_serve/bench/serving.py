"""Serve every variant, drive it with `vllm bench serve`, keep one JSON file per measurement."""

import json
import re
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vlmq_serve.bench.memory import MemoryWatch, device_memory, process_memory
from vlmq_serve.bench.variants import Load, Variant
from vlmq_serve.evaluate.server import Server, find_vllm, serve
from vlmq_serve.format.errors import VLMQError
from vlmq_serve.format.headers import shard_files

LOAD_TIMEOUT_S = 3600
_KV_TOKENS = re.compile(r"KV cache size: ([\d,]+) tokens")
_DEVICE_WEIGHTS = re.compile(r"Model loading took ([\d.]+) ?GiB")
Notify = Callable[[str], None]


@dataclass(frozen=True)
class ServerFacts:
    """What a variant costs before and during requests. MiB; `ready` is after the start, `peak` during the loads."""

    variant: str
    dtype: str
    disk_mib: float
    startup_s: float
    kv_tokens: int
    ready_mib: float
    worker_mib: float
    peak_mib: float
    device_weights_mib: float
    device_mib: float


def run_variant(
    variant: Variant,
    loads: Sequence[Load],
    out: Path,
    arguments: Sequence[str],
    notify: Notify,
    timeout_s: float = 1800,
) -> None:
    """Measure what is not in `out/NAME` yet; the server is started only if something is missing."""
    folder = out / variant.name
    folder.mkdir(parents=True, exist_ok=True)
    missing = [load for load in loads if not (folder / f"{load.name}.json").exists()]
    if not missing and (folder / "server.json").exists():
        notify(f"{variant.name}: measured before")
        return
    options = (*arguments, "--dtype", variant.dtype)
    notify(f"{variant.name}: starting")
    with serve(variant.folder, folder / "serve.log", arguments=options, timeout_s=timeout_s) as server:
        ready, worker = process_memory(server.pid)
        device = device_memory()
        with MemoryWatch(server.pid) as watch:
            _answer_once(server)
            for load in missing:
                notify(f"{variant.name}: {load.name}")
                _run_load(variant, server, load, folder)
    facts = ServerFacts(
        variant.name, variant.dtype, _disk_mib(variant.folder), round(server.startup_s, 1), _kv_tokens(server.log),
        round(ready, 1), round(worker, 1), round(watch.peak_mib, 1), _device_weights(server.log),
        max(device, watch.peak_device_mib),
    )  # fmt: skip
    (folder / "server.json").write_text(json.dumps(asdict(facts), indent=1) + "\n", encoding="utf-8")


def _answer_once(server: Server) -> None:
    """The first request pays for what is set up lazily; it belongs to the start and not to a measurement."""
    from vlmq_serve.evaluate.endpoint import connect

    client, model = connect(server.base_url)
    client.chat.completions.create(model=model, messages=[{"role": "user", "content": "hi"}], max_tokens=2)


def bench_command(variant: Variant, server: Server, load: Load, folder: Path) -> list[str]:
    """The `vllm bench serve` call of one load; seed 0 and fixed lengths, so that all variants get the same requests."""
    command = [
        find_vllm(), "bench", "serve", "--backend", "openai-chat", "--endpoint", "/v1/chat/completions",
        "--base-url", server.base_url.removesuffix("/v1"), "--model", server.model, "--tokenizer", str(variant.folder),
        "--num-prompts", str(load.requests), "--num-warmups", "1", "--max-concurrency", str(load.concurrency),
        "--request-rate", str(load.rate), "--seed", "0", "--ignore-eos", "--disable-tqdm", "--save-result",
        "--result-dir", str(folder), "--result-filename", f"{load.name}.part",
        "--random-input-len", str(load.prompt_tokens), "--random-output-len", str(load.output_tokens),
    ]  # fmt: skip
    if not load.image:
        return [*command, "--dataset-name", "random"]
    bucket = f"{{({load.image}, {load.image}, 1): 1.0}}"
    return [
        *command, "--dataset-name", "random-mm", "--random-mm-base-items-per-request", "1",
        "--random-mm-limit-mm-per-prompt", '{"image": 1, "video": 0}', "--random-mm-bucket-config", bucket,
    ]  # fmt: skip


def _run_load(variant: Variant, server: Server, load: Load, folder: Path) -> None:
    command = bench_command(variant, server, load, folder)
    done = subprocess.run(command, capture_output=True, text=True, timeout=LOAD_TIMEOUT_S)
    part = folder / f"{load.name}.part"
    result: dict[str, Any] = json.loads(part.read_text(encoding="utf-8")) if part.exists() else {}
    if done.returncode or result.get("completed") != load.requests:
        lines = "\n".join((done.stdout + done.stderr).splitlines()[-15:])
        raise VLMQError(
            f"{variant.name} {load.name}: {result.get('completed', 0)} of {load.requests} requests answered; "
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
