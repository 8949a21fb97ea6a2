"""Every family on a tiny random model of its own architecture: calibrated, written, loaded, and compared.

The report's errors come from hidden states that calibration moved layer by layer; here both models run as a whole.
Where the two agree, the capture, the masks, the positions and what happens between the layers are the model's own.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    GotOcr2ImageProcessor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVideoProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
    SiglipVisionConfig,
)

from vlmq_serve.calibrate.chats import read_chats
from vlmq_serve.calibrate.families import ADAPTERS, find_adapter
from vlmq_serve.calibrate.loading import load_processor
from vlmq_serve.calibrate.pipeline import calibrate
from vlmq_serve.calibrate.recipe import make_recipe
from vlmq_serve.calibrate.samples import ANSWER, VISION, build_sample, choose_chats
from vlmq_serve.evaluate.divergence import before_text, predict
from vlmq_serve.evaluate.loading import load_model
from vlmq_serve.format.errors import VLMQError

TEXT = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 2048, "tie_word_embeddings": True, "bos_token_id": None,
}  # fmt: skip
MROPE = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}


def qwen2_5_vl(tokenizer, text):
    ids = tokenizer.convert_tokens_to_ids
    config = Qwen2_5_VLConfig(
        text_config={**text, "rope_parameters": MROPE},
        vision_config={"depth": 2, "hidden_size": 32, "out_hidden_size": 64, "num_heads": 2, "intermediate_size": 48,
                       "patch_size": 14, "window_size": 56, "fullatt_block_indexes": [1]},
        image_token_id=ids("<|image_pad|>"), video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"), vision_end_token_id=ids("<|vision_end|>"),
    )  # fmt: skip
    images = Qwen2VLImageProcessor(min_pixels=28 * 28, max_pixels=112 * 112)
    return Qwen2_5_VLForConditionalGeneration(config), Qwen2_5_VLProcessor(images, tokenizer, Qwen2VLVideoProcessor())


def qwen3_vl(tokenizer, text):
    ids = tokenizer.convert_tokens_to_ids
    config = Qwen3VLConfig(
        text_config={**text, "head_dim": 16, "rope_parameters": {**MROPE, "mrope_interleaved": True}},
        vision_config={"depth": 3, "hidden_size": 32, "out_hidden_size": 64, "num_heads": 2, "intermediate_size": 48,
                       "patch_size": 16, "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]},
        image_token_id=ids("<|image_pad|>"), video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"), vision_end_token_id=ids("<|vision_end|>"),
    )  # fmt: skip
    images = Qwen2VLImageProcessor(patch_size=16, min_pixels=32 * 32, max_pixels=128 * 128)
    return Qwen3VLForConditionalGeneration(config), Qwen3VLProcessor(images, tokenizer, Qwen3VLVideoProcessor())


def llava_onevision(tokenizer, text, vision_hidden=32, vision_intermediate=48):
    config = LlavaOnevisionConfig(
        text_config={**text, "model_type": "qwen2"},
        vision_config=SiglipVisionConfig(
            hidden_size=vision_hidden, intermediate_size=vision_intermediate, num_hidden_layers=2,
            num_attention_heads=2, image_size=56, patch_size=14,
        ),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_id=tokenizer.convert_tokens_to_ids("<|video_pad|>"),
        image_grid_pinpoints=[[56, 56], [56, 112]], vision_feature_layer=-1, vision_feature_select_strategy="full",
        tie_word_embeddings=text["tie_word_embeddings"],
    )  # fmt: skip
    size = {"height": 56, "width": 56}
    images = LlavaOnevisionImageProcessor(size=size, crop_size=size, image_grid_pinpoints=[[56, 56], [56, 112]])
    processor = LlavaOnevisionProcessor(
        images, tokenizer, LlavaOnevisionVideoProcessor(), num_image_tokens=16, image_token="<image>",
        video_token="<|video_pad|>", vision_feature_select_strategy="full",
    )  # fmt: skip
    return LlavaOnevisionForConditionalGeneration(config), processor


def internvl(tokenizer, text):
    config = InternVLConfig(
        text_config={**text, "model_type": "qwen2"},
        vision_config={"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
                       "image_size": [56, 56], "patch_size": [14, 14]},
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"), image_seq_length=4,
        tie_word_embeddings=text["tie_word_embeddings"],
    )  # fmt: skip
    images = GotOcr2ImageProcessor(size={"height": 56, "width": 56}, crop_to_patches=True, min_patches=1, max_patches=2)
    processor = InternVLProcessor(images, tokenizer, InternVLVideoProcessor(), image_seq_length=4)
    return InternVLForConditionalGeneration(config), processor


BUILDERS: dict[str, Callable] = {f.__name__: f for f in (qwen2_5_vl, qwen3_vl, llava_onevision, internvl)}
PLACEHOLDERS = {"llava_onevision": "<image>", "internvl": "<IMG_CONTEXT>"}
NAMED = {
    "start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<|video_pad|>",
}  # fmt: skip


def tokenizer_of(family, folder):
    """The tokenizer in `folder` with the tokens that stand for images in a family."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>", "<img>", "</img>", "<IMG_CONTEXT>"]})
    if family != "internvl":
        return tokenizer
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>",
        extra_special_tokens=NAMED,
    )  # fmt: skip


