"""Calibration seeds that really differ: a seed is nothing but the draw of chats, so equal draws are one calibration."""

from collections.abc import Sequence
from itertools import combinations
from statistics import fmean

from vlmq_serve.calibrate.samples import draw
from vlmq_serve.evaluate.quality.variants import Variant
from vlmq_serve.format.errors import VLMQError


def check_seeds(variants: Sequence[Variant], available: int, file: str) -> None:
    """Raise `VLMQError` where two seeds of a method draw the same of the `available` chats in `file`."""
    for group in _by_method(variants):
        samples = group[0][1]
        draws: dict[tuple[int, ...], int] = {}
        for variant, count in group:
            first = draws.setdefault(tuple(draw(available, count, variant.seed)), variant.seed)
            if first != variant.seed:
                raise VLMQError(
                    f"seed: got {first} and {variant.seed} for {variant.label}, which draw the same "
                    f"{min(samples, available)} of the {available} chats in {file} and would be one calibration "
                    f"counted twice; use fewer samples than {available}, a larger file, or one seed"
                )


def mean_overlap(variants: Sequence[Variant], available: int) -> float | None:
    """Share of chats that two draws of one method have in common, mean over pairs of seeds; None with one seed."""
    shares = []
    for group in _by_method(variants):
        draws = [set(draw(available, count, variant.seed)) for variant, count in group]
        shares += [len(a & b) / len(a) for a, b in combinations(draws, 2)]
    return fmean(shares) if shares else None


def _by_method(variants: Sequence[Variant]) -> list[list[tuple[Variant, int]]]:
    """Variants that differ in their seed only, each with its number of samples."""
    groups: dict[tuple[str, str], list[tuple[Variant, int]]] = {}
    for variant in variants:
        if variant.recipe is not None and variant.recipe.needs_data:
            groups.setdefault((variant.label, variant.scheme), []).append((variant, variant.recipe.samples))
    return list(groups.values())
