"""What the user asks of one start of vLLM, and what is no property of the checkpoint: backend and kernel.

By environment variable, or with `vllm serve CKPT --hf-overrides '{"vlmq_kernel": "cpu_int8"}'`; the environment wins.
"""

import os
from collections.abc import Sequence
from typing import Any

from vlmq_serve.format.errors import VLMQError
from vlmq_serve.kernels import choice

BACKEND_ENVIRONMENT, BACKEND_OVERRIDE = "VLMQ_BACKEND", "vlmq_backend"
KERNEL_OVERRIDE = "vlmq_kernel"
AUTO, TRITON, VLLM = "auto", "triton", "vllm"
BACKENDS = (AUTO, TRITON, VLLM)


def read_backend(hf_config: Any = None) -> str:
    """One of `BACKENDS`. Raises `VLMQError` for an unknown one."""
    return _read(BACKEND_ENVIRONMENT, BACKEND_OVERRIDE, BACKENDS, hf_config) or AUTO


def read_kernel(hf_config: Any = None) -> str | None:
    """One of `choice.PATHS`, or None for the automatic choice. Raises `VLMQError` for an unknown one."""
    return _read(choice.ENVIRONMENT, KERNEL_OVERRIDE, choice.PATHS, hf_config)


def _read(environment: str, override: str, allowed: Sequence[str], hf_config: Any) -> str | None:
    from_environment = os.environ.get(environment) or None
    name: str | None = from_environment or getattr(hf_config, override, None) or None
    if name is not None and name not in allowed:
        where = environment if from_environment else f"--hf-overrides {override}"
        raise VLMQError(f"{where}: got {name!r}, allowed {list(allowed)}; leave it out for the automatic choice")
    return name