def set_unit_gain(model):
    """Random weights that neither blow up nor fade, in the vision tower too."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and "norm" not in name:
                parameter.normal_(0, 1.0 / parameter.shape[1] ** 0.5)


@pytest.fixture(scope="module")
def make_model(tiny_model, tmp_path_factory):
    """Writes the tiny model of a family once, bf16, with its processor; weights of unit gain."""
    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            folder = tmp_path_factory.mktemp(family) / "model"
            tokenizer = tokenizer_of(family, tiny_model)
            torch.manual_seed(0)
            text = {**TEXT, "vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "pad_token_id": None}
            model, processor = BUILDERS[family](tokenizer, text)
            set_unit_gain(model)
            model.to(torch.bfloat16).save_pretrained(folder)
            template = (tiny_model / "chat_template.jinja").read_text()
            old = "<|vision_start|><|image_pad|><|vision_end|>"
            assert old in template
            processor.chat_template = template.replace(old, PLACEHOLDERS.get(family, old))
            processor.save_pretrained(folder)
            made[family] = folder
        return made[family]

    return make


def outputs(folder, family, samples, logits=False):
    """What leaves the last decoder layer (with what the family adds behind it) or the model, per sample."""
    model, seen = load_model(folder), []
    adapter = find_adapter(folder)
    norm = adapter.decoder(model).norm
    norm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.inference_mode():
        results = [model(**sample.inputs, use_cache=False).logits for sample in samples]
    return results if logits else seen


def samples_of(folder, data_file, count):
    chats = choose_chats(read_chats(data_file), count, 0, False)
    processor = load_processor(folder)
    token = find_adapter(folder).image_token_id(load_model(folder).config)
    return [build_sample(processor, chat, token, i) for i, chat in enumerate(chats)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", list(BUILDERS))
def test_predictions_without_the_model_are_its_logits(make_model, data_file, family, dtype):
    folder = make_model(family)
    model, samples = load_model(folder, dtype), samples_of(folder, data_file, 3)
    kept = predict(model, samples, batch_tokens=1)  # every sample alone, in order
    with torch.inference_mode():
        for states, sample in zip(kept.states, samples, strict=True):
            logits = model(**sample.inputs, use_cache=False).logits
            assert logits.dtype == states.dtype == dtype
            wanted, kinds = before_text(logits, sample.modality[None])
            assert len(kinds) == int((sample.modality[1:] != VISION).sum()) > 3
            torch.testing.assert_close(kept.head(states), wanted)


@pytest.mark.parametrize("method", ["vlmq", "awq"])
@pytest.mark.parametrize("family", list(BUILDERS))
def test_calibrated_checkpoint_computes_what_calibration_saw(make_model, data_file, tmp_path, family, method):
    folder = make_model(family)
    count = 24 if method == "vlmq" else 4  # the search of channel scales takes its time
    recipe = make_recipe(method=method, bits=3, group_size=32, samples=count, device="cpu")
    report = calibrate(folder, tmp_path / "out", data_file, recipe)
    samples = samples_of(folder, data_file, count)
    full, quantized = (outputs(path, family, samples) for path in (folder, tmp_path / "out"))
    error = sum(float((q - f).square().sum()) for q, f in zip(quantized, full, strict=True))
    energy = sum(float(f.square().sum()) for f in full)
    assert error / energy == pytest.approx(report.layers[-1].errors["all"], rel=1e-3)
    assert 1e-4 < error / energy < 0.5
    assert all(int((s.modality == VISION).sum()) > 3 for s in samples)
    packed = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert packed["ignore"] == list(find_adapter(folder).left_alone)


@pytest.mark.parametrize("family", list(BUILDERS))
def test_images_that_stand_side_by_side_keep_their_tokens(make_model, data_file, tmp_path, family):
    """InternVL's processor frames each image, LLaVA-OneVision's makes one run of both; text is behind or between."""
    images = [{"type": "image", "image": str(data_file.with_name(f"{i}.png"))} for i in range(3)]
    text = {"type": "text", "text": "Colour?"}
    contents = ([*images, text], [text, images[0], images[1]], [*images[:2], text, images[2]])
    chats = [[{"role": "user", "content": c}, {"role": "assistant", "content": "red"}] for c in contents]
    file = tmp_path / "chats.jsonl"
    file.write_text("\n".join(json.dumps({"messages": chat}) for chat in chats))
    folder = make_model(family)
    token = find_adapter(folder).image_token_id(load_model(folder).config)
    answers = set()
    for sample in samples_of(folder, file, 3):
        ids = sample.inputs["input_ids"][0]
        assert torch.equal(sample.modality == VISION, ids == token)
        answers.add(tuple(ids[sample.modality == ANSWER].tolist()))
    assert len(answers) == 1


@pytest.mark.parametrize("family", ["llava_onevision", "internvl"])
def test_files_with_newer_names(make_model, data_file, tmp_path, family):
    """transformers saves `language_model.model.layers...`, as the hub has it; files named as modules are read alike."""
    folder, renamed = make_model(family), tmp_path / "renamed"
    shutil.copytree(folder, renamed)
    tensors = load_file(folder / "model.safetensors")
    named = {
        "model." + name.replace("language_model.model.", "language_model."): tensor for name, tensor in tensors.items()
    }
    assert "model.language_model.layers.0.self_attn.q_proj.weight" in named
    save_file(named, renamed / "model.safetensors", {"format": "pt"})
    recipe = make_recipe(method="gptq", bits=3, group_size=32, samples=6, device="cpu")
    for name, source in (("new", renamed), ("was", folder)):
        calibrate(source, tmp_path / name, data_file, recipe)
    samples = samples_of(folder, data_file, 2)
    for first, second in zip(
        outputs(tmp_path / "new", family, samples, True), outputs(tmp_path / "was", family, samples, True), strict=True
    ):
        assert torch.equal(first, second)


def test_families_are_found_by_their_type():
    assert [adapter.model_type for adapter in ADAPTERS] == ["qwen2_vl", *BUILDERS]


def test_sliding_windows_are_refused(make_model, data_file, tmp_path):
    folder = make_model("qwen2_5_vl")
    copy = shutil.copytree(folder, tmp_path / "model")
    config = json.loads((copy / "config.json").read_text())
    config["text_config"] |= {"layer_types": ["sliding_attention"] * 3, "use_sliding_window": True, "sliding_window": 8}
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(VLMQError, match="qwen2_5_vl: got layer types"):
        calibrate(copy, tmp_path / "out", data_file, make_recipe(bits=3, group_size=32, device="cpu"))
    assert not (tmp_path / "out").exists()
