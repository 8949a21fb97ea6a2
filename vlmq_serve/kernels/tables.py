"""Measured plans per GPU: JSON files that `vlmq bench kernels --write-table` writes and `plan` reads.

    {"device": "NVIDIA H100 80GB HBM3", "arch": 90, "environment": {...}, "plans": [
      {"bits": 4, "N": 3584, "K": 18944, "M": 16, "kernel": "fused", "rows_m": 16, "rows_n": 128, "split": 8,
       "one_launch": true}, ...]}

A row of `plans` serves its (bits, N, K) from the M of the row before up to its own M; above the last row, and for
layers that have none, the fixed rules serve. Layers listed under "vllm", {"bits": 4, "N": 3584, "K": 18944}, are faster
on vLLM's own kernels, to which `backend: auto` then leaves them. Shipped tables lie in `gpu_tables/`, found by the name
of the device; VLMQ_TABLE names a file of one's own, which is used instead.
"""

import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from vlmq_serve.format.errors import VLMQError
from vlmq_serve.format.scheme import ALLOWED_BITS
from vlmq_serve.kernels.gpu import Gpu, gpu_of
from vlmq_serve.kernels.plan import Plan
from vlmq_serve.kernels.tiles import Tile, known_tiles

ENVIRONMENT = "VLMQ_TABLE"
SHIPPED = Path(__file__).with_name("gpu_tables")

Key = tuple[int, int, int]
"""(bits, N, K)"""


def _known_width(bits: int) -> int:
    if bits not in ALLOWED_BITS:
        raise ValueError(f"allowed {list(ALLOWED_BITS)}")
    return bits


Bits = Annotated[int, AfterValidator(_known_width)]


class Row(BaseModel):
    """One plan. `dense` takes no tile and no split: its parts follow from the memory of the GPU."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    bits: Bits
    N: int = Field(ge=1)
    K: int = Field(ge=1)
    M: int = Field(ge=1)
    kernel: Literal["gemv", "fused", "dense"]
    rows_m: int = 0
    rows_n: int = 0
    split: Literal[1, 2, 4, 8] = 1
    one_launch: bool = True


class LayerRow(BaseModel):
    """A layer that vLLM's own kernels serve faster over all measured M."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    bits: Bits
    N: int = Field(ge=1)
    K: int = Field(ge=1)


class Table(BaseModel):
    """A file. `environment` says with what it was measured; nothing depends on it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    device: str
    arch: int
    environment: dict[str, str] = Field(default_factory=dict)
    vllm: list[LayerRow] = Field(default_factory=list)
    plans: list[Row]


def measured_plans(gpu: Gpu) -> Mapping[Key, tuple[tuple[int, Plan], ...]]:
    """By (bits, N, K): (largest M, plan), M ascending. Empty without a table for this GPU.

    Raises `VLMQError` for a table that is damaged or made for another GPU.
    """
    return _load(os.environ.get(ENVIRONMENT) or None, gpu)


def prefers_vllm(device: torch.device, bits: int, out_features: int, in_features: int) -> bool:
    """Whether the table of this GPU says that vLLM's own kernels serve such a layer faster."""
    if device.type != "cuda":
        return False
    table = _table(os.environ.get(ENVIRONMENT) or None, gpu_of(device))
    wanted = (bits, out_features, in_features)
    return table is not None and any((row.bits, row.N, row.K) == wanted for row in table.vllm)


def fingerprint() -> str:
    """Of the file that VLMQ_TABLE names, else of all that are shipped; empty without any, and where one cannot be read,
    of which loading tells."""
    own = os.environ.get(ENVIRONMENT) or None
    paths = [Path(own)] if own else sorted(SHIPPED.glob("*.json"))
    try:
        contents = b"\0".join(path.read_bytes() for path in paths)
    except OSError:
        return ""
    return hashlib.sha256(contents).hexdigest()[:16] if paths else ""


