"""What the user asks of one start of vLLM: backend (its values: see `backend`) and kernel.

By environment variable, or with `vllm serve CKPT --hf-overrides '{"vlmq_kernel": "cpu_int8"}'`; the environment wins.
vLLM puts overrides into the model's config, so a line of config.json is one too.
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


def read_options(hf_config: Any = None) -> tuple[str, str | None]:
    """(one of `BACKENDS`, one of `choice.PATHS` or None for the automatic choice).

    Raises `VLMQError` for an unknown name, and for a kernel of ours on vLLM's backend. A kernel that is asked for also
    serves the layers that a table would leave to vLLM.
    """
    backend = _read(BACKEND_ENVIRONMENT, BACKEND_OVERRIDE, BACKENDS, hf_config) or AUTO
    kernel = _read(choice.ENVIRONMENT, KERNEL_OVERRIDE, choice.PATHS, hf_config)
    if kernel is not None and backend == VLLM:
        raise VLMQError(f"kernel: got {kernel!r} on backend {VLLM!r}, where vLLM chooses; leave one of them out")
    return (TRITON if kernel is not None else backend), kernel


def _read(environment: str, override: str, allowed: Sequence[str], hf_config: Any) -> str | None:
    from_environment = os.environ.get(environment) or None
    name: str | None = from_environment or getattr(hf_config, override, None) or None
    if name is not None and name not in allowed:
        where = environment if from_environment else f"{override} (--hf-overrides or config.json)"
        raise VLMQError(f"{where}: got {name!r}, allowed {list(allowed)}; leave it out for the automatic choice")
    return name
