"""vLLM engines, as the tests of the quantization method start them."""

from tests.quant_methods.conftest import engine

__all__ = ["engine"]
