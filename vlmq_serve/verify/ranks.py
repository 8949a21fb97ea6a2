"""A checkpoint opened by vLLM's own code, on tensors without memory, in as many processes as there are ranks.

    python -m vlmq_serve.verify.ranks CHECKPOINT RANKS RESULT.json

vLLM builds the model and runs its weight loaders as it does for serving. Only the tensors are of the `meta` device:
they have a shape and a dtype and no content, so a model of any size takes seconds and no GPU. The result has one entry
per way to treat the vision tower (vLLM's --mm-encoder-tp-mode): `weights`, and where that fails `data`.
"""

import json
import multiprocessing
import os
import re
import sys
import time
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from vlmq_serve.format.headers import read_tensor_index
from vlmq_serve.format.names import fused_members

RANK_TIMEOUT_S = 300
GRACE_S = 10
"""What ranks get to end by themselves, and to say why, once another has failed or they have given their result."""
_CACHE_SCALE = re.compile(r"\.attn\.[qkv]_(scale|zero_point)$")
"""Scales of a quantized KV cache, which vLLM sets to one where a checkpoint has none."""
_LOST_PEER = re.compile("Broken pipe|Connection (reset|closed) by peer|Connection was likely closed|connectFullMesh")
"""What torch says on a rank whose peer has ended; the first rank takes the store of all with it."""
_DTYPES = {
    "BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64, "I32": torch.int32,
    "I64": torch.int64, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


@dataclass(frozen=True)
class RankResult:
    """What one rank found: parameters, those quantized, those that nothing was loaded into, or why it stopped."""

    rank: int
    parameters: int = 0
    quantized: int = 0
    missing: tuple[str, ...] = ()
    error: str = ""


def open_checkpoint(folder: Path, ranks: int) -> dict[str, list[RankResult]]:
    """Results by mode of the vision tower; the second mode is tried where the first fails."""
    results = {"weights": _open(folder, ranks, "weights")}
    if ranks > 1 and any(result.error for result in results["weights"]):
        results["data"] = _open(folder, ranks, "data")
    return results


def _open(folder: Path, ranks: int, mode: str) -> list[RankResult]:
    """Results of all ranks; a single one where the config is refused before there are ranks."""
    try:
        config = _engine_config(folder, ranks, mode)
    except Exception as error:  # whatever vLLM raises is the finding
        return [RankResult(0, error=_one_line(error))]
    return without_echoes(sorted(_run_ranks(folder, config, ranks), key=lambda result: result.rank))


def _run_ranks(folder: Path, config: Any, ranks: int) -> list[RankResult]:
    """Results of the ranks that gave one in time; where a rank fails, the others, which may wait for it, get less."""
    # Forked, because importing vLLM takes seconds and a rank milliseconds.
    context = multiprocessing.get_context("fork")
    port = _free_port()
    processes, running = [], {}
    for rank in range(ranks):
        reader, writer = context.Pipe(duplex=False)
        processes.append(context.Process(target=_run_rank, args=(folder, config, rank, port, writer)))
        processes[rank].start()
        writer.close()  # the rank has the only other one: that it has ended shows in the reader
        running[reader] = rank
    found = []
    deadline = time.monotonic() + RANK_TIMEOUT_S
    while running and (ready := wait(running, max(0.0, deadline - time.monotonic()))):
        for reader in set(running).intersection(ready):
            rank = running.pop(reader)
            found.append(_received(reader, rank, processes[rank]))
            if found[-1].error:
                deadline = min(deadline, time.monotonic() + GRACE_S)
    for rank, process in enumerate(processes):
        process.join(0 if rank in running.values() else GRACE_S)
        process.kill()
    return found


def _received(reader: Connection, rank: int, process: BaseProcess) -> RankResult:
    """What the rank has sent, or that it ended without that, as at the hands of the system when memory is short."""
    try:
        result: RankResult = reader.recv()
    except (EOFError, OSError):  # the latter where it ended in the middle of what it sent
        process.join(GRACE_S)
        return RankResult(rank, error=f"rank {rank} ended with status {process.exitcode} and no result")
    return result


def without_echoes(results: list[RankResult]) -> list[RankResult]:
    """`results` without those of ranks that only lost their connection to one that failed for a reason of its own."""
    echoes = [result for result in results if _LOST_PEER.search(result.error)]
    failed = any(result.error and result not in echoes for result in results)
    return [result for result in results if result not in echoes] if failed else results


def _engine_config(folder: Path, ranks: int, mode: str) -> Any:
    from vllm.engine.arg_utils import EngineArgs

    arguments: dict[str, Any] = {"tensor_parallel_size": ranks, "mm_encoder_tp_mode": mode, "enforce_eager": True}
    # Named, so that vLLM does not ask whether this machine has a device for every rank.
    backend = "mp" if ranks > 1 else "uni"
    return EngineArgs(model=str(folder), distributed_executor_backend=backend, **arguments).create_engine_config()


def _run_rank(folder: Path, config: Any, rank: int, port: int, writer: Connection) -> None:
    try:
        writer.send(_open_on_rank(folder, config, rank, port))
    except Exception as error:  # whatever vLLM raises is the finding
        writer.send(RankResult(rank, error=_one_line(error)))


def _open_on_rank(folder: Path, config: Any, rank: int, port: int) -> RankResult:
    from vllm.config import set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.model_executor.model_loader.utils import initialize_model

    ranks = config.parallel_config.tensor_parallel_size
    # vLLM's workers set this name of their shared memory. Where ranks disagree vLLM falls back to gloo. That is wanted:
    # nothing is exchanged here, and shared memory would stay behind when a forked rank ends.
    os.environ["VLLM_DIST_IDENT"] = f"vlmq-verify-{port}-{rank}"
    with set_current_vllm_config(config):
        init_distributed_environment(ranks, rank, f"tcp://127.0.0.1:{port}", rank, "gloo")
        initialize_model_parallel(ranks)
        torch.set_default_dtype(config.model_config.dtype)
        with torch.device("meta"):
            model = initialize_model(config)
        tensors = {
            name: torch.empty(info.shape, dtype=_DTYPES[info.dtype], device="meta")
            for name, info in read_tensor_index(folder).items()
        }
        loaded = model.load_weights(list(tensors.items()))
    names = [name for name, _ in model.named_parameters()]
    missing = [name for name in names if loaded is not None and name not in loaded and not _CACHE_SCALE.search(name)]
    missing += _missing_members(model, list(tensors), names)
    return RankResult(rank, len(names), sum(name.endswith(".qweight") for name in names), tuple(missing))


def _missing_members(model: torch.nn.Module, tensors: list[str], parameters: list[str]) -> list[str]:
    """Tensors of fused layers that the checkpoint lacks while it has their siblings: vLLM counts those as loaded."""
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    present = set(mapper.get_rename_mapper().apply_list(tensors) if mapper is not None else tensors)
    missing = []
    for name in parameters:
        layer, _, suffix = name.rpartition(".")
        members = {f"{member}.{suffix}" for member in fused_members(layer)}
        if members & present:
            missing += sorted(members - present)
    return missing


def _one_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # pydantic puts our line between its own.
    ours = [line for line in lines if line.startswith("Value error, ")]
    text = ours[0].removeprefix("Value error, ") if ours else " ".join(lines)
    return text.partition(" [type=")[0] or type(error).__name__


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    checkpoint, count, target = sys.argv[1:4]
    opened = open_checkpoint(Path(checkpoint), int(count))
    content = {mode: [asdict(result) for result in found] for mode, found in opened.items()}
    Path(target).write_text(json.dumps(content), encoding="utf-8")
