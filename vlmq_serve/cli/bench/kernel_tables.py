"""`vlmq bench kernels --write-table`: measures plans and writes what `kernels.tables` reads."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from vlmq_serve.cli.bench.kernel_results import mean
from vlmq_serve.format.errors import VLMQError
from vlmq_serve.format.scheme import Scheme
from vlmq_serve.kernels import choice, tables
from vlmq_serve.kernels.bench.layers import Layer
from vlmq_serve.kernels.bench.measure import Measurement, Settings
from vlmq_serve.kernels.bench.tuning import Tuned, tune_layer
from vlmq_serve.kernels.gpu import gpu_of

VLLM_MARGIN = 1.03
"""How much faster than ours vLLM's kernel must be, on the whole, to get a layer: less is noise."""

Speeds = dict[tuple[tables.Key, int], float]
"""Seconds by ((bits, N, K), M)."""


def check(settings: Settings) -> None:
    """Raise `VLMQError` where there is nothing to choose between."""
    if choice.TRITON not in choice.available_paths(4, settings.dtype, settings.device):
        raise VLMQError("--write-table: chooses between GPU kernels; run it where torch sees an NVIDIA GPU")


def write_table(
    path: Path, layers: Sequence[Layer], rows: Sequence[int], schemes: Sequence[str], settings: Settings,
    environment: dict[str, str], vllm: Speeds, done: Callable[[str], None] = lambda _: None,
) -> tables.Table:  # fmt: skip
    """Measure and write layer by layer; rows of other layers that the file holds already are kept.

    vllm: what vLLM's own choice of kernel took, where that was measured. One group size: plans do not depend on it.
    """
    gpu = gpu_of(settings.device)
    table = tables.Table(device=gpu.name, arch=gpu.arch, environment=environment, plans=[])
    if path.exists():
        table = tables.read(path, str(path), gpu).model_copy(update={"environment": environment})
    group = Scheme.parse(schemes[0]).group_size
    chosen = [text for text in schemes if Scheme.parse(text).group_size == group]
    for layer in layers:
        tuned: list[Tuned] = []
        for cell in tune_layer(layer, rows, chosen, settings):
            tuned += cell
            done(f"{layer.model} {layer.name}, M={cell[0].row.M}")
        table = _merged(table, tuned, vllm)
        tables.write(path, table)
    return table


def _merged(table: tables.Table, tuned: Sequence[Tuned], vllm: Speeds) -> tables.Table:
    new = {_key(t.row) for t in tuned}
    plans = [row for row in table.plans if _key(row) not in new] + [t.row for t in tuned]
    given = [row for row in table.vllm if (row.bits, row.N, row.K) not in new]
    for bits, out_features, in_features in sorted(new):
        key = (bits, out_features, in_features)
        ratios = [t.seconds / vllm[key, t.row.M] for t in tuned if _key(t.row) == key and (key, t.row.M) in vllm]
        if ratios and mean(ratios) > VLLM_MARGIN:
            given.append(tables.LayerRow.model_validate({"bits": bits, "N": out_features, "K": in_features}))
    return table.model_copy(update={"plans": plans, "vllm": given})


def _key(row: tables.Row) -> tables.Key:
    return row.bits, row.N, row.K


def vllm_speeds(found: Sequence[Measurement], dtype: torch.dtype) -> Speeds:
    """What the kernel took that vLLM itself would choose for each layer; empty without vLLM or its kernels."""
    from vlmq_serve.cli.bench.peers.vllm import vllm_choice

    names: dict[tuple[str, int, int], str | None] = {}
    speeds: Speeds = {}
    for m in found:
        if not m.scheme:
            continue
        place = (m.scheme, m.out_features, m.in_features)
        if place not in names:
            names[place] = vllm_choice(Scheme.parse(m.scheme), m.out_features, m.in_features, dtype)
        if m.path == names[place] and m.microseconds == m.microseconds:
            speeds[(Scheme.parse(m.scheme).bits, m.out_features, m.in_features), m.rows] = 1e-6 * m.microseconds
    return speeds
