"""The vLLM quantization method "vlmq". Importing this package does not import vLLM; registering does."""


def register_with_vllm() -> None:
    """Register `VLMQConfig` under the name "vlmq", once per process."""
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, register_quantization_config

    from vlmq_serve.format.config import QUANT_METHOD

    if QUANT_METHOD in QUANTIZATION_METHODS:
        return
    from vlmq_serve.quant_methods.config import VLMQConfig

    register_quantization_config(QUANT_METHOD)(VLMQConfig)
