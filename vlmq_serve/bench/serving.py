"""Serve every variant, drive it with `vllm bench serve`, keep one JSON file per measurement."""

import json
import re
import zlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vlmq_serve.bench.client import Client
from vlmq_serve.bench.memory import MemoryWatch, sample
from vlmq_serve.bench.variants import Load, Variant
from vlmq_serve.device import device_name
from vlmq_serve.evaluate.server import Server, serve
from vlmq_serve.format.errors import VLMQError
from vlmq_serve.format.headers import shard_files

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
    known = _facts(folder)
    if not known:
        return list(loads)
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
    with start(variant, out, timeout_s) as server, Client(out / variant.name / "client.log") as client:
        note_start(variant, server, out)
        for load in loads:
            notify(f"{variant.name}: {load.name}")
            run_load(variant, server, load, out, client)


def start(variant: Variant, out: Path, timeout_s: float) -> AbstractContextManager[Server]:
    """A context manager of the variant's server, with its log in `out/NAME`."""
    folder = out / variant.name
    folder.mkdir(parents=True, exist_ok=True)
    arguments = (*variant.arguments, "--dtype", variant.dtype)
    return serve(variant.folder, folder / "serve.log", arguments=arguments, timeout_s=timeout_s)


def note_start(variant: Variant, server: Server, out: Path) -> None:
    """Keep what is known before the first load; peaks are the highest of this start and of the starts before it."""
    folder = out / variant.name
    ready = sample(server.pid)
    known = _facts(folder)
    with MemoryWatch(server.pid) as watch:
        _answer_once(server)
    facts = ServerFacts(
        variant.name, variant.dtype, variant.arguments, device_name(), _disk_mib(variant.folder),
        round(server.startup_s, 1), _kv_tokens(server.log), ready.processes_mib, ready.largest_mib,
        max(watch.peak_mib, known.get("peak_mib", 0.0)), _device_weights(server.log),
        max(watch.peak_device_mib, known.get("device_mib", 0.0)),
    )  # fmt: skip
    _write(folder / FACTS_FILE, asdict(facts))


def run_load(variant: Variant, server: Server, load: Load, out: Path, client: Client) -> None:
    """Send the requests of `load` to `server`; keep what came out, and the new peaks of memory."""
    folder = out / variant.name
    part = folder / f"{load.name}.part"
    part.unlink(missing_ok=True)
    before = sample(server.pid).processor_s
    with MemoryWatch(server.pid) as watch:
        client.run(bench_arguments(variant, server, load, folder))
    processor_s = sample(server.pid).processor_s - before
    result: dict[str, Any] = json.loads(part.read_text(encoding="utf-8")) if part.exists() else {}
    if result.get("completed") != load.count:
        raise VLMQError(
            f"{variant.name} {load.name}: {result.get('completed', 0)} of {load.count} requests answered; "
            f"`vllm bench serve` ends with:\n{client.tail()}"
        )
    # The times of every single token would be most of the file, and the folder of the tokenizer says nothing elsewhere.
    slim = {key: value for key, value in result.items() if not isinstance(value, list) and key != "tokenizer_id"}
    _write(folder / f"{load.name}.json", slim | {"server_processor_s": round(processor_s, 3)})
    part.unlink()
    facts = _facts(folder)
    peaks = {"peak_mib": watch.peak_mib, "device_mib": watch.peak_device_mib}
    _write(folder / FACTS_FILE, facts | {key: max(facts[key], value) for key, value in peaks.items()})


def _facts(folder: Path) -> dict[str, Any]:
    path = folder / FACTS_FILE
    known: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return known


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _answer_once(server: Server) -> None:
    """The first request pays for what is set up lazily; it belongs to the start and not to a measurement."""
    from vlmq_serve.evaluate.endpoint import ask_messages, connect

    client, model = connect(server.base_url)
    ask_messages(client, model, [{"role": "user", "content": "hi"}], 2, "first request")


def bench_arguments(variant: Variant, server: Server, load: Load, folder: Path) -> list[str]:
    """The arguments of `vllm bench serve` for one load.

    Fixed lengths and a seed that depends on the load alone: all variants get the same requests, and no load gets
    those of another, which the server would find in its prefix cache.
    """
    arguments = [
        "--backend", "openai-chat", "--endpoint", "/v1/chat/completions",
        "--base-url", server.base_url.removesuffix("/v1"), "--model", server.model, "--tokenizer", str(variant.folder),
        "--num-prompts", str(load.count), "--num-warmups", "1", "--max-concurrency", str(load.concurrency),
        "--request-rate", str(load.rate), "--seed", str(zlib.crc32(load.name.encode()) % 10**6), "--temperature", "0",
        "--ignore-eos", "--disable-tqdm", "--save-result", "--result-dir", str(folder),
        "--result-filename", f"{load.name}.part",
        "--random-input-len", str(load.prompt_tokens), "--random-output-len", str(load.output_tokens),
    ]  # fmt: skip
    if load.image is None:
        return [*arguments, "--dataset-name", "random"]
    width, height = load.image
    return [
        *arguments, "--dataset-name", "random-mm", "--random-mm-base-items-per-request", "1",
        "--random-mm-limit-mm-per-prompt", '{"image": 1, "video": 0}',
        "--random-mm-bucket-config", f"{{({height}, {width}, 1): 1.0}}",
    ]  # fmt: skip


def _disk_mib(folder: Path) -> float:
    return round(sum(path.stat().st_size for path in shard_files(folder)) / 2**20, 1)


def _kv_tokens(log: Path) -> int:
    found = _KV_TOKENS.findall(log.read_text(encoding="utf-8", errors="replace"))
    return int(found[-1].replace(",", "")) if found else 0


def _device_weights(log: Path) -> float:
    """What vLLM says that the weights take on a GPU, MiB; it does not say it on a CPU."""
    found = _DEVICE_WEIGHTS.findall(log.read_text(encoding="utf-8", errors="replace"))
    return round(1024 * float(found[-1]), 1) if found else 0.0
