"""Whether the hidden states of all samples, and the images that wait to become some, fit into this machine's memory,
before the long work begins."""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from vlmq_serve.calibrate.capture import MAX_PENDING_BYTES
from vlmq_serve.calibrate.vision_clipping import LEARNING_BATCH, LEARNING_SAMPLES
from vlmq_serve.format.errors import VLMQError


def stream_bytes(tokens: int, width: int, itemsize: int) -> int:
    """Two hidden states per token. Positions, masks and what Qwen3-VL adds behind its first layers come on top."""
    return 2 * tokens * width * itemsize


def pending_bytes(sizes: Sequence[tuple[int, int]], batch_tokens: int) -> int:
    """What samples, given by their tokens and bytes, hold at most: those that wait for others of their length
    (`group_by_length`), and one batch more, which lives on while others gather, and of which the model gets a copy."""
    held = [size for _, size in sizes]
    waiting = min(sum(held), MAX_PENDING_BYTES + max(held))
    batch = max(size * max(1, batch_tokens // tokens) for tokens, size in sizes)
    return waiting + min(batch, waiting)


def learning_bytes(sizes: Sequence[int]) -> int:
    """What the samples hold that a simulated vision tower learns from, given by their bytes, with a batch's copy."""
    held = sizes[:LEARNING_SAMPLES]
    return sum(held) + sum(sorted(held)[-LEARNING_BATCH:])


def judge_memory(
    sizes: Sequence[tuple[int, int]],
    batch_tokens: int,
    width: int,
    itemsize: int,
    available: int | None,
    tower_learns: bool = False,
) -> str | None:
    """A remark where samples, given by their tokens and bytes, take more than half of the `available` bytes.

    Raises `VLMQError` where they take more than all of them. None is nothing to say, or an unknown amount.
    `tower_learns`: before there are hidden states, a simulated vision tower learns from some of the samples.
    """
    lengths = [tokens for tokens, _ in sizes]
    streams, pending = stream_bytes(sum(lengths), width, itemsize), pending_bytes(sizes, batch_tokens)
    learning = learning_bytes([size for _, size in sizes]) if tower_learns else 0
    need = max(streams + pending, learning)
    if available is None or 2 * need <= available:
        return None
    parts = f"{_gib(streams)} for hidden states, {_gib(pending)} for images"
    if need == learning:
        parts = f"for the images of {min(len(sizes), LEARNING_SAMPLES)}, from which the vision tower learns"
    samples = (
        f"memory: {len(lengths)} samples with {sum(lengths)} tokens, {max(lengths)} in the longest, need {_gib(need)} "
        f"({parts})"
    )
    if need <= available:
        return f"{samples} of the {_gib(available)} that are free"
    raise VLMQError(
        f"{samples}, {_gib(available)} are free; scale images down (max_pixels), draw fewer chats (samples), "
        "or drop the longest (max_tokens)"
    )


def available_bytes(root: Path = Path("/")) -> int | None:
    """What can be had without swapping, and no more than a container's limit (cgroup v2) leaves; None if not told."""
    try:
        told = dict(line.split(":", 1) for line in (root / "proc/meminfo").read_text().splitlines())
        available = int(told["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None
    group = root / "sys/fs/cgroup"
    with suppress(OSError, KeyError, ValueError):  # without a limit there is no such file, or it says "max"
        limit, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
        kinds = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        available = min(available, limit - used + int(kinds["inactive_file"]))
    return available


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"
