"""Parts of the first measurement on a GPU."""

import contextlib
import io
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from benchmarks.serving.random_model import TINY
from vlmq_serve.calibrate.pipeline import calibrate
from vlmq_serve.calibrate.recipe import make_recipe
from vlmq_serve.cli.console import out
from vlmq_serve.evaluate.endpoint import connect, image_url
from vlmq_serve.format.errors import VLMQError

MODEL_TIMEOUT_S = 900


class Clock:
    """Seconds since the start, and how many are left of `seconds`."""

    def __init__(self, seconds: float) -> None:
        self._start = time.monotonic()
        self._seconds = seconds

    def passed(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._start

    def left(self) -> float:
        """Seconds until the time is up; negative after it."""
        return self._seconds - self.passed()


class Log:
    """Lines with the time, on the terminal and in a file, from any thread."""

    def __init__(self, path: Path, clock: Clock) -> None:
        self.clock = clock
        self._path = path

    def __call__(self, text: str) -> None:
        line = f"{self.clock.passed():6.1f} s  {text}"
        out.print(line, markup=False, highlight=False, soft_wrap=True)
        with self._path.open("a", encoding="utf-8") as handle:
            handle.write(line + "\n")

    @contextlib.contextmanager
    def failure(self, what: str) -> Iterator[None]:
        """Whatever fails inside is written down and passed over: the time on the device is worth more."""
        try:
            yield
        except Exception as error:
            self(f"{what}: failed: {type(error).__name__}: {str(error)[-2000:]}")


def put_vllm_on_path() -> None:
    """A `vllm` command where packages were unpacked without their scripts."""
    if shutil.which("vllm") or Path(sys.executable).with_name("vllm").exists():
        return
    script = Path(tempfile.mkdtemp(prefix="vllm-")) / "vllm"
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m vllm.entrypoints.cli.main "$@"\n', encoding="utf-8")
    script.chmod(0o755)
    os.environ["PATH"] = f"{script.parent}{os.pathsep}{os.environ['PATH']}"


def put_nvrtc_on_path() -> None:
    """The compiler that came with torch where child processes find all of it: NVRTC looks for its builtins on the
    library path alone, not beside itself, and Humming calls it in a process of its own."""
    packages = Path(torch.__file__).parents[1] / "nvidia"
    folders = sorted({str(file.parent) for file in packages.glob("*/lib/libnvrtc-builtins.so*")})
    given = os.environ.get("LD_LIBRARY_PATH")
    os.environ["LD_LIBRARY_PATH"] = os.pathsep.join([*([given] if given else []), *folders])


def random_model(folder: Path, size: str, bits: Sequence[int] = (), parts: str = "") -> None:
    """Write FOLDER/bf16, and FOLDER/wBITS for each of `bits`, in a process whose GPU memory goes with it."""
    command = [str(folder), "--size", size, "--parts", parts, "--bits", *map(str, bits)]
    _run("benchmarks.serving.random_model", *command)


def check_answers(folder: Path, bits: int, questions: int, table: Path) -> str:
    """The tiny model that can answer, rounded, served, and compared with transformers: the line of the result."""
    checkpoint = folder / f"tiny-w{bits}g64"
    calibrate(str(TINY), checkpoint, None, make_recipe(method="rtn", bits=bits, group_size=64))
    options = ("--dtypes", "auto", "--questions", str(questions), "--output", str(table))
    _run("benchmarks.quality.serving", str(checkpoint), *options)
    return table.read_text(encoding="utf-8").splitlines()[1]


def _run(module: str, *arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments], capture_output=True, text=True, timeout=MODEL_TIMEOUT_S
    )
    if done.returncode:
        raise VLMQError(f"{module} {arguments}: " + "\n".join((done.stdout + done.stderr).splitlines()[-20:]))


def ask_about_image(base_url: str) -> str:
    """What the server says about a picture of noise, with the tokens that it counted."""
    from PIL import Image

    picture = io.BytesIO()
    Image.effect_noise((448, 448), 80).convert("RGB").save(picture, "PNG")
    content = [
        {"type": "image_url", "image_url": {"url": image_url(picture.getvalue())}},
        {"type": "text", "text": "What is on the picture?"},
    ]
    client, model = connect(base_url)
    messages = [{"role": "user", "content": content}]
    reply = client.chat.completions.create(model=model, messages=messages, max_tokens=16, temperature=0)
    used = reply.usage
    return f"{used.prompt_tokens} tokens with the image, {used.completion_tokens} answered"
