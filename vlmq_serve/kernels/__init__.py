"""Matrix products with 2, 3, 4 and 8-bit weights: Triton on GPUs, our own C++ on CPUs, a plain reference.

Importing this package imports neither Triton nor CUDA and registers no operator; `prepare` does what is needed.
"""

from vlmq_serve.kernels.op import ensure_integer, ensure_registered, gemm
from vlmq_serve.kernels.prepared import PreparedWeight, linear, prepare

__all__ = ["PreparedWeight", "ensure_integer", "ensure_registered", "gemm", "linear", "prepare"]
