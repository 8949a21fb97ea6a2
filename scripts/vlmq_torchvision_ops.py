"""Declares the two torchvision operators whose absence makes `import torchvision` fail beside torch+cpu.

The public torchvision wheel is compiled for CUDA, so next to torch+cpu its library does not load. torchvision
tolerates that, except that it registers fake implementations of `nms` and `qnms`, which must exist for that:
"RuntimeError: operator torchvision::nms does not exist". Declaring their schemas is enough; the image transforms
that Qwen2-VL needs are plain Python over torch. Calling `nms` still fails, as it should: nothing here uses it.

`scripts/setup_env.py` installs this file as the wheel `vlmq-torchvision-ops`, only where it is needed.
"""

import torch

_LIBRARIES: list[torch.library.Library] = []  # a library that is collected takes its operators with it


def declare() -> None:
    """Entry point of the group `torch.backends`: torch calls it at the end of its own import. Idempotent."""
    if _LIBRARIES:
        return
    library = torch.library.Library("torchvision", "FRAGMENT")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _LIBRARIES.append(library)
