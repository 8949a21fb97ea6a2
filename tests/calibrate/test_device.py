"""Words for devices and dtypes, on machines with and without GPUs."""

import pytest
import torch

from vlmq_serve.calibrate.loading import choose_dtype, resolve_device
from vlmq_serve.format.errors import VLMQError


@pytest.mark.parametrize(
    ("name", "gpus", "expected"),
    [("auto", 0, "cpu"), ("auto", 2, "cuda"), ("cpu", 2, "cpu"), ("cuda", 1, "cuda"), ("cuda:1", 2, "cuda:1")],
)
def test_devices(name: str, gpus: int, expected: str) -> None:
    assert resolve_device(name, gpus) == torch.device(expected)


@pytest.mark.parametrize(
    ("name", "gpus", "message"),
    [
        ("cuda", 0, "got 'cuda', but torch sees no CUDA device"),
        ("cuda:0", 0, "got 'cuda:0', but torch sees no CUDA device"),
        ("cuda:2", 2, r"got 'cuda:2', but torch sees 2 CUDA device\(s\), cuda:0 to cuda:1"),
        ("gpu", 1, "got 'gpu', allowed auto, cpu, cuda"),
        ("cpu:1", 1, "got 'cpu:1', allowed auto, cpu, cuda"),
        ("meta", 1, "got 'meta', allowed auto, cpu, cuda"),
    ],
)
def test_devices_that_are_not_there(name: str, gpus: int, message: str) -> None:
    with pytest.raises(VLMQError, match=message):
        resolve_device(name, gpus)


def test_dtypes() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda:1")
    assert (choose_dtype("auto", cpu), choose_dtype("auto", cuda)) == (torch.float32, torch.bfloat16)
    for name in ("float32", "bfloat16", "float16"):
        assert choose_dtype(name, cpu) == choose_dtype(name, cuda) == getattr(torch, name)
    with pytest.raises(VLMQError, match="dtype: got 'float64', allowed auto, float32, bfloat16, float16"):
        choose_dtype("float64", cpu)
