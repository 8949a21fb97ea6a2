"""Clocks: alternating calls on a CPU, replayed CUDA graphs on a GPU; the floor from a measured copy."""

import statistics
import time
from collections.abc import Callable, Mapping
from itertools import cycle
from pathlib import Path

import torch
from torch import Tensor

from vlmq_serve.kernels.bench.candidates import Call

MIN_ROUNDS = 3
GRAPH_SECONDS = 1e-3
"""Shortest graph that is worth timing with events, whose resolution is about half a microsecond."""

Calls = tuple[tuple[Call, ...], Tensor]


def clock_name(device: torch.device) -> str:
    """Which clock `median_seconds` reads: with one thread the processor time of this process, which neighbours on
    the machine disturb least, with more the wall; events between replays of a CUDA graph on a GPU."""
    if device.type == "cuda":
        return "graph"
    return "process" if torch.get_num_threads() == 1 else "wall"


def median_seconds(calls: Mapping[str, Calls], device: torch.device, seconds: float) -> dict[str, float]:
    """Median time of one call by name; `calls` maps to the copies and x. About `seconds` for each name.

    Every round takes each name once, so that a busy moment hits all alike.
    """
    if device.type == "cuda":
        return _graph_seconds(calls, seconds)
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    turns = {name: cycle(copies) for name, (copies, _) in calls.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    end = clock() + seconds * len(calls)
    while len(next(iter(times.values()))) < MIN_ROUNDS or clock() < end:
        for name, (_, x) in calls.items():
            call = next(turns[name])
            begin = clock()
            call(x)
            times[name].append(clock() - begin)
    return {name: statistics.median(values) for name, values in times.items()}


def _graph_seconds(calls: Mapping[str, Calls], seconds: float) -> dict[str, float]:
    graphs = {name: _capture(*given) for name, given in calls.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + seconds * len(calls)
    while len(next(iter(times.values()))) < MIN_ROUNDS or time.perf_counter() < end:
        for name, (graph, length) in graphs.items():
            times[name].append(_event_seconds(graph.replay) / length)
    return {name: statistics.median(values) for name, values in times.items()}


def _capture(copies: tuple[Call, ...], x: Tensor) -> tuple[torch.cuda.CUDAGraph, int]:
    """A graph that calls each copy the same number of times, and how many calls it holds."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in copies[:2]:
            call(x)
        once = _event_seconds(lambda: copies[0](x))
    torch.cuda.current_stream().wait_stream(stream)
    repeats = max(1, min(50, int(GRAPH_SECONDS / (once * len(copies)))))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            for call in copies:
                call(x)
    graph.replay()
    return graph, repeats * len(copies)


def _event_seconds(run: Callable[[], object]) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    end.synchronize()
    return 1e-3 * begin.elapsed_time(end)


def copy_bandwidth(device: torch.device, seconds: float = 0.5) -> float:
    """Bytes per second, read plus written, of copying between buffers that no cache holds (median)."""
    size = 8 * cache_bytes(device)
    source = torch.empty(size, dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    found = median_seconds({"copy": ((target.copy_,), source)}, device, seconds)
    return 2 * size / found["copy"]


def cache_bytes(device: torch.device) -> int:
    """Size of the last cache before memory; 32 MiB where the system does not tell."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    units = {"K": 1 << 10, "M": 1 << 20}
    sizes = [32 << 20]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        if text and text[-1] in units and text[:-1].isdigit():
            sizes.append(int(text[:-1]) * units[text[-1]])
    return max(sizes)
