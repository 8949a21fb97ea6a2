"""Packed weights of the layers that are done, by name."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from safetensors import safe_open

from vlmq_serve.calibrate.plan import Plan
from vlmq_serve.format.weight import PackedWeight


class PackedLayers(Mapping[str, PackedWeight]):
    """Packed weights of all quantized linears by name, read from the work folder when asked for."""

    def __init__(self, plan: Plan, path_of: Callable[[int], Path]) -> None:
        self._linears = {linear.name: linear for linear in plan.quantized}
        self._path_of = path_of

    def __len__(self) -> int:
        return len(self._linears)

    def __iter__(self) -> Iterator[str]:
        return iter(self._linears)

    def __contains__(self, name: object) -> bool:
        return name in self._linears

    def __getitem__(self, name: str) -> PackedWeight:
        linear = self._linears[name]
        scheme = linear.scheme
        if scheme is None:
            raise KeyError(name)
        with safe_open(self._path_of(linear.layer), framework="pt") as file:
            zeros = None if scheme.symmetric else file.get_tensor(f"{name}.zeros")
            return PackedWeight(file.get_tensor(f"{name}.qweight"), file.get_tensor(f"{name}.scales"), zeros, scheme)
