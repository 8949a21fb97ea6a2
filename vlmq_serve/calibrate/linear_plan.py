"""What will be done to one linear, and which scheme fits it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from vlmq_serve.format.errors import VLMQError
from vlmq_serve.format.headers import TensorInfo
from vlmq_serve.format.scheme import Scheme, tensor_shapes

SCALE_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
_ITEM_BYTES = {"qweight": 4, "zeros": 1}
Unfit = Literal["error", "ignore", "group"]


@dataclass(frozen=True)
class LinearPlan:
    """One linear: `name` as in the source's files, `local` within its decoder layer or vision tower.

    scheme None: left as it is, for the `reason` given, if it is not the recipe's ignore list. `tensor`: of the source,
    where it is not the linear's own (a head that is tied to the embeddings). `layer`: its record in the work folder.
    `dtype`: of the source's tensor; `scales_dtype`: None for the same.
    """

    name: str
    layer: int
    local: str
    shape: tuple[int, int]
    dtype: torch.dtype
    scheme: Scheme | None
    reason: str = ""
    tied_to: str = ""
    scales_dtype: torch.dtype | None = None

    @property
    def stored_dtype(self) -> torch.dtype:
        """The dtype in which the checkpoint stores the scales."""
        return self.scales_dtype or self.dtype

    @property
    def tensor(self) -> str:
        """The tensor of the source that holds the weight."""
        return self.tied_to or f"{self.name}.weight"

    @property
    def bytes_before(self) -> int:
        return 0 if self.tied_to else self.dense_bytes

    @property
    def bytes_after(self) -> int:
        if self.scheme is None:
            return self.bytes_before
        shapes = tensor_shapes(self.scheme, *self.shape)
        return sum(n * k * _ITEM_BYTES.get(suffix, self.stored_dtype.itemsize) for suffix, (n, k) in shapes.items())

    @property
    def dense_bytes(self) -> int:
        return self.shape[0] * self.shape[1] * self.dtype.itemsize


def plan_linear(
    tensors: Mapping[str, TensorInfo],
    name: str,
    layer: int,
    local: str,
    scheme: Scheme | None,
    unfit: Unfit,
    tied_to: str = "",
) -> LinearPlan:
    """Plan of the linear `name`; a tensor that is missing or of another kind is a `VLMQError`."""
    tensor = tied_to or f"{name}.weight"
    info = tensors.get(tensor)
    if info is None:
        raise VLMQError(f"{tensor}: not among the model's tensors; the checkpoint is incomplete")
    if info.dtype not in SCALE_DTYPES or len(info.shape) != 2:
        raise VLMQError(f"{tensor}: got {info.dtype} {info.shape}, allowed 2-d {sorted(SCALE_DTYPES)}")
    fitting, reason = fit_scheme(name, info.shape[1], scheme, unfit)
    shape, dtype = (info.shape[0], info.shape[1]), SCALE_DTYPES[info.dtype]
    return LinearPlan(name, layer, local, shape, dtype, fitting, reason, tied_to)


def fit_scheme(name: str, in_features: int, scheme: Scheme | None, unfit: Unfit) -> tuple[Scheme | None, str]:
    """The scheme to use for K inputs, or None with the reason; `unfit` says what becomes of those that do not fit."""
    if scheme is None:
        return None, ""
    try:
        scheme.num_groups(in_features)
    except VLMQError as error:
        if unfit == "error":
            raise VLMQError(f"{name}: {error}") from None
        smaller = scheme.fitted(in_features) if unfit == "group" else None
        return smaller, "" if smaller else f"K={in_features} does not fit {scheme}"
    return scheme, ""
