"""Qwen2-VL with random weights in the shapes of a real size, for measurements of speed and memory only.

    python -m benchmarks.serving.random_model OUT --size 2b

Writes OUT/bf16 and, rounded to nearest, OUT/w4, OUT/w3 and OUT/w2; with `--parts w8` instead OUT/w4-all and so on, with
head, embeddings and vision tower at 8 bits. What is there already stays. Sizes 2b and 7b are those of the Hub's
Qwen2-VL with its vision tower; 0.5b is Qwen2-0.5B's decoder with 32,000 words and the tiny vision tower of the example
model, so that the decoder is most of it. Tokenizer and processor are those of the example model, with more words. One
layer is in memory at a time.
"""

import argparse
import json
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.serving.sizes import SIZES, Size
from vlmq_serve.calibrate.pipeline import calibrate
from vlmq_serve.calibrate.recipe import make_recipe
from vlmq_serve.cli.console import RichProgress, one_line_errors
from vlmq_serve.format.headers import INDEX_FILE
from vlmq_serve.format.tensor_file import save_tensors

TINY = Path(__file__).resolve().parents[2] / "examples" / "tiny-qwen2vl"
GROUP = 128
LAYERS = "model.language_model.layers."


@one_line_errors
def main() -> None:
    """Write the model and its rounded forms."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--size", choices=[*SIZES], default="0.5b")
    parser.add_argument("--bits", type=int, nargs="*", default=[4, 3, 2])
    parser.add_argument("--parts", default="", help="Scheme of the other parts too: w8; adds -all to the names.")
    options = parser.parse_args()
    source = options.out / "bf16"
    if not source.exists():
        write_random_model(source, SIZES[options.size])
    parts = dict.fromkeys(("lm_head", "embeddings", "vision"), options.parts) if options.parts else {}
    for bits in options.bits:
        target = options.out / (f"w{bits}-all" if parts else f"w{bits}")
        if not target.exists():
            with RichProgress() as progress:
                recipe = make_recipe(method="rtn", bits=bits, group_size=GROUP, **parts)
                calibrate(str(source), target, None, recipe, resume=False, progress=progress)


def write_random_model(folder: Path, size: Size) -> None:
    """Write config, tokenizer, processor and random bf16 weights, the same ones every time on one kind of device."""
    staging = folder.with_name(folder.name + ".writing")
    shutil.rmtree(staging, ignore_errors=True)
    shutil.copytree(TINY, staging, ignore=shutil.ignore_patterns("*.safetensors", "README.md"))
    for name, update in {"config.json": size.config, "preprocessor_config.json": size.processor}.items():
        content = json.loads((TINY / name).read_text(encoding="utf-8"))
        (staging / name).write_text(json.dumps(update(content), indent=1), encoding="utf-8")
    _widen_tokenizer(staging / "tokenizer.json", size.vocabulary)
    weight_map: dict[str, str] = {}
    for shard, shapes in _shards(staging, size):
        save_tensors({name: _random(name, shape) for name, shape in shapes.items()}, staging / shard, {"format": "pt"})
        weight_map.update(dict.fromkeys(shapes, shard))
    index = {"metadata": {}, "weight_map": weight_map}
    (staging / INDEX_FILE).write_text(json.dumps(index, indent=1), encoding="utf-8")
    staging.rename(folder)


def shapes_of(folder: Path, size: Size) -> dict[str, torch.Size]:
    """Names and shapes of all tensors of the model that config.json in `folder` describes."""
    with torch.device("meta"):
        model = transformers.Qwen2VLForConditionalGeneration(transformers.AutoConfig.from_pretrained(folder))
    tied = {"lm_head.weight"} if size.tied else set()
    return {name: tensor.shape for name, tensor in model.state_dict().items() if name not in tied}


def _shards(folder: Path, size: Size) -> Iterator[tuple[str, dict[str, torch.Size]]]:
    """File names, and the tensors in each: a decoder layer, the vision tower, everything else."""
    files: dict[str, dict[str, torch.Size]] = {}
    for name, shape in shapes_of(folder, size).items():
        part = name.removeprefix(LAYERS).partition(".")[0].zfill(2) if name.startswith(LAYERS) else "others"
        part = "vision" if ".visual." in name else part
        files.setdefault(f"model-{part}.safetensors", {})[name] = shape
    yield from files.items()


def _random(name: str, shape: torch.Size) -> torch.Tensor:
    if "norm" in name or "ln_q" in name:
        return (torch.ones if name.endswith("weight") else torch.zeros)(shape, dtype=torch.bfloat16)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))
    return (torch.randn(shape, generator=generator, device=device) * 0.02).bfloat16().cpu()


def _widen_tokenizer(path: Path, words: int) -> None:
    """Words for every id, so that any token that the random model says can be shown."""
    tokenizer: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    taken = {*vocabulary.values(), *(token["id"] for token in tokenizer["added_tokens"])}
    vocabulary.update({f"w{index}": index for index in range(words) if index not in taken})
    path.write_text(json.dumps(tokenizer), encoding="utf-8")


if __name__ == "__main__":
    main()
