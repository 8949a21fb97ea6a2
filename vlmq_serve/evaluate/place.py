"""Where a model is evaluated, and in which dtype: parts of a result, as answers and divergences depend on them."""

import gc
from dataclasses import dataclass

import torch

from vlmq_serve.calibrate.loading import choose_device, choose_dtype

_SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass(frozen=True)
class Place:
    """A device and the dtype of weights and activations on it."""

    device: torch.device
    dtype: torch.dtype

    @classmethod
    def choose(cls, device: str = "auto", dtype: str = "auto") -> "Place":
        """From the words of the command line, which mean what a recipe's `device` and `dtype` mean."""
        chosen = choose_device(device)
        return cls(chosen, choose_dtype(dtype, chosen))

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def __str__(self) -> str:
        return f"{_SHORT[self.dtype]} on {self.device}"


FP32_ON_CPU = Place(torch.device("cpu"), torch.float32)


def free_memory() -> None:
    """Give back what a model has held, also to the GPU, where other processes may need it."""
    gc.collect()  # modules with hooks are in reference cycles
    torch.cuda.empty_cache()
