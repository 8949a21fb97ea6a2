"""Which numbers of ranks a checkpoint can be split over, from shapes alone (tensor parallelism as vLLM does it)."""

from collections.abc import Mapping
from typing import Any

from vlmq_serve.format.config import QuantizationSpec
from vlmq_serve.format.errors import VLMQError
from vlmq_serve.format.headers import TensorInfo, quantized_modules
from vlmq_serve.format.names import kind_of, part_of_model
from vlmq_serve.format.scheme import WORD_BITS
from vlmq_serve.quant_methods.loading import check_split

COMMON_RANKS = (1, 2, 4, 8)
ROW_PARALLEL = ("o_proj", "down_proj", "out_proj", "fc2", "proj", "linear_fc2", "mlp.2")
"""Last parts of the names of the layers that vLLM cuts along K; all others are cut between output rows."""
SHARED = ("k_proj", "v_proj", "lm_head", "embed_tokens")
"""k and v are copied where there are fewer heads than ranks; the vocabulary is padded to what divides."""


def split_problems(
    tensors: Mapping[str, TensorInfo], spec: QuantizationSpec, config: Mapping[str, Any], ranks: int
) -> list[str]:
    """Why the checkpoint cannot be split over `ranks`, one line per reason and kind of layer; empty when it can."""
    problems = _head_problems(config, ranks)
    seen: set[str] = set()
    for module in quantized_modules(tensors):
        kind = kind_of(module)
        problem = None if kind in seen else _layer_problem(module, tensors[f"{module}.qweight"].shape, spec, ranks)
        if problem is not None:
            seen.add(kind)
            problems.append(problem)
    return problems


def _head_problems(config: Mapping[str, Any], ranks: int) -> list[str]:
    text = config.get("text_config") or config
    heads = text.get("num_attention_heads", ranks)
    shared = text.get("num_key_value_heads") or heads
    problems = []
    if heads % ranks:
        problems.append(f"{heads} attention heads cannot be split over {ranks} ranks")
    if shared % ranks and ranks % shared:
        problems.append(f"{shared} key and value heads can be neither split over nor copied to {ranks} ranks")
    return problems


def _layer_problem(module: str, packed: tuple[int, ...], spec: QuantizationSpec, ranks: int) -> str | None:
    scheme = spec.scheme_for(module)
    # vLLM cuts a language layer always and a vision layer unless --mm-encoder-tp-mode data is given.
    if scheme is None or part_of_model(module) == "vision":
        return None
    rows, columns = packed[0], packed[1] * WORD_BITS // scheme.bits
    if not _ends_with(module, ROW_PARALLEL):
        return None if rows % ranks == 0 or _ends_with(module, SHARED) else f"{module}: {rows} rows, {ranks} ranks"
    if columns % ranks:
        return f"{module}: K={columns} cannot be split over {ranks} ranks"
    try:
        check_split(module, scheme, columns, columns // ranks)
    except VLMQError as error:
        return str(error)
    return None


def _ends_with(module: str, ends: tuple[str, ...]) -> bool:
    return f".{module}".endswith(tuple(f".{end}" for end in ends))
