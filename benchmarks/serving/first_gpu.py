"""What to run first on a GPU that is at hand for minutes: real sizes, random weights, served, asked and measured.

    python -m benchmarks.serving.first_gpu OUT --size 7b --seconds 540
    python -m benchmarks.serving.first_gpu OUT --dry-run          # every stage that a CPU can do, with a tiny model

Compares the answers of the tiny example model at 4, 3 and 2 bits, served, with transformers. Meanwhile writes a random
Qwen2-VL, rounds it to 4, 3 and 2 bits, exports it for vLLM's own kernels, starts one `vllm serve` for each variant, all
at the same time, asks each about an image, and measures one after the other, the most telling loads first. Tables and
plots are written after every load to OUT/DEVICE/SIZE; what does not fit into --seconds is left out and said. A variant
that does not start is tried without torch.compile and then without CUDA graphs. vLLM and this package must be
installed.
"""

import argparse
import os
import shutil
import signal
import sys
import tempfile
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from benchmarks.serving.stages import (
    Clock,
    Log,
    ask_about_image,
    check_answers,
    put_nvrtc_on_path,
    put_vllm_on_path,
    random_model,
)
from vlmq_serve.bench.client import Client
from vlmq_serve.bench.serving import note_start, run_load, start
from vlmq_serve.bench.tables import write_results
from vlmq_serve.bench.variants import Load, Variant
from vlmq_serve.cli.bench.serve import SIZES, TIMES
from vlmq_serve.cli.console import one_line_errors
from vlmq_serve.device import device_name
from vlmq_serve.evaluate.server import Server
from vlmq_serve.export.compressed_tensors import export_compressed_tensors
from vlmq_serve.format.errors import VLMQError

IMAGES = '--limit-mm-per-prompt={"image": 1, "video": 0}'
CPU_ARGUMENTS: tuple[str, ...] = (
    IMAGES, "--max-model-len=2048", "--max-num-seqs=4", f"--kv-cache-memory-bytes={64 << 20}", "--enforce-eager",
)  # fmt: skip
# A fixed KV cache: what vLLM measures by itself is wrong while other servers start on the same GPU. Fewer tokens at a
# time than its 8192: each server keeps 1.6 GiB less for activations, and seven of 7B would come too close to 80 GB.
GPU_ARGUMENTS: tuple[str, ...] = (
    IMAGES, "--max-model-len=4096", "--max-num-seqs=32", "--max-num-batched-tokens=2048",
    f"--kv-cache-memory-bytes={1 << 30}", "--gpu-memory-utilization=0.05",
)  # fmt: skip
ATTEMPTS = ((), ('--compilation-config={"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}',), ("--enforce-eager",))
CPU_LOADS = ("c1-p32-o8-n2", "c2-p20-o8-i448-n2")
GPU_LOADS = (
    "c1-p128-o128-n4", "c1-p64-o64-i448-n4", "c8-p128-o128-n16", "c32-p128-o128-n64", "c8-p64-o64-i448-n16",
    "c32-p64-o64-i448-n64", "c1-p64-o64-i1280x720-n4", "c1-p1024-o128-n4",
)  # fmt: skip
MEASURE_S, LOAD_S = 90, 25  # kept back for measuring when servers start; what one load of one variant may take


@dataclass(frozen=True)
class Kind:
    """A variant: its bits, the scheme of head and vision tower, and vLLM's own kernel for an exported checkpoint."""

    bits: int = 16
    parts: str = ""
    backend: str = ""

    @property
    def folder(self) -> str:
        """Where `random_model` writes it."""
        return "bf16" if self.bits == 16 else f"w{self.bits}-all" if self.parts else f"w{self.bits}"


KINDS = {
    "w4": Kind(4), "bf16": Kind(), "w3": Kind(3), "w2": Kind(2), "w4-marlin": Kind(4, backend="marlin"),
    "w3-humming": Kind(3, backend="humming"), "w3-all": Kind(3, parts="w8"),
}  # fmt: skip
CPU_KINDS = {"w4": Kind(4), "bf16": Kind(), "w4-own": Kind(4, backend="auto"), "w3-all": Kind(3, parts="w8")}


