"""A line of results."""

from dataclasses import dataclass

FLOOR = "floor"
"""A variant of this name is a model with next to no weights: what its worker needs is subtracted from the others."""


@dataclass(frozen=True)
class Row:
    """One variant under one load; `load` is empty for a measurement of memory only."""

    variant: str
    load: str
    values: dict[str, float]
