"""How much memory a calibration will take, roughly, from its plan alone; `stream_memory` knows the data as well."""

from collections import Counter
from collections.abc import Sequence

from vlmq_serve.calibrate.linear_plan import LinearPlan
from vlmq_serve.calibrate.loading import choose_device, choose_dtype
from vlmq_serve.calibrate.plan import Plan
from vlmq_serve.calibrate.rounding import ROWS_AT_ONCE
from vlmq_serve.calibrate.stream_memory import stream_bytes
from vlmq_serve.format.headers import read_tensor_index

_ASSUMED_TOKENS = 512  # known only once the images have been read
# Measured: Python with torch, with transformers on top, and what rounding a weight takes beside it.
_TORCH_BYTES = 240 * 2**20
_TRANSFORMERS_BYTES = 360 * 2**20
_ROUNDING_BYTES = 30


def assumed_tokens(plan: Plan) -> int:
    """Tokens of a sample in `estimate_bytes`."""
    return plan.recipe.max_tokens or _ASSUMED_TOKENS


def estimate_bytes(plan: Plan, with_data: bool) -> int:
    """Peak memory. With data: weights, both hidden-state streams (of `assumed_tokens` a sample), solver matrices or a
    part beside the decoder that is rounded. Without: the largest layer or part, or the largest file that is written."""
    if not with_data:
        rounded = max(map(_rounding_bytes, (*_layers(plan), *plan.parts)))
        return _TORCH_BYTES + max(rounded, _largest_file(plan))
    item = choose_dtype(plan.recipe.dtype, choose_device(plan.recipe.device)).itemsize
    streams = stream_bytes(plan.recipe.samples * assumed_tokens(plan), plan.linears[0].shape[1], item)
    widest = max(linear.shape[1] for linear in plan.linears)
    weights = plan.bytes_before // plan.linears[0].dtype.itemsize * item + _second_table(plan) * item
    work = max(6 * 4 * widest**2, *map(_rounding_bytes, plan.parts), 0)
    return _TORCH_BYTES + _TRANSFORMERS_BYTES + weights + streams + work


def _layers(plan: Plan) -> list[tuple[LinearPlan, ...]]:
    return [tuple(linears.values()) for linears in plan.by_layer]


def _rounding_bytes(linears: Sequence[LinearPlan]) -> int:
    """The packed weights of all, and for one of them the source, a second copy of what is packed, and some rows in
    work."""
    chosen = [linear for linear in linears if linear.scheme is not None]
    work = (
        linear.dense_bytes + linear.bytes_after + _ROUNDING_BYTES * min(linear.shape[0], ROWS_AT_ONCE) * linear.shape[1]
        for linear in chosen
    )
    return sum(linear.bytes_after for linear in chosen) + max(work, default=0)


def _largest_file(plan: Plan) -> int:
    """The writer holds one file of the checkpoint at a time."""
    tensors = read_tensor_index(plan.source)
    sizes: Counter[str] = Counter()
    for info in tensors.values():
        sizes[info.file.name] += info.nbytes
    for linear in plan.quantized:
        sizes[tensors[linear.tensor].file.name] += linear.bytes_after - linear.bytes_before
    return max(sizes.values())


def _second_table(plan: Plan) -> int:
    """Numbers of the embeddings that are rounded beside those that a tied head keeps (`round_parts`)."""
    table, head = plan.embeddings, plan.head
    if table is None or table.scheme is None or head is None or not head.tied_to:
        return 0
    return table.shape[0] * table.shape[1]
