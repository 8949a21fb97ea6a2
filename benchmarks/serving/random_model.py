"""A Qwen2-VL with random weights and the decoder of Qwen2-0.5B, for measurements of speed and memory only.

    python -m benchmarks.serving.random_model OUT

Writes OUT/bf16 and, rounded to nearest, OUT/w4, OUT/w3 and OUT/w2. Tokenizer and processor are those of the tiny
example model, with more words; the vocabulary has 32,000 of them, so that the decoder is most of the model, as it is
in larger ones.
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file

from vlmq_serve.calibrate.pipeline import calibrate
from vlmq_serve.calibrate.recipe import make_recipe
from vlmq_serve.cli.console import RichProgress

TINY = Path(__file__).resolve().parents[2] / "examples" / "tiny-qwen2vl"
VOCABULARY = 32_000
DECODER = {  # Qwen2-0.5B
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "vocab_size": VOCABULARY,
}
LAYERS = ["full_attention"] * DECODER["num_hidden_layers"]
ROPE = {"mrope_section": [8, 12, 12], "rope_theta": 1e6, "rope_type": "default"}  # halves of a head of 64
GROUP = 128


def main() -> None:
    """Write the model and its rounded forms."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--bits", type=int, nargs="*", default=[4, 3, 2])
    options = parser.parse_args()
    source = options.out / "bf16"
    if not source.exists():
        write_random_model(source)
    for bits in options.bits:
        target = options.out / f"w{bits}"
        if not target.exists():
            with RichProgress() as progress:
                recipe = make_recipe(method="rtn", bits=bits, group_size=GROUP)
                calibrate(str(source), target, None, recipe, resume=False, progress=progress)


def write_random_model(folder: Path) -> None:
    """Write config, tokenizer, processor and random bf16 weights (seed 0)."""
    config = json.loads((TINY / "config.json").read_text(encoding="utf-8"))
    config["text_config"].update(DECODER, layer_types=LAYERS, rope_parameters=ROPE)
    config["vision_config"]["hidden_size"] = DECODER["hidden_size"]
    shutil.copytree(TINY, folder, ignore=shutil.ignore_patterns("*.safetensors", "README.md"))
    (folder / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    _widen_tokenizer(folder / "tokenizer.json")
    with torch.device("meta"):
        model = transformers.Qwen2VLForConditionalGeneration(transformers.AutoConfig.from_pretrained(folder))
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: _random(name, tensor, generator)
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight"  # tied to the embeddings
    }
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def _random(name: str, tensor: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    if "norm" in name or "ln_q" in name:
        return (torch.ones if name.endswith("weight") else torch.zeros)(tensor.shape, dtype=torch.bfloat16)
    return (torch.randn(tensor.shape, generator=generator) * 0.02).bfloat16()


def _widen_tokenizer(path: Path) -> None:
    """Words for every id, so that any token that the random model says can be shown."""
    tokenizer: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    taken = {*vocabulary.values(), *(token["id"] for token in tokenizer["added_tokens"])}
    vocabulary.update({f"w{index}": index for index in range(VOCABULARY) if index not in taken})
    path.write_text(json.dumps(tokenizer), encoding="utf-8")


if __name__ == "__main__":
    main()
