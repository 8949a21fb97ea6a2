"""LLaVA-OneVision: a SigLIP tower, a projector and Qwen2."""

from dataclasses import replace

from vlmq_serve.calibrate.families.qwen2_vl import QWEN2_VL

LLAVA_ONEVISION = replace(
    QWEN2_VL,
    model_type="llava_onevision",
    source_layers=("model.language_model.layers", "language_model.model.layers"),
    vision_tower="model.vision_tower",
    merger="model.multi_modal_projector",
    before_layers=(
        "model.vision_tower",
        "model.multi_modal_projector",
        "model.language_model.embed_tokens",
        "model.language_model.rotary_emb",
    ),
    left_alone=("vision_tower", "multi_modal_projector", "lm_head"),
    merge_size=lambda config: 1,
)
