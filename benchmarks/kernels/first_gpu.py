"""What to run first on a GPU that is at hand for minutes: are our kernels right, then how fast, then which are fastest.

    python -m benchmarks.kernels.first_gpu OUT --seconds 560
    python -m benchmarks.kernels.first_gpu OUT --dry-run      # what a CPU can rehearse, and the commands for the rest

Stages, the most valuable first; each in processes of its own with a time limit, so that a kernel that crashes or hangs
ends nothing else, and what was measured before is kept:

    compile   every kernel that the layers of the 2B and 7B can need, all widths at once
    correct   tests/kernels/test_gpu.py: every path against float64, repeated and captured products equal bit for bit,
              one launch equal to two, one process per width
    bench     7B, then 2B, g128, 4, 3 and 2 bits: ours, cuBLAS and vLLM's kernels; kernels.csv and kernels.png
    table     the fastest plan of every 7B layer and M: the table for VLMQ_TABLE
    GemLite   beside ours, in gemlite.csv: late and apart, as it tunes itself for minutes

Results are in OUT/DEVICE. What is not there at the end had no time left: the log says so. Peers: vLLM with
humming-kernels, and GemLite, whichever can be imported. A peer that brings its process down, as an illegal access of
memory does, is left out of a second try.
"""

import argparse
import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.serving.stages import Clock, Log, put_nvrtc_on_path
from vlmq_serve.device import device_name
from vlmq_serve.kernels.tables import file_name

ROOT = Path(__file__).resolve().parents[2]
VLMQ = (sys.executable, "-c", "from vlmq_serve.cli import app; app()")
PEERS = ("vllm", "humming", "gemlite")
BITS = (4, 3, 2, 8)


@dataclass(frozen=True)
class Stage:
    """Commands that run at the same time, at most `seconds`; rehearsal: the same on a CPU, none where it cannot.

    peers: kernels of others run in it too, and may be left out.
    """

    name: str
    seconds: int
    commands: tuple[tuple[str, ...], ...]
    rehearsal: tuple[tuple[str, ...], ...] = ()
    peers: bool = False


def stages(out: Path) -> Iterator[Stage]:
    """In order of value."""
    module = (sys.executable, "-m", "benchmarks.kernels.first_gpu", str(out))
    yield Stage("compile", 150, tuple((*module, "--compile", str(bits)) for bits in BITS))
    options = ("-q", "--tb=short", "-p", "no:cacheprovider")
    test = (sys.executable, "-m", "pytest", *options, "tests/kernels/test_gpu.py", "-k")
    checks = tuple((*test, f"w{bits}") for bits in BITS)
    yield Stage("correct", 150, checks, checks[:1])
    few = ("--rows", "1,16,64,256,1024,4096")
    bench = (*VLMQ, "bench", "kernels", "--group-size", "128")
    ours = (*bench, "-o", str(out / "kernels.csv"), "--plot", str(out / "kernels.png"), "--peers", "vllm", "--seconds")
    tiny = (*ours, "0.01", "--device", "cpu", "--models", "2B", "--layers", "o", "--rows", "1", "--bits", "4")
    yield Stage("bench 7B, few M", 200, ((*ours, "0.1", "--models", "7B", *few),), (tiny,), peers=True)
    file = str(out / file_name(device_name()))
    tune = ("--models", "7B", "--rows", "1,2,4,8,16,32,64,128,256,512", "--write-table", file)
    yield Stage("table 7B", 200, ((*ours, "0.05", *tune),), peers=True)
    yield Stage("bench 2B, few M", 100, ((*ours, "0.1", "--models", "2B", *few),), peers=True)
    gemlite = (*bench, "-o", str(out / "gemlite.csv"), "--peers", "gemlite", "--bits", "4,2", "--seconds", "0.1")
    yield Stage("GemLite 7B", 200, ((*gemlite, "--models", "7B", *few),))
    yield Stage("bench, every M", 300, ((*ours, "0.1", "--models", "7B,2B"),), peers=True)