@lru_cache(maxsize=16)
def _load(own: str | None, gpu: Gpu) -> Mapping[Key, tuple[tuple[int, Plan], ...]]:
    table = _table(own, gpu)
    found: dict[Key, dict[int, Plan]] = defaultdict(dict)
    for index, row in enumerate(table.plans if table else ()):
        where = f"{own or file_name(gpu.name)}: plans[{index}]"
        of_layer = found[row.bits, row.N, row.K]
        if row.M in of_layer:
            raise VLMQError(f"{where}: a second row for W{row.bits} N={row.N} K={row.K} M={row.M}; remove one")
        of_layer[row.M] = Plan(_tile(row, gpu, where), row.split, 0, row.one_launch)
    return {key: tuple(sorted(rows.items())) for key, rows in found.items()}


@lru_cache(maxsize=16)
def _table(own: str | None, gpu: Gpu) -> Table | None:
    path = Path(own) if own else SHIPPED / file_name(gpu.name)
    if own is None and not path.is_file():
        return None
    return read(path, f"{ENVIRONMENT}={own}" if own else str(path), gpu)


def read(path: Path, where: str, gpu: Gpu) -> Table:
    """The table in a file; `where` is how errors call it. Raises `VLMQError` when it is damaged or for another GPU."""
    table = _parse(path, where)
    if (table.device, table.arch) != (gpu.name, gpu.arch):
        raise VLMQError(
            f"{where}: is for {table.device!r} (sm_{table.arch}), this GPU is {gpu.name!r} (sm_{gpu.arch}); "
            f"measure here with `vlmq bench kernels --write-table FILE`, or unset {ENVIRONMENT}"
        )
    return table


def _parse(path: Path, where: str) -> Table:
    advice = f"write it again with `vlmq bench kernels --write-table FILE`, or unset {ENVIRONMENT}"
    try:
        return Table.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise VLMQError(f"{where}: cannot be read ({error.strerror}); {advice}") from None
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "the file"
        got = "" if first["type"] == "missing" else f", got {first['input']!r}"
        raise VLMQError(f"{where}: {place}: {first['msg']}{got}; {advice}") from None
    except ValueError as error:
        raise VLMQError(f"{where}: is not JSON ({error}); {advice}") from None


def _tile(row: Row, gpu: Gpu, where: str) -> Tile | None:
    if row.kernel == "dense":
        return None
    allowed = [t for t in known_tiles(row.bits, gpu.arch) if t.gemv == (row.kernel == "gemv")]
    found = next((t for t in allowed if (t.rows_m, t.rows_n) == (row.rows_m, row.rows_n)), None)
    if found is None:
        raise VLMQError(
            f"{where}: got a {row.kernel} tile of {row.rows_m} by {row.rows_n} rows, allowed for W{row.bits} on "
            f"sm_{gpu.arch}: {[(t.rows_m, t.rows_n) for t in allowed]}"
        )
    if row.kernel == "gemv" and found.rows_m < row.M:
        raise VLMQError(f"{where}: got a gemv tile of {found.rows_m} rows for M={row.M}; it serves M up to its rows")
    return found


def row_of(key: Key, rows: int, plan: Plan) -> Row:
    """The row that brings `plan` back."""
    bits, out_features, in_features = key
    place = {"bits": bits, "N": out_features, "K": in_features, "M": rows}
    if plan.tile is None:
        return Row.model_validate({**place, "kernel": "dense"})
    tile = {"rows_m": plan.tile.rows_m, "rows_n": plan.tile.rows_n}
    kernel = "gemv" if plan.tile.gemv else "fused"
    return Row.model_validate({**place, **tile, "kernel": kernel, "split": plan.split, "one_launch": plan.one_launch})


def write(path: Path, table: Table) -> None:
    """One line per plan, in order; replaces the file at once or not at all."""
    head: dict[str, Any] = {"device": table.device, "arch": table.arch, "environment": table.environment}
    rows = sorted(table.plans, key=lambda r: (r.bits, r.N, r.K, r.M))
    lines = ",\n".join(f"  {json.dumps(row.model_dump())}" for row in rows)
    head["vllm"] = [row.model_dump() for row in table.vllm]
    text = json.dumps(head, indent=1)[:-2] + f',\n "plans": [\n{lines}\n ]\n}}\n'
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def file_name(device: str) -> str:
    """`NVIDIA H100 80GB HBM3` to `nvidia-h100-80gb-hbm3.json`."""
    return "-".join("".join(c if c.isalnum() else " " for c in device.lower()).split()) + ".json"
