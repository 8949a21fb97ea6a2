"""Run by test_sharding in a process of its own: vLLM's parallel linears on real ranks (gloo), against the whole weight.

python -m tests.quant_methods.sharding_ranks SCHEME...
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from typing import Any

import torch

from tests.quant_methods.checkpoints import round_to_nearest
from vlmq_serve.evaluate.server import free_port
from vlmq_serve.format.config import QuantizationSpec
from vlmq_serve.format.scheme import Scheme
from vlmq_serve.format.weight import PackedWeight

HIDDEN, WIDE, HEAD, HEADS, SHARED = 256, 1024, 32, 16, 4
TOLERANCE = 1e-3
RANKS = (1, 2, 4, 8)


def weights(scheme: Scheme) -> dict[str, PackedWeight]:
    """The same on every rank."""
    torch.manual_seed(0)
    shapes = {
        "q": (HEADS * HEAD, HIDDEN), "k": (SHARED * HEAD, HIDDEN), "v": (SHARED * HEAD, HIDDEN),
        "gate": (WIDE, HIDDEN), "up": (WIDE, HIDDEN), "down": (HIDDEN, WIDE),
    }  # fmt: skip
    return {name: round_to_nearest(torch.randn(shape), scheme) for name, shape in shapes.items()}


def load(layer: Any, parts: dict[Any, PackedWeight]) -> None:
    """As vLLM's models do: every checkpoint tensor goes to the loader of its parameter, with the name of its shard."""
    for shard, weight in parts.items():
        for name, tensor in weight.tensors("x").items():
            parameter = getattr(layer, name.removeprefix("x."))
            arguments = () if shard is None else (shard,)
            parameter.weight_loader(parameter, tensor, *arguments)
    layer.quant_method.process_weights_after_loading(layer)


def rows_of(y: torch.Tensor, parts: list[torch.Tensor], rank: int, copies: list[int], ranks: int) -> float:
    """Largest difference of a column-parallel output from this rank's rows of every part."""
    expected = []
    for part, copy in zip(parts, copies, strict=True):
        expected.append(part.chunk(ranks // copy, dim=-1)[rank // copy])
    return float((y - torch.cat(expected, dim=-1)).abs().max())


def check(rank: int, ranks: int, port: int, scheme: Scheme, results: Any) -> None:
    from vllm.config import CompilationConfig, VllmConfig, set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.model_executor.layers.linear import MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear

    from vlmq_serve.quant_methods.config import VLMQConfig

    # Ranks that disagree about this name use gloo and no shared memory, which would stay behind.
    os.environ["VLLM_DIST_IDENT"] = f"{port}-{rank}"
    with set_current_vllm_config(VllmConfig(compilation_config=CompilationConfig(custom_ops=["none"]))):
        init_distributed_environment(ranks, rank, f"tcp://127.0.0.1:{port}", rank, "gloo")
        initialize_model_parallel(ranks)
        quant, whole = VLMQConfig(QuantizationSpec(scheme)), weights(scheme)
        common = {"bias": False, "params_dtype": torch.float32, "quant_config": quant}
        qkv = QKVParallelLinear(HIDDEN, HEAD, HEADS, SHARED, prefix="layers.0.self_attn.qkv_proj", **common)
        gate_up = MergedColumnParallelLinear(HIDDEN, [WIDE, WIDE], prefix="layers.0.mlp.gate_up_proj", **common)
        down = RowParallelLinear(WIDE, HIDDEN, prefix="layers.0.mlp.down_proj", **common)
        load(qkv, {name: whole[name] for name in "qkv"})
        load(gate_up, {0: whole["gate"], 1: whole["up"]})
        load(down, {None: whole["down"]})
        x, wide = torch.randn(3, HIDDEN), torch.randn(3, WIDE)
        y = {name: (wide if name == "down" else x) @ weight.dequantize().T for name, weight in whole.items()}
        copies = max(1, ranks // SHARED)  # k and v are copied where there are fewer heads than ranks
        errors = [
            rows_of(qkv(x)[0], [y["q"], y["k"], y["v"]], rank, [1, copies, copies], ranks),
            rows_of(gate_up(x)[0], [y["gate"], y["up"]], rank, [1, 1], ranks),
            float((down(wide.chunk(ranks, dim=-1)[rank])[0] - y["down"]).abs().max()),
        ]
        results.put((rank, errors))


def main(scheme: Scheme) -> bool:
    import vllm.model_executor.layers.linear  # noqa: F401  # imported once, before the ranks are forked

    context = multiprocessing.get_context("fork")
    good = True
    for ranks in RANKS:
        port, results = free_port(), context.SimpleQueue()
        processes = [context.Process(target=check, args=(rank, ranks, port, scheme, results)) for rank in range(ranks)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(120)
        found = {} if any(process.exitcode for process in processes) else dict(results.get() for _ in range(ranks))
        right = len(found) == ranks and all(error < TOLERANCE for errors in found.values() for error in errors)
        sys.stdout.write(f"{scheme} on {ranks} ranks: {'right' if right else f'WRONG {found}'}\n")
        sys.stdout.flush()  # or the next ranks would inherit the line
        good = good and right
    return good


if __name__ == "__main__":
    sys.exit(not all([main(Scheme.parse(text)) for text in sys.argv[1:]]))
