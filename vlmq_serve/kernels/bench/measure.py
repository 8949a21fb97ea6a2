"""One cell of the benchmark: every candidate on one layer and one M, timed together and checked against float64."""

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata

import torch
from torch import Tensor

from vlmq_serve.device import device_name
from vlmq_serve.format.scheme import Scheme
from vlmq_serve.kernels.bench import candidates
from vlmq_serve.kernels.bench.candidates import DENSE, ON_REQUEST, OURS, PEER, Candidate, PeerFactory
from vlmq_serve.kernels.bench.layers import Layer, random_weight
from vlmq_serve.kernels.bench.timing import cache_bytes, clock_name, median_seconds

logger = logging.getLogger(__name__)

CHECKED_ROWS = 64
CHECKED_FEATURES = 512
ERROR_LIMIT = 2e-2
"""A candidate further than this from float64 multiplies with something else; its time is not reported."""


@dataclass(frozen=True)
class Settings:
    """seconds: per candidate and cell. copy_rate: bytes per second of a measured copy, read plus written."""

    device: torch.device
    dtype: torch.dtype
    seconds: float
    copy_rate: float


@dataclass(frozen=True)
class Measurement:
    """Median time of one candidate in one cell. Ratios are of times, above 1 is faster than the other.

    over_bf16: against torch's linear in the 16-bit type; over_best_other: against the fastest candidate that is
    not ours, dense or of the same scheme; of_floor: share of the speed at which the device would copy the packed
    weight (codes, scales, zeros), x and y. error: relative Frobenius distance to the float64 product of the exact
    weights, on the first rows and features.
    """

    model: str
    layer: str
    out_features: int
    in_features: int
    rows: int
    scheme: str
    path: str
    kind: str
    microseconds: float
    over_bf16: float
    over_best_other: float
    of_floor: float
    error: float
    bits_per_weight: float


def environment(settings: Settings) -> dict[str, str]:
    """What a row must say about where it was measured; rows with the same values may be compared."""
    packages = ("triton", "vllm", "humming", "gemlite", "auto-round-lib")
    versions = [f"{name} {version}" for name in packages if (version := _version(name))]
    return {
        "device": device_name(settings.device),
        "threads": str(torch.get_num_threads()) if settings.device.type == "cpu" else "",
        "clock": clock_name(settings.device),
        "dtype": candidates.short(settings.dtype),
        "torch": torch.__version__,
        "packages": ", ".join(versions),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def measure_layer(
    layer: Layer, rows: Sequence[int], schemes: Sequence[str], settings: Settings, peers: Iterable[PeerFactory] = ()
) -> Iterator[list[Measurement]]:
    """One list per M, each measured together."""
    built, exact = build_candidates(layer, schemes, settings, list(peers))
    for count in rows:
        x = torch.randn(count, layer.in_features, generator=torch.Generator().manual_seed(count))
        yield measure_cell(layer, x.to(settings.device), built, exact, settings)


def build_candidates(
    layer: Layer, schemes: Sequence[str], settings: Settings, peers: Sequence[PeerFactory]
) -> tuple[list[Candidate], dict[str, Tensor]]:
    """Candidates, and by scheme the exact first rows of the weight, float64 [<= CHECKED_FEATURES, K]."""
    rotation = 4 * cache_bytes(settings.device)
    dtypes = [settings.dtype, torch.float32] if settings.device.type == "cpu" else [settings.dtype]
    built: list[Candidate] = []
    exact = {}
    for scheme in schemes:
        weight = random_weight(layer, Scheme.parse(scheme), settings.dtype, settings.device)
        exact[scheme] = weight.dequantize()[:CHECKED_FEATURES].double()
        if not built:
            built += candidates.dense(weight, dtypes, rotation)
        built += candidates.ours(weight, dtypes, rotation)
        for factory in peers:
            built += factory(weight, settings.dtype, rotation)
    return built, exact


def measure_cell(
    layer: Layer, x: Tensor, built: Sequence[Candidate], exact: dict[str, Tensor], settings: Settings
) -> list[Measurement]:
    """Check each candidate at x [M, K], time those that are right; the others come back without a time (nan)."""
    built = [c for c in built if c.distinct(x.shape[0])]
    errors = {_key(c): _checked(c, x, exact[c.scheme]) for c in built}
    sound = [c for c in built if errors[_key(c)] <= ERROR_LIMIT]
    given = {_key(c): (c.calls, x.to(c.dtype)) for c in sound}
    times = median_seconds(given, settings.device, settings.seconds)
    baseline = next(times[_key(c)] for c in sound if c.kind == DENSE and c.dtype == settings.dtype)
    return [_measurement(layer, x.shape[0], c, sound, times, baseline, errors[_key(c)], settings) for c in built]


def _measurement(
    layer: Layer, rows: int, candidate: Candidate, sound: Sequence[Candidate], times: dict[str, float],
    baseline: float, error: float, settings: Settings,
) -> Measurement:  # fmt: skip
    seconds = times.get(_key(candidate), float("nan"))
    others = [times[_key(c)] for c in sound if c.kind == DENSE or (c.kind == PEER and c.scheme == candidate.scheme)]
    weights = layer.out_features * layer.in_features
    moved = candidate.nbytes + rows * (layer.out_features + layer.in_features) * candidate.dtype.itemsize
    return Measurement(
        layer.model, layer.name, layer.out_features, layer.in_features, rows,
        "" if candidate.kind == DENSE else candidate.scheme, candidate.name, candidate.kind, 1e6 * seconds,
        baseline / seconds, min(others) / seconds if candidate.kind in (OURS, ON_REQUEST) else float("nan"),
        moved / settings.copy_rate / seconds, error, 8 * candidate.nbytes / weights,
    )  # fmt: skip


def _key(candidate: Candidate) -> str:
    return f"{candidate.scheme} {candidate.name}"


def _checked(candidate: Candidate, x: Tensor, exact: Tensor) -> float:
    """The error; infinite where another package's kernel raises, which must not end the run."""
    try:
        return _error(candidate, x, exact)
    except Exception as error:
        if candidate.kind != PEER:
            raise
        logger.warning("%s at M=%d: %s: %s", candidate.name, x.shape[0], type(error).__name__, error)
        return float("inf")


def _error(candidate: Candidate, x: Tensor, exact: Tensor) -> float:
    given = x.to(candidate.dtype)
    got = candidate.calls[0](given)[:CHECKED_ROWS, : exact.shape[0]].double()
    expected = given[:CHECKED_ROWS].double() @ exact.T
    error = float((got - expected).norm() / expected.norm())
    return error if error == error else float("inf")