def main() -> None:
    """Run the stages; exit status 1 when a kernel was wrong or nothing could be measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, default=560, help="for everything")
    parser.add_argument("--dry-run", action="store_true", help="rehearse on a CPU, and say what a GPU would run")
    parser.add_argument("--compile", type=int, choices=BITS, help="only compile the kernels of this width")
    options = parser.parse_args()
    if options.compile:
        compile_kernels(options.compile)
        return
    if not options.dry_run and not torch.cuda.is_available():
        raise SystemExit("torch sees no GPU; --dry-run rehearses the stages on the CPU")
    out = options.out / Path(file_name(device_name())).stem
    out.mkdir(parents=True, exist_ok=True)
    put_nvrtc_on_path()
    log = Log(out / "log.txt", Clock(options.seconds))
    log(f"{device_name()}, torch {torch.__version__}, peers: {', '.join(filter(_importable, PEERS)) or 'none'}")
    good = {stage.name: run(stage, out, log, options.dry_run) for stage in stages(out)}
    if options.dry_run:
        log("a rehearsal on the CPU: no GPU kernel ran")
    failed = [name for name, fine in good.items() if not fine]
    log(f"not done, or not to the end: {', '.join(failed) or 'nothing'}")
    raise SystemExit(1 if "correct" in failed or not (out / "kernels.csv").exists() else 0)


def _importable(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def run(stage: Stage, out: Path, log: Log, rehearse: bool) -> bool:
    """Whether every command of the stage ended well within its time and ours."""
    commands = stage.rehearsal if rehearse else stage.commands
    if rehearse and not commands:
        for command in stage.commands:
            log(f"{stage.name}: would run {' '.join(command).replace(' '.join(VLMQ), 'vlmq')}")
        return True
    good, crashed = _run_all(commands, stage, out, log)
    if crashed and stage.peers and not rehearse:
        log(f"{stage.name}: once more, without the kernels of others")
        good, _ = _run_all(tuple((*command, "--peers", "none") for command in commands), stage, out, log)
    return good


def _run_all(commands: tuple[tuple[str, ...], ...], stage: Stage, out: Path, log: Log) -> tuple[bool, bool]:
    """Whether every command ended well within its time and ours, and whether one ended badly by itself."""
    limit = min(float(stage.seconds), log.clock.left())
    if limit < 10:
        log(f"{stage.name}: left out, no time")
        return False, False
    log(f"{stage.name}: {len(commands)} processes, at most {limit:.0f} s")
    with ThreadPoolExecutor(len(commands)) as pool:
        files = [out / f"{stage.name.replace(' ', '-').replace(',', '')}-{i}.txt" for i in range(len(commands))]
        codes = list(pool.map(_run, commands, files, [limit] * len(files)))
    for code, file in zip(codes, files, strict=True):
        last = " | ".join(file.read_text(encoding="utf-8", errors="replace").split("\n")[-3:]).strip(" |")
        log(f"{stage.name}: {'time is up' if code is None else f'exit status {code}'}: {last[-300:]}")
    return all(code == 0 for code in codes), any(code for code in codes)


def _run(command: tuple[str, ...], file: Path, limit: float) -> int | None:
    """Exit status, None when the time was up."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    with file.open("a", encoding="utf-8") as handle:
        process = subprocess.Popen(command, stdout=handle, stderr=subprocess.STDOUT, cwd=ROOT, env=environment)
        try:
            return process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            return None


def compile_kernels(bits: int) -> None:
    """Fills Triton's cache on disk with what the measured layers need, as loading a model does; weights are zeros."""
    from vlmq_serve.kernels import scratch, triton_path
    from vlmq_serve.kernels.bench.layers import LAYERS
    from vlmq_serve.kernels.plan import KINDS
    from vlmq_serve.kernels.planes import PLANES, WORDS, slab_length

    device = torch.device("cuda", torch.cuda.current_device())
    scratch.reserve(device)
    begin = time.monotonic()
    for layer in LAYERS:
        slab = slab_length(layer.in_features, 128, bits)
        slabs = -(-layer.in_features // slab)
        words = (slabs, WORDS[bits], layer.out_features, slab // PLANES[bits])
        groups = (-(-slabs * slab // 128), layer.out_features, 2)
        weight = triton_path.Operand(
            torch.zeros(words, dtype=torch.int16, device=device),
            torch.zeros(groups, dtype=torch.bfloat16, device=device),
            bits, 128, layer.out_features, layer.in_features,
        )  # fmt: skip
        for kind in KINDS:
            triton_path.warm_up(weight, kind)
    torch.cuda.synchronize()
    sys.stdout.write(f"W{bits}: ready after {time.monotonic() - begin:.0f} s\n")


if __name__ == "__main__":
    main()
