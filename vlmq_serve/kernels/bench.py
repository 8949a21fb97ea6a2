"""Times of the CPU paths beside torch's own bf16 and fp32 linear, taken alternately in one run.

With one thread the clock is the processor time of this process, which neighbours on the machine disturb least;
with more it is the wall.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from vlmq_serve.format.scheme import Scheme
from vlmq_serve.format.weight import PackedWeight
from vlmq_serve.kernels.nibbles import int4_kernel_block
from vlmq_serve.kernels.prepared import linear, prepare

QWEN2_VL_2B = {"qkv": (2048, 1536), "down": (1536, 8960)}
"""(N, K) of two linears of Qwen2-VL-2B's decoder."""

ROWS = (1, 4, 16, 64, 256)


@dataclass(frozen=True)
class Measurement:
    """Median seconds of one path on one shape, its ratios to torch in the same run, and its error.

    `error` is the relative Frobenius distance to the float64 product of the exact weights.
    """

    layer: str
    out_features: int
    in_features: int
    rows: int
    scheme: str
    path: str
    milliseconds: float
    over_torch_bf16: float
    over_torch_fp32: float
    error: float
    bits_per_weight: float


def cpu_name() -> str:
    """Model name as the kernel reports it, and the vector capability that torch uses."""
    try:
        with open("/proc/cpuinfo") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return f"{names[0] if names else 'unknown CPU'}, {torch.backends.cpu.get_cpu_capability()}"


def random_weight(out_features: int, in_features: int, scheme: Scheme) -> PackedWeight:
    """Uniform codes and zeros, scales around 0.02; the same every time."""
    generator = torch.Generator().manual_seed(0)
    groups = (out_features, scheme.num_groups(in_features))
    codes = torch.randint(0, scheme.max_code + 1, (out_features, in_features), generator=generator)
    zeros = None if scheme.symmetric else torch.randint(0, scheme.max_code + 1, groups, generator=generator)
    scales = (torch.rand(groups, generator=generator) * 0.02 + 0.01).to(torch.bfloat16)
    return PackedWeight.from_codes(codes, scales, zeros, scheme)


def run_cpu(
    shapes: dict[str, tuple[int, int]], rows: tuple[int, ...], scheme: Scheme, seconds: float = 1.0
) -> Iterator[Measurement]:
    """One measurement per shape, M and path; `seconds` bounds the time per path and M (at least 3 rounds)."""
    for layer, (out_features, in_features) in shapes.items():
        weight = random_weight(out_features, in_features, scheme)
        candidates, memory = _candidates(weight)
        exact = weight.dequantize().double()
        for count in rows:
            x = torch.randn(count, in_features, generator=torch.Generator().manual_seed(count))
            inputs = {torch.bfloat16: x.bfloat16(), torch.float32: x}
            calls = {name: (call, inputs[dtype]) for name, (call, dtype) in candidates.items()}
            times = alternate(calls, seconds)
            for name, (call, given) in calls.items():
                expected = given.double() @ exact.T
                yield Measurement(
                    layer, out_features, in_features, count, str(scheme), name, 1e3 * times[name],
                    times["torch bf16"] / times[name], times["torch fp32"] / times[name],
                    float((call(given).double() - expected).norm() / expected.norm()), memory[name],
                )  # fmt: skip


def _candidates(
    weight: PackedWeight,
) -> tuple[dict[str, tuple[Callable[[Tensor], Tensor], torch.dtype]], dict[str, float]]:
    """Calls by name with the dtype of x they take, and bits per weight that each keeps in memory."""
    dense = weight.dequantize()
    half = dense.bfloat16()
    calls: dict[str, tuple[Callable[[Tensor], Tensor], torch.dtype]] = {
        "torch bf16": (lambda x: functional.linear(x, half), torch.bfloat16),
        "torch fp32": (lambda x: functional.linear(x, dense), torch.float32),
    }
    memory = {"torch bf16": 16.0, "torch fp32": 32.0}
    cases = [("cpu_dequant", torch.float32), ("cpu_dequant", torch.bfloat16)]
    if int4_kernel_block() is not None:
        cases.append(("cpu_int4", torch.bfloat16))
    for path, dtype in cases:
        prepared = prepare(weight, dtype, "cpu", path)
        name = f"{path} {'bf16' if dtype == torch.bfloat16 else 'fp32'}"
        calls[name] = (lambda x, prepared=prepared: linear(x, prepared), dtype)  # type: ignore[misc]
        memory[name] = 8 * prepared.nbytes / dense.numel()
    return calls, memory


def alternate(calls: dict[str, tuple[Callable[[Tensor], Tensor], Tensor]], seconds: float) -> dict[str, float]:
    """Median seconds per call, every round calling each once, so that a busy moment hits all alike."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call, x in calls.values():
        call(x)
    end = clock() + seconds * len(calls)
    while len(next(iter(times.values()))) < 3 or clock() < end:
        for name, (call, x) in calls.items():
            begin = clock()
            call(x)
            times[name].append(clock() - begin)
    return {name: statistics.median(values) for name, values in times.items()}
