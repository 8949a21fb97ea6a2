"""Shapes of Qwen2-VL by name."""

from dataclasses import dataclass
from typing import Any

VISION = {"depth": 32, "embed_dim": 1280, "num_heads": 16, "mlp_ratio": 4, "patch_size": 14}
SMALL_VISION = {"depth": 2, "embed_dim": 128, "num_heads": 2, "mlp_ratio": 2, "patch_size": 14}


@dataclass(frozen=True)
class Size:
    """The decoder's numbers; `vision` None keeps the tower of the example model."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    tied: bool
    vision: dict[str, int] | None

    def config(self, base: dict[str, Any]) -> dict[str, Any]:
        """`base`, a config.json of Qwen2-VL, in this size."""
        half = self.hidden // self.heads // 2
        pair = half * 3 // 8
        text = base["text_config"] | {
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "layer_types": ["full_attention"] * self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "max_position_embeddings": 32768,
            "vocab_size": self.vocabulary,
            "tie_word_embeddings": self.tied,
            "rope_parameters": {
                "mrope_section": [half - 2 * pair, pair, pair], "rope_theta": 1e6, "rope_type": "default",
            },
        }  # fmt: skip
        vision = base["vision_config"] | {"hidden_size": self.hidden} | (self.vision or {})
        return base | {"text_config": text, "vision_config": vision, "tie_word_embeddings": self.tied}

    def processor(self, base: dict[str, Any]) -> dict[str, Any]:
        """`base`, a preprocessor_config.json, for the vision tower: up to 1280 x 784 pixels in full resolution."""
        if self.vision is None:
            return base
        pixels = {"shortest_edge": 4 * 28 * 28, "longest_edge": 1280 * 28 * 28}
        return base | {"patch_size": self.vision["patch_size"], "size": pixels}


SIZES = {
    "mini": Size(256, 512, 2, 4, 2, 2048, True, SMALL_VISION),
    "0.5b": Size(896, 4864, 24, 14, 2, 32_000, True, None),
    "2b": Size(1536, 8960, 28, 12, 2, 151_936, True, VISION),
    "7b": Size(3584, 18944, 28, 28, 4, 152_064, False, VISION),
}
