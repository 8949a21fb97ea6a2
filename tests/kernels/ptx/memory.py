"""Global and shared memory: every access must be aligned and inside; what nobody wrote is NaN in every float type.

Both count what an access costs: sectors of 32 bytes in global memory, and in shared memory wavefronts, that is turns
in which each of the 32 banks gives one word of 4 bytes.
"""

from collections import Counter

import numpy as np

from tests.kernels.ptx.registers import UNWRITTEN

SPACE = 40
"""Bits of an address inside one array of global memory; those above number the array."""
SECTOR, BANKS, WORD = 32, 32, 4


class Traffic:
    """By kind of access: what it cost, and the least that as many bytes could cost."""

    def __init__(self) -> None:
        self.cost: Counter[str] = Counter()
        self.least: Counter[str] = Counter()

    def add(self, kind: str, cost: int, least: int) -> None:
        self.cost[kind] += cost
        self.least[kind] += least

    def ratio(self, kind: str) -> float:
        """1 where no access costs more than it must."""
        return self.cost[kind] / self.least[kind]


def _places(addresses: np.ndarray, size: int, limit: int, where: str) -> np.ndarray:
    if (addresses % size).any():
        raise IndexError(f"{where}: {size} bytes at {addresses[addresses % size != 0][0]}, which is not aligned")
    if (addresses + size > limit).any():
        raise IndexError(f"{where}: {size} bytes at {addresses.max()}, outside of {limit}")
    return addresses[:, None].astype(np.int64) + np.arange(size)


class Global:
    """Arrays of bytes, each in an address range of its own."""

    def __init__(self) -> None:
        self.arrays: list[np.ndarray] = [np.empty(0, np.uint8)]
        self.traffic = Traffic()

    def add(self, data: np.ndarray) -> int:
        """Address of an array, which is used in place."""
        self.arrays.append(data.reshape(-1).view(np.uint8))
        return len(self.arrays) - 1 << SPACE

    def _find(self, addresses: np.ndarray, size: int, kind: str) -> tuple[np.ndarray, np.ndarray]:
        numbers = addresses >> np.uint64(SPACE)
        if (numbers != numbers[0]).any() or not 0 < numbers[0] < len(self.arrays):
            raise IndexError(f"global memory: no array at {addresses}")
        array = self.arrays[int(numbers[0])]
        places = _places(addresses & np.uint64(2**SPACE - 1), size, array.size, "global memory")
        sectors = np.unique(places // SECTOR).size
        self.traffic.add(kind, sectors, -(-np.unique(places).size // SECTOR))
        return array, places

    def load(self, addresses: np.ndarray, size: int, kind: str = "load") -> np.ndarray:
        """uint8 [lanes, size]."""
        array, places = self._find(addresses, size, kind)
        return array[places]

    def store(self, addresses: np.ndarray, data: np.ndarray) -> None:
        """data uint8 [lanes, size]."""
        array, places = self._find(addresses, data.shape[1], "store")
        array[places] = data


class Shared:
    """The shared memory of one program."""

    def __init__(self, size: int) -> None:
        self.data = np.full(size, UNWRITTEN, np.uint8)
        self.traffic = Traffic()

    def load(self, addresses: np.ndarray, size: int, kind: str = "load") -> np.ndarray:
        """uint8 [lanes, size]."""
        self._count(addresses, size, kind)
        return self.data[_places(addresses, size, self.data.size, "shared memory")]

    def store(self, addresses: np.ndarray, data: np.ndarray, kind: str = "store") -> None:
        """data uint8 [lanes, size]."""
        self._count(addresses, data.shape[1], kind)
        self.data[_places(addresses, data.shape[1], self.data.size, "shared memory")] = data

    def _count(self, addresses: np.ndarray, size: int, kind: str) -> None:
        # 8 bytes a lane are served to half a warp at a time, 16 to a quarter.
        lanes = 32 * WORD // max(size, WORD)
        for first in range(0, addresses.size, lanes):
            part = addresses[first : first + lanes, None].astype(np.int64) + np.arange(0, size, WORD)
            words = np.unique(part // WORD)
            self.traffic.add(kind, int(np.bincount(words % BANKS).max()), -(-words.size // BANKS))