@one_line_errors
def main() -> None:
    """Run the stages; exit status 1 when no variant of ours could be measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--size", default="7b", choices=["2b", "7b"])
    parser.add_argument("--seconds", type=float, default=540)
    parser.add_argument("--work", type=Path, help="Where the models go; default: memory, if 60 GB are free there.")
    parser.add_argument("--dry-run", action="store_true", help="A tiny model on the CPU, two loads.")
    options = parser.parse_args()
    if not options.dry_run and not torch.cuda.is_available():
        raise SystemExit("torch sees no GPU; --dry-run rehearses the stages on the CPU")
    size = "mini" if options.dry_run else options.size
    out = options.out / device_name().lower().replace(",", "").replace(" ", "-") / size
    out.mkdir(parents=True, exist_ok=True)
    log = Log(out / "log.txt", Clock(options.seconds))
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # so that the servers end as well
    with tempfile.TemporaryDirectory(dir=options.work or _roomy(), prefix="first-gpu-") as work:
        # No plugin but ours: GemLite has one that patches vLLM.
        os.environ |= {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_PLUGINS": "vlmq"}
        os.environ.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
        put_vllm_on_path()
        put_nvrtc_on_path()
        log(f"{device_name()}, torch {torch.__version__}, size {size}, models in {work}")
        with ExitStack() as stack:
            client = stack.enter_context(Client(out / "client.log"))
            servers = start_all(Path(work), size, CPU_KINDS if options.dry_run else KINDS, out, log, stack)
            loads = [Load.parse(text) for text in (CPU_LOADS if options.dry_run else GPU_LOADS)]
            answered = measure_all(servers, loads, out, log, client)
            log(f"answered: {', '.join(answered) or 'none'}; stopping the servers")
    if options.dry_run:
        log("a rehearsal on the CPU: no GPU kernel ran")
    raise SystemExit(0 if {"w4", "w3", "w2"} & {*answered} else 1)


def _roomy() -> str | None:
    memory = Path("/dev/shm")
    return str(memory) if memory.is_dir() and shutil.disk_usage(memory).free > 60e9 else None


def start_all(
    work: Path, size: str, kinds: dict[str, Kind], out: Path, log: Log, stack: ExitStack
) -> dict[str, tuple[Variant, Server]]:
    """Build the models and start their servers, everything that can at the same time; those that came up, in order."""
    pool = stack.enter_context(ThreadPoolExecutor(3 * len(kinds)))
    for bits in sorted({kind.bits for kind in kinds.values()} - {16}, reverse=True):
        pool.submit(_check, bits, work, out, log)  # while the large models are written
    random_model(work, size)
    log("bf16: weights written")
    rounded = {
        folder: pool.submit(random_model, work, size, [kind.bits], kind.parts)
        for folder, kind in {kind.folder: kind for kind in kinds.values() if kind.bits < 16}.items()
    }
    futures = {name: pool.submit(_bring_up, name, kind, work, rounded, out, log, stack) for name, kind in kinds.items()}
    up = {}
    for name, future in futures.items():
        with log.failure(name):
            up[name] = future.result()
    return up


def _check(bits: int, work: Path, out: Path, log: Log) -> None:
    with log.failure(f"answers at w{bits}"):
        questions = 50 if torch.cuda.is_available() else 8
        log(f"answers at w{bits}: {check_answers(work, bits, questions, out / f'answers-w{bits}.csv')}")


def _bring_up(
    name: str, kind: Kind, work: Path, rounded: dict[str, Future[None]], out: Path, log: Log, stack: ExitStack
) -> tuple[Variant, Server]:
    folder = work / kind.folder
    if kind.folder in rounded:
        rounded[kind.folder].result()
        log(f"{name}: rounded")
    arguments = GPU_ARGUMENTS if torch.cuda.is_available() else CPU_ARGUMENTS
    if kind.backend:
        source, folder = folder, work / name
        export_compressed_tensors(source, folder)
        arguments = (*arguments, f"--linear-backend={kind.backend}")
    variant = Variant(name, folder, "bfloat16", arguments)
    return _start(variant, out, log, stack)


def _start(variant: Variant, out: Path, log: Log, stack: ExitStack) -> tuple[Variant, Server]:
    attempts = ATTEMPTS if torch.cuda.is_available() else ((),)
    for number, extra in enumerate(attempts, 1):
        tried = replace(variant, arguments=(*variant.arguments, *extra))
        try:
            server = stack.enter_context(start(tried, out, max(log.clock.left() - MEASURE_S, 1)))
        except VLMQError as error:
            shutil.copy(out / variant.name / "serve.log", out / variant.name / f"failed-{number}.log")
            log(f"{variant.name}: attempt {number} failed: {str(error)[-1500:]}")
            continue
        log(f"{variant.name}: ready, attempt {number}")
        return tried, server
    raise VLMQError("no server came up")


def measure_all(
    servers: dict[str, tuple[Variant, Server]], loads: list[Load], out: Path, log: Log, client: Client
) -> list[str]:
    """Ask every server about an image, then all loads for all of them until the time is up; who answered."""
    asked: dict[str, tuple[Variant, Server]] = {}
    for name, (variant, server) in servers.items():
        with log.failure(name):
            log(f"{name}: {ask_about_image(server.base_url)}")
            note_start(variant, server, out)
            asked[name] = variant, server
    names = sorted(asked, key=lambda name: name != "bf16")  # ratios are to the first
    for load in loads:
        for name, (variant, server) in asked.items():
            if log.clock.left() < LOAD_S:
                log(f"{name}: {load.name} left out, the time is up")
                continue
            with log.failure(f"{name}: {load.name}"):
                run_load(variant, server, load, out, client)
                log(f"{name}: {load.name} measured")
        if names:
            write_results(out, "serve", names, TIMES, timings=True)
            write_results(out, "memory", names, SIZES, timings=False)
    return names


if __name__ == "__main__":
    main()
