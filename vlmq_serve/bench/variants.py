"""What is served and with which requests."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from vlmq_serve.format.errors import VLMQError

DTYPES = ("auto", "bfloat16", "float16", "float32")
_LOAD = re.compile(r"c(\d+)-p(\d+)-o(\d+)(?:-i(\d+)(?:x(\d+))?)?(?:-r(\d+(?:\.\d+)?))?(?:-n(\d+))?")


@dataclass(frozen=True)
class Variant:
    """One model to serve: a short name, its folder, the dtype of its activations and arguments of `vllm serve`."""

    name: str
    folder: Path
    dtype: str = "auto"
    arguments: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str) -> "Variant":
        """Read `NAME=FOLDER` or `NAME=FOLDER@DTYPE`."""
        name, equals, rest = text.partition("=")
        path, _, dtype = rest.partition("@")
        if not equals or not name or not path:
            raise VLMQError(f"variant: got {text!r}, expected NAME=FOLDER or NAME=FOLDER@DTYPE, such as w4=./out-w4")
        if (dtype or "auto") not in DTYPES:
            raise VLMQError(f"variant {name}: got dtype {dtype!r}, allowed {list(DTYPES)}")
        if not (Path(path) / "config.json").is_file():
            raise VLMQError(f"variant {name}: {path} is not a model folder (it has no config.json)")
        return cls(name, Path(path), dtype or "auto")


def with_arguments(variants: Sequence[Variant], texts: Sequence[str]) -> list[Variant]:
    """The variants with arguments of `vllm serve`: `--flag=value` goes to all, `NAME:--flag=value` to one."""
    names = [variant.name for variant in variants]
    if len(set(names)) < len(names):
        raise VLMQError(f"variants: got the names {names}, each must be different")
    given: dict[str, list[str]] = {name: [] for name in names}
    for text in texts:
        name, colon, rest = text.partition(":")
        single = bool(colon) and not name.startswith("-")
        if single and name not in given:
            raise VLMQError(f"--arg: got {text!r}, but no variant is called {name!r}; the variants are {names}")
        for receiver in [name] if single else names:
            given[receiver].append(rest if single else text)
    return [replace(v, arguments=(*v.arguments, *given[v.name])) for v in variants]


@dataclass(frozen=True)
class Load:
    """Requests of one measurement: random words (and one random image) of fixed length.

    image: width and height in pixels, None for text alone. rate: requests per second in a Poisson process, infinite
    to send as fast as `concurrency` allows. requests: how many in all, 0 for 8 and 4 for each of `concurrency`.
    """

    concurrency: int
    prompt_tokens: int
    output_tokens: int
    image: tuple[int, int] | None = None
    rate: float = math.inf
    requests: int = 0

    @property
    def count(self) -> int:
        """Requests in all."""
        return self.requests or 4 * self.concurrency + 8

    @property
    def shape(self) -> str:
        """What all requests have in common, such as `p128-o64-i448`."""
        image = "" if self.image is None else f"-i{self.image[0]}"
        wide = "" if self.image is None or self.image[0] == self.image[1] else f"x{self.image[1]}"
        return f"p{self.prompt_tokens}-o{self.output_tokens}{image}{wide}"

    @property
    def name(self) -> str:
        """File and row name, such as `c8-p128-o64-i1280x720-r2-n16`."""
        rate = "" if math.isinf(self.rate) else f"-r{self.rate:g}"
        requests = f"-n{self.requests}" if self.requests else ""
        return f"c{self.concurrency}-{self.shape}{rate}{requests}"

    @classmethod
    def parse(cls, text: str) -> "Load":
        """Read a load's `name`."""
        found = _LOAD.fullmatch(text)
        numbers = found.groups() if found else ()
        if not found or any(n is not None and float(n) == 0 for n in numbers):
            raise VLMQError(
                f"load: got {text!r}, expected cCONCURRENCY-pPROMPT_TOKENS-oOUTPUT_TOKENS and, if need be, -iWIDTH or "
                "-iWIDTHxHEIGHT, -rREQUESTS_PER_SECOND, -nREQUESTS, such as c8-p128-o64-i1280x720-r2; none may be zero"
            )
        concurrency, prompt, output, width, height, rate, requests = numbers
        image = (int(width), int(height or width)) if width else None
        return cls(int(concurrency), int(prompt), int(output), image, float(rate or "inf"), int(requests or 0))


SQUARE, WIDE = (448, 448), (1280, 720)
QUICK = (Load(1, 32, 32, requests=3), Load(1, 32, 16, (112, 112), requests=3))
"""A minute per variant on a slow machine: decoding without an image, and one image."""
FULL = (
    *(Load(c, 128, 128) for c in (1, 8, 32)),
    *(Load(c, 64, 64, SQUARE) for c in (1, 8, 32)),
    *(Load(c, 64, 64, WIDE) for c in (1, 8)),
    Load(8, 1024, 128),
    *(Load(32, 64, 64, SQUARE, rate=r, requests=64) for r in (0.5, 2.0, 8.0)),
)
"""What chats with a photo look like, from one user to 32, a long prompt, and three rates of arrival."""
