"""The entry point that vLLM calls in each of its processes (group `vllm.general_plugins`, name `vlmq`)."""


def register() -> None:
    """Make vLLM know the quantization method "vlmq". Idempotent; vLLM is imported here and not at the top."""
    from vlmq_serve.quant_methods import register_with_vllm

    register_with_vllm()
