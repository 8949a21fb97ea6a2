"""Builds .venv with torch, vLLM and this package. `make setup` calls it; docs/setup.md explains every step.

On a machine with a working `nvidia-smi` the `cuda` extra is installed, elsewhere the `cpu` extra. Only .venv is
written. A second run ends at once: a stamp in .venv holds the hash of everything this depends on.

Standard library only, because it runs before anything is installed.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from standins import AUDIO_AND_VIDEO, VISION_OPS, StandIn, build_wheel, command_standin

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / "vlmq-setup.stamp"
LOG = VENV / "vlmq-setup.log"

TORCH, TORCHVISION, VLLM = "2.13.0", "0.28.0", "0.32.0"  # the pins of the `cpu` extra
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
STEP_SECONDS = 1800
FREE_GIB = {"cpu": 6, "cuda": 20}


class SetupError(Exception):
    """What went wrong and what to do, in one message."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--kind", choices=("auto", "cpu", "cuda"), default="auto", help="which vLLM to install")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and change nothing")
    arguments = parser.parse_args()
    try:
        check_python()
        kind = detect_kind() if arguments.kind == "auto" else arguments.kind
        if arguments.dry_run:
            print(f"kind: {kind}\nvenv: {VENV}\nfinal step: {' '.join(project_command(kind))}")
            return 0
        if STAMP.exists() and STAMP.read_text() == fingerprint(kind):
            return 0
        install(kind)
    except SetupError as error:
        print(f"setup failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("setup interrupted; run `make setup` again to go on", file=sys.stderr)
        return 130
    return 0


def check_python() -> None:
    if sys.version_info < (3, 11):  # noqa: UP036 - this file runs with whatever `python3` is
        found = ".".join(map(str, sys.version_info[:3]))
        raise SetupError(f"python3 is {found}, needed is 3.11 or newer; run `make setup PYTHON=python3.11`")
    if not sys.platform.startswith("linux"):
        raise SetupError(f"the platform is {sys.platform}, vLLM runs on linux; use a Linux machine or container")


def detect_kind() -> str:
    """ "cuda" where `nvidia-smi` exists and succeeds, else "cpu"."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return "cpu"
    try:
        result = subprocess.run([program, "-L"], capture_output=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return "cpu"
    return "cuda" if result.returncode == 0 and b"GPU" in result.stdout else "cpu"


def fingerprint(kind: str) -> str:
    """Hash of all that decides what .venv must hold; it changes when the folder moves, because scripts hold paths."""
    digest = hashlib.sha256(f"{kind}|{sys.version}|{ROOT}".encode())
    for path in [ROOT / "pyproject.toml", *sorted(HERE.glob("*.py"))]:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def install(kind: str) -> None:
    started = time.monotonic()
    need, free = FREE_GIB[kind], shutil.disk_usage(ROOT).free / 2**30
    if not PYTHON.exists() and free < need:
        raise SetupError(f"{free:.1f} GiB free here, needed are {need} GiB; free some space")
    print(f"setup: building .venv for {kind} (a few minutes the first time; details in {LOG.relative_to(ROOT)})")
    make_venv()
    if kind == "cpu":
        install_cpu_parts()
    step("this package, vLLM and the tools", project_command(kind))
    if kind == "cpu":
        repair_torchvision()
    step("check: imports", [str(PYTHON), "-c", "import torch, torchvision, transformers, vlmq_serve"], 300)
    step("check: vllm --version", [str(VENV / "bin" / "vllm"), "--version"], 600)
    STAMP.write_text(fingerprint(kind))
    print(f"setup: done in {time.monotonic() - started:.0f} s")


def make_venv() -> None:
    if PYTHON.exists() and run("use the .venv that is there", [str(PYTHON), "-m", "pip", "--version"]) == 0:
        STAMP.unlink(missing_ok=True)
        return
    try:
        subprocess.run(
            [sys.executable, "-m", "venv", "--clear", str(VENV)], check=True, timeout=300, capture_output=True
        )
    except (subprocess.SubprocessError, OSError) as error:
        raise SetupError(
            f"`{sys.executable} -m venv` failed ({error}); on Debian and Ubuntu install the package python3-venv"
        ) from error


def install_cpu_parts() -> None:
    """Everything pip would otherwise take in a build for CUDA: stand-ins first, then torch and torchvision.

    `==X+cpu` matches CPU builds only, so no CUDA package can be chosen by accident.
    """
    install_standins(*AUDIO_AND_VIDEO, command_standin(VLLM))
    torch, vision = f"torch=={TORCH}+cpu", f"torchvision=={TORCHVISION}+cpu"
    index: list[str] = []
    if run("torch for CPU, from pip's configured sources", pip("install", torch)) != 0:
        index = ["--extra-index-url", TORCH_CPU_INDEX]
        step("torch for CPU, from PyTorch's own index", pip("install", torch, *index))
    if run("torchvision for CPU", pip("install", "--no-deps", vision, *index)) != 0:
        step("torchvision as published", pip("install", "--no-deps", f"torchvision=={TORCHVISION}"))


def repair_torchvision() -> None:
    """Declares torchvision's missing operators, if and only if the installed build cannot load without them."""
    run("remove an old stand-in", pip("uninstall", "--yes", VISION_OPS.name))
    if run("import torchvision", [str(PYTHON), "-c", "import torchvision"]) != 0:
        install_standins(VISION_OPS)


def install_standins(*standins: StandIn) -> None:
    with tempfile.TemporaryDirectory() as folder:
        wheels = [str(build_wheel(standin, Path(folder))) for standin in standins]
        names = ", ".join(standin.requirement for standin in standins)
        step(f"stand-ins {names}", pip("install", "--no-deps", "--no-index", "--force-reinstall", *wheels))


def pip(*arguments: str) -> list[str]:
    command, *rest = arguments
    return [str(PYTHON), "-m", "pip", command, "--no-input", "--disable-pip-version-check", *rest]


def project_command(kind: str) -> list[str]:
    return pip("install", "--editable", f"{ROOT}[{kind},eval,bench,peers,dev]")


def step(label: str, command: list[str], seconds: int = STEP_SECONDS) -> None:
    """Runs a command that has to succeed."""
    code = run(label, command, seconds)
    if code != 0:
        tail = "\n    ".join(last_lines(6))
        raise SetupError(
            f"{label}: exit status {code}; the last lines of {LOG}:\n    {tail}\nthen run `make setup` again"
        )


def run(label: str, command: list[str], seconds: int = STEP_SECONDS) -> int:
    """Exit status of a command; its output goes to the log, its last line is shown while it lasts."""
    started = time.monotonic()
    with LOG.open("a") as log:
        log.write(f"\n$ {' '.join(command)}\n")
        log.flush()
        start = log.tell()
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=ROOT)
    try:
        while (code := wait(process)) is None:
            elapsed = time.monotonic() - started
            if elapsed > seconds:
                raise SetupError(f"{label}: not done after {seconds} s; see {LOG}, then run `make setup` again")
            show(f"setup: {label} ... {elapsed:.0f} s  {pip_activity(start)}", final=False)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
    show(f"setup: {label}: {'ok' if code == 0 else 'no'}, {time.monotonic() - started:.0f} s", final=True)
    return code


def wait(process: subprocess.Popen[bytes]) -> int | None:
    try:
        return process.wait(timeout=0.5 if sys.stdout.isatty() else 20)
    except subprocess.TimeoutExpired:
        return None


def last_lines(count: int, start: int = 0) -> list[str]:
    """Last lines of the log that were written after byte `start`."""
    with LOG.open("rb") as log:
        log.seek(max(start, os.fstat(log.fileno()).st_size - 4000))
        lines = [line.strip() for line in log.read().decode(errors="replace").splitlines() if line.strip()]
    return lines[-count:]


def pip_activity(start: int) -> str:
    """What pip is at, from its log: the last line that says so, shortened."""
    verbs = ("Collecting", "Downloading", "Installing", "Building", "Processing")
    return next((line[:70] for line in reversed(last_lines(200, start)) if line.startswith(verbs)), "")


def show(text: str, *, final: bool) -> None:
    if sys.stdout.isatty():
        print(f"\r\033[2K{text}", end="\n" if final else "", flush=True)
    else:
        print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
