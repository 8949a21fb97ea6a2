"""What the user may set of a calibration: the keys of a recipe file, their defaults and meanings."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from vlmq_serve.calibrate.simulation import ActivationRange, parse_setting
from vlmq_serve.format.scheme import Scheme

Method = Literal["rtn", "awq", "mbq", "tlq", "qvlm", "gptq", "gptaq", "vlmq"]
ImportanceSource = Literal["attention", "attention_heads", "layer", "cross_entropy"]

SMALLEST_IMAGE = 32 * 32
"""Pixels that become one vision token of Qwen3-VL; of the other families' they are less."""


class SchemeOverride(BaseModel):
    """Scheme of one module and those below it; what is not given is taken from the recipe."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    bits: int | None = None
    group_size: int | None = None
    symmetric: bool | None = None


class Settings(BaseModel):
    """Settings of one calibration. Names and defaults are the keys of a recipe file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: Method = Field("vlmq", description="rtn needs no data, the others do")
    bits: int = Field(4, description="2, 3, 4 or 8; 6 with activation_bits, simulated in 8-bit words")
    group_size: int = Field(128, description="weights that share a scale: 32, 64, 128, or -1 for a whole row")
    symmetric: bool = Field(False, description="fixed zero point 2^(bits-1) instead of one per group")
    overrides: dict[str, SchemeOverride] = Field(
        default_factory=dict, description="other schemes by module name; leading parents may be left out: down_proj"
    )
    lm_head: str | None = Field(
        None, description="scheme of the head, such as w8g128 or w8 (own group size); default: left as it is"
    )
    vision: str | None = Field(
        None, description="scheme of the vision tower's linears, rounded to nearest; default: left as they are"
    )
    embeddings: str | None = Field(
        None,
        description="scheme of the embeddings, rounded to nearest; a tied head needs one too",
    )
    unfit: Literal["error", "ignore", "group"] = Field(
        "error",
        description="linears whose inputs the group size does not divide: an error (in the vision tower: left alone), "
        "left alone, or the next smaller group that fits",
    )
    ignore: tuple[str, ...] | None = Field(
        None, description="modules left as they are; default: the vision tower, what joins it to the decoder, lm_head"
    )
    samples: int = Field(512, ge=1, description="chats drawn from the data file; all of it if it holds fewer")
    seed: int = Field(0, description="of the draw")
    max_tokens: int | None = Field(
        None, ge=1, description="drop longer samples (never cut: vision tokens belong together)"
    )
    max_pixels: int | None = Field(
        None,
        ge=SMALLEST_IMAGE,
        description="scale larger images down before the model's processor sees them, whose own limit stays as it is; "
        "default: that limit alone",
    )
    allow_text_only: bool = Field(False, description="accept chats without an image")
    grid: Literal["minmax", "mse", "diagonal", "output"] = Field(
        "minmax",
        description="range of each group's grid: full, or of least error of the weights (mse), of the weights times "
        "the inputs' power (diagonal), of the group's outputs (output)",
    )
    percdamp: float = Field(0.01, gt=0, le=1, description="damping relative to the Hessian's mean diagonal")
    act_order: bool = Field(True, description="columns by falling diagonal; grids are then fixed beforehand (static)")
    alpha: float = Field(0.25, ge=0, le=1, description="strength of the asymmetric residual term (GPTAQ)")
    base: Literal["auto", "rtn", "gptq", "gptaq"] = Field(
        "auto",
        description="solver under vlmq (auto: gptaq, but gptq at 2 bits), awq, mbq and tlq (auto: rtn)",
    )
    exposed: bool | None = Field(
        None, description="search channel scales with the quantized path's inputs; default: tlq yes, awq and mbq no"
    )
    token_budget: int | None = Field(
        None, ge=1, description="tokens that tlq keeps per block, over all samples; default: half of them"
    )
    exponent: float = Field(
        1,
        gt=0,
        le=2,
        description="token weight = importance^exponent; 1: H = X G X^T (VLMQ v1); below 1: milder",
    )
    importance: ImportanceSource = Field(
        "attention",
        description="loss whose gradients weigh tokens: of the attention block, at the input of o_proj, of the decoder "
        "layer, or the answers' cross-entropy",
    )
    weighted: tuple[str, ...] | None = Field(
        None, description="linears with token weights, such as [v_proj, o_proj]; default: those of the attention"
    )
    per_sample: bool = Field(False, description="token weights have mean 1 in every sample, not only over all")
    dependency_threshold: float | None = Field(
        None, description="h0 of qvlm: neighbouring layers of larger entropy are searched together; default: its mean"
    )
    activation_bits: int | None = Field(
        None, description="simulate inputs of quantized decoder linears at 4, 6 or 8 bits; served with 16"
    )
    activation_range: ActivationRange = Field(
        "token", description="range of simulated activations: of each token (dynamic), each channel or the tensor"
    )
    simulated_vision: bool = Field(
        False, description="qvlm with activation_bits: the vision tower at few bits too, by simulation"
    )
    vision_epochs: int = Field(10, ge=0, description="of learning the tower's clipping; 0: full ranges")
    vision_entropy: float = Field(1, ge=0, description="weight of its entropy term (lambda 1 of Q-VLM)")
    vision_error: float = Field(1, ge=0, description="weight of its error term (lambda 2 of Q-VLM)")
    batch_tokens: int = Field(4096, ge=1, description="tokens of equally long samples that go through a layer at once")
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="auto: float32 on a CPU, bfloat16 on CUDA"
    )
    save_saliency: int = Field(0, ge=0, description="keep the token weights of the first N samples for pictures")

    @field_validator("overrides", mode="before")
    @classmethod
    def _read_scheme_strings(cls, value: Any) -> Any:
        """Accept `down_proj: w4g64` beside the long form."""
        if not isinstance(value, dict):
            return value
        return {name: _override_from(entry) for name, entry in value.items()}


def override_of(scheme: Scheme) -> SchemeOverride:
    """The override that leads to `scheme`, whatever the recipe says."""
    return SchemeOverride(bits=scheme.bits, group_size=scheme.group_size, symmetric=scheme.symmetric)


def _override_from(entry: Any) -> Any:
    if not isinstance(entry, str):
        return entry
    return parse_setting(entry)
