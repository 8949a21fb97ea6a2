"""What is served and with which requests."""

import math
from dataclasses import dataclass
from pathlib import Path

from vlmq_serve.format.errors import VLMQError

DTYPES = ("auto", "bfloat16", "float16", "float32")


@dataclass(frozen=True)
class Variant:
    """One model to serve: a short name, its folder, and the dtype of its activations."""

    name: str
    folder: Path
    dtype: str = "auto"

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


@dataclass(frozen=True)
class Load:
    """Requests of one measurement: random words (and one random image of `image` x `image` pixels) of fixed length.

    rate: requests per second, infinite to send as fast as `concurrency` allows.
    """

    concurrency: int
    requests: int
    prompt_tokens: int
    output_tokens: int
    image: int = 0
    rate: float = math.inf

    @property
    def name(self) -> str:
        """File and row name, such as `c8-p128-o64-i448`."""
        rate = "" if math.isinf(self.rate) else f"-r{self.rate:g}"
        return f"c{self.concurrency}-p{self.prompt_tokens}-o{self.output_tokens}-i{self.image}{rate}"


QUICK = (Load(1, 3, 32, 32), Load(1, 3, 32, 16, image=112))
"""A minute per variant on a slow machine: decoding without an image, and one image."""
FULL = (
    *(Load(c, 4 * c + 8, 128, 128) for c in (1, 8, 32)),
    *(Load(c, 4 * c + 8, 64, 64, image=448) for c in (1, 8, 32)),
    *(Load(32, 32, 64, 64, image=448, rate=r) for r in (0.5, 2.0)),
)
"""What chats with a photo look like, from one user to 32, and at two rates of arrival."""
