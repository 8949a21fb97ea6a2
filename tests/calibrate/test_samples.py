import json

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

from vlmq_serve.calibrate import capture
from vlmq_serve.calibrate.capture import group_by_length
from vlmq_serve.calibrate.chats import read_chats
from vlmq_serve.calibrate.families.qwen2_vl import QWEN2_VL
from vlmq_serve.calibrate.loading import load_model
from vlmq_serve.calibrate.progress import SilentProgress
from vlmq_serve.calibrate.samples import ANSWER, PROMPT, VISION, build_sample, build_samples, choose_chats
from vlmq_serve.calibrate.streams import capture_streams
from vlmq_serve.format.errors import VLMQError


@pytest.fixture(scope="module")
def processor(tiny_model):
    return AutoProcessor.from_pretrained(tiny_model)


def image_token(processor) -> int:
    return processor.tokenizer.convert_tokens_to_ids("<|image_pad|>")


def test_every_token_has_its_modality(processor, data_file):
    chat = read_chats(data_file)[0]
    sample = build_sample(processor, chat, image_token(processor))
    ids = sample.inputs["input_ids"][0]
    assert torch.equal(sample.modality == VISION, ids == image_token(processor))
    assert int((sample.modality == VISION).sum()) == 16
    answer = processor.tokenizer.decode(ids[sample.modality == ANSWER])
    assert answer == f"{chat.answer}<|im_end|>\n"
    assert "assistant" in processor.tokenizer.decode(ids[sample.modality == PROMPT])


def test_two_images_and_two_turns(processor, tmp_path):
    for name, size in (("a.png", (112, 112)), ("b.png", (56, 56))):
        Image.new("RGB", size).save(tmp_path / name)

    def ask(image: str) -> dict:
        return {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "Colour?"}]}

    messages = [ask("a.png"), {"role": "assistant", "content": "red"}]
    messages += [ask("b.png"), {"role": "assistant", "content": "blue"}]
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": messages}))
    sample = build_sample(processor, read_chats(tmp_path / "chats.jsonl")[0], image_token(processor))
    assert int((sample.modality == VISION).sum()) == 16 + 4
    answers = processor.tokenizer.decode(sample.inputs["input_ids"][0][sample.modality == ANSWER])
    assert answers == "red<|im_end|>\nblue<|im_end|>\n"


def test_text_only_chats_are_an_explicit_choice(tmp_path):
    messages = [{"role": "user", "content": "Colour?"}, {"role": "assistant", "content": "red"}]
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": messages}))
    chats = read_chats(tmp_path / "chats.jsonl")
    with pytest.raises(VLMQError, match=r"line 1: has no image \(1 of 1 chats\).*allow_text_only"):
        choose_chats(chats, 1, 0, allow_text_only=False)
    assert choose_chats(chats, 1, 0, allow_text_only=True) == chats


def test_draw_depends_on_the_seed_only(data_file):
    chats = read_chats(data_file)
    draws = [[chat.line for chat in choose_chats(chats, 10, seed, False)] for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]
    assert draws[0] == sorted(draws[0])
    assert len(set(draws[0])) == 10


def test_groups_have_one_length_and_lose_nobody(processor, data_file):
    samples = list(build_samples(processor, read_chats(data_file), image_token(processor)))
    groups = list(group_by_length(samples, 100))
    assert sorted(sample.index for group in groups for sample in group) == list(range(len(samples)))
    for group in groups:
        assert len({sample.length for sample in group}) == 1
        assert len(group) == 1 or len(group) * group[0].length <= 100
    assert max(len(group) for group in groups) > 1


def test_waiting_samples_hold_no_more_than_their_bound(processor, data_file, monkeypatch):
    samples = list(build_samples(processor, read_chats(data_file), image_token(processor)))
    largest = max(sample.nbytes for sample in samples)
    monkeypatch.setattr(capture, "MAX_PENDING_BYTES", 3 * largest)
    waiting = {}

    def feed():
        for sample in samples:
            assert sum(waiting.values()) <= 3 * largest
            waiting[sample.index] = sample.nbytes
            yield sample

    for group in group_by_length(feed(), 100_000):
        assert sum(waiting.values()) <= 4 * largest
        for sample in group:
            del waiting[sample.index]
    assert waiting == {}


def test_streams_are_the_models_own_inference(tiny_model, processor, data_file):
    """Batches run block by block end in the logits that the whole model gives each chat alone: M-RoPE included."""
    model = load_model(tiny_model, torch.float32)
    samples = list(build_samples(processor, read_chats(data_file)[:8], image_token(processor)))
    streams = capture_streams(model, QWEN2_VL, samples, torch.device("cpu"), 4096, SilentProgress())
    assert len(streams.batches) < len(samples)
    with torch.no_grad():
        for item, batch in zip(streams, streams.batches, strict=True):
            hidden = item.full
            for layer in QWEN2_VL.decoder_layers(model):
                for block in QWEN2_VL.blocks:
                    hidden = block.forward(layer, hidden, item.kwargs)
            for row, index in enumerate(batch.indices):
                expected = model(**samples[index].inputs).logits[0]
                logits = model.lm_head(model.model.language_model.norm(hidden[row]))
                torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_captured_positions_are_three_dimensional(tiny_model, processor, data_file):
    """Height and width angles differ from the temporal ones on vision tokens; text tokens have all three equal."""
    model = load_model(tiny_model, torch.float32)
    sample = build_sample(processor, read_chats(data_file)[0], image_token(processor))
    streams = capture_streams(model, QWEN2_VL, [sample], torch.device("cpu"), 4096, SilentProgress())
    cos = streams.batches[0].kwargs["position_embeddings"][0]
    vision = sample.modality == VISION
    expected, _ = model.model.get_rope_index(
        sample.inputs["input_ids"],
        mm_token_type_ids=sample.inputs["mm_token_type_ids"],
        image_grid_thw=sample.inputs["image_grid_thw"],
    )
    plain = model.model.language_model.rotary_emb(streams.full[0], torch.arange(sample.length).expand(3, 1, -1))[0]
    mrope = model.model.language_model.rotary_emb(streams.full[0], expected)[0]
    torch.testing.assert_close(cos, mrope)
    assert not torch.allclose(cos[..., vision, :], plain[..., vision, :])
