import weakref

import pytest
import torch
from transformers import AutoProcessor

from vlmq_serve.calibrate import capture, pipeline, stream_memory
from vlmq_serve.calibrate.capture import batch_inputs
from vlmq_serve.calibrate.chats import read_chats
from vlmq_serve.calibrate.families.qwen2_vl import QWEN2_VL
from vlmq_serve.calibrate.loading import load_model
from vlmq_serve.calibrate.progress import SilentProgress
from vlmq_serve.calibrate.recipe import make_recipe
from vlmq_serve.calibrate.samples import build_samples
from vlmq_serve.calibrate.stream_memory import (
    available_bytes,
    judge_memory,
    learning_bytes,
    pending_bytes,
    stream_bytes,
)
from vlmq_serve.calibrate.streams import capture_streams
from vlmq_serve.format.errors import VLMQError
from vlmq_serve.format.headers import read_json

GIB = 2**30


def test_two_streams_of_every_token():
    assert stream_bytes(512 * 15_301, 1536, 4) == 2 * 512 * 15_301 * 1536 * 4  # 512 photos in Qwen2-VL-2B: 90 GiB


def test_what_waits_for_others_of_its_length_is_bounded():
    assert pending_bytes([(10, 3), (10, 4)], 10) == 7 + 4
    assert pending_bytes([(10, 3), (10, 4)], 4096) == 7 + 7
    assert pending_bytes([(100, GIB // 4)] * 8, 299) == GIB + GIB // 4 + 2 * (GIB // 4)
    assert pending_bytes([(4097, GIB // 4)] * 8, 4096) == GIB + GIB // 4 + GIB // 4


def test_capture_holds_the_images_that_are_counted(tiny_model, data_file, monkeypatch):
    """Samples alive whenever one is made and whenever a batch is copied, with that copy."""
    processor, chats = AutoProcessor.from_pretrained(tiny_model), read_chats(data_file)
    token = processor.tokenizer.convert_tokens_to_ids("<|image_pad|>")
    sizes = [(sample.length, sample.nbytes) for sample in build_samples(processor, chats, token)]
    waiting = 3 * max(size for _, size in sizes)
    for module in (capture, stream_memory):
        monkeypatch.setattr(module, "MAX_PENDING_BYTES", waiting)
    alive, held = {}, []

    def feed():
        for sample in build_samples(processor, chats, token):
            alive[sample.index] = sample.nbytes
            weakref.finalize(sample, alive.pop, sample.index)
            held.append(sum(alive.values()))
            yield sample

    def copy(samples, device):
        inputs = batch_inputs(samples, device)
        held.append(sum(alive.values()) + sum(tensor.nbytes for tensor in inputs.values()))
        return inputs

    monkeypatch.setattr(capture, "batch_inputs", copy)
    capture_streams(load_model(tiny_model, torch.float32), QWEN2_VL, feed(), torch.device("cpu"), 100, SilentProgress())
    assert alive == {}
    assert waiting + waiting // 3 < max(held) <= pending_bytes(sizes, 100)


@pytest.mark.parametrize(
    ("available", "said"),
    [
        (None, None),
        (4 * GIB, None),
        (4 * GIB - 1, "need 2.0 GiB (1.9 GiB for hidden states, 0.1 GiB for images) of the 4.0"),
        (2 * GIB, "of the 2.0 GiB that are free"),
    ],
)
def test_what_fits_is_remarked_on_when_it_is_more_than_half(available, said):
    remark = judge_memory([(2**17, GIB // 16), (7 * 2**14, 0)], 4096, 1024, 4, available)
    assert remark == said if said is None else said in remark


def test_what_does_not_fit_names_sizes_and_settings():
    message = "2 samples with 262144 tokens, 262000 in the longest, need 2.0 GiB .*, 1.5 GiB are free.*max_pixels"
    with pytest.raises(VLMQError, match=message):
        judge_memory([(144, 0), (262_000, 0)], 4096, 1024, 4, 3 * GIB // 2)


def test_the_samples_that_a_simulated_tower_learns_from_are_counted():
    """The first 64 are held together, and a batch of eight is copied; there are no hidden states yet."""
    sizes = [(100, GIB // 64)] * 64 + [(100, GIB)] * 8
    assert learning_bytes([size for _, size in sizes]) == GIB + GIB // 8
    few = [(100, GIB)] * 3
    assert judge_memory(few, 10, 1024, 4, 8 * GIB) is None
    remark = judge_memory(few, 10, 1024, 4, 8 * GIB, tower_learns=True)
    assert "need 6.0 GiB (for the images of 3, from which the vision tower learns) of the 8.0" in str(remark)


def test_a_tower_that_would_hold_too_many_images_learns_nothing(tiny_model, data_file, tmp_path, monkeypatch):
    """16 chats in batches of one: the images that wait are few, those that the tower learns from are not."""
    monkeypatch.setattr(stream_memory, "MAX_PENDING_BYTES", 1)
    monkeypatch.setattr(pipeline, "available_bytes", lambda: 2_500_000)
    monkeypatch.setattr(pipeline, "simulate_vision", lambda *_: pytest.fail("the tower learns"))
    tower = {"method": "qvlm", "activation_bits": 4, "simulated_vision": True}
    given = {"group_size": 32, "device": "cpu", "samples": 16, "batch_tokens": 1}
    with pytest.raises(VLMQError, match=r"16 samples .* the images of 16, from which the vision tower learns"):
        pipeline.calibrate(tiny_model, tmp_path / "out", data_file, make_recipe(**tower, **given))
    monkeypatch.undo()
    monkeypatch.setattr(stream_memory, "MAX_PENDING_BYTES", 1)
    monkeypatch.setattr(pipeline, "available_bytes", lambda: 2_500_000)
    pipeline.calibrate(tiny_model, tmp_path / "plain", data_file, make_recipe(method="gptq", **given))


def test_the_system_says_what_is_free_and_a_container_what_it_may_have(tmp_path):
    assert available_bytes(tmp_path) is None
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal:       8 kB\nMemAvailable:       5 kB\nHugePages_Total:  0\n")
    assert available_bytes(tmp_path) == 5 * 1024
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True)
    (group / "memory.max").write_text("max\n")
    (group / "memory.current").write_text("3000\n")
    (group / "memory.stat").write_text("anon 2000\ninactive_file 500\n")
    assert available_bytes(tmp_path) == 5 * 1024
    (group / "memory.max").write_text("4096\n")
    assert available_bytes(tmp_path) == 4096 - 3000 + 500


def test_a_run_that_does_not_fit_ends_before_the_tower_sees_an_image(tiny_model, data_file, tmp_path, monkeypatch):
    """24 chats of the tiny model: some 700 tokens, 64 wide, fp32, twice, which fits; the images, of 5 MB, do not."""
    monkeypatch.setattr(pipeline, "available_bytes", lambda: 1_000_000)
    monkeypatch.setattr(pipeline, "capture_streams", lambda *_: pytest.fail("the images went through the model"))
    recipe = make_recipe(method="gptq", group_size=32, device="cpu")
    with pytest.raises(VLMQError, match=r"for images.*max_pixels"):
        pipeline.calibrate(tiny_model, tmp_path / "out", data_file, recipe)
    assert list(tmp_path.iterdir()) == []


def test_smaller_images_are_fewer_tokens_and_part_of_the_record(tiny_model, data_file, tmp_path, monkeypatch):
    given = {"method": "gptq", "group_size": 32, "device": "cpu", "samples": 6}
    monkeypatch.setattr(pipeline, "available_bytes", lambda: 4_000_000)
    whole = pipeline.calibrate(tiny_model, tmp_path / "whole", data_file, make_recipe(**given))
    scaled = pipeline.calibrate(tiny_model, tmp_path / "scaled", data_file, make_recipe(**given, max_pixels=56 * 56))
    before, after = whole.details["data"]["tokens"], scaled.details["data"]["tokens"]
    assert 6 * 25 < sum(before.values()) < 6 * 50
    assert any("memory: 6 samples" in note for note in whole.notes)
    assert not any("memory" in note for note in scaled.notes)
    assert after["vision"] < before["vision"] / 2
    assert (after["prompt"], after["answer"]) == (before["prompt"], before["answer"])
    assert read_json(tmp_path / "scaled" / "vlmq" / "run.json")["recipe"]["max_pixels"] == 56 * 56


def test_another_limit_does_not_go_on_with_an_interrupted_run(tiny_model, data_file, tmp_path, interrupted_at):
    given = {"method": "gptq", "group_size": 32, "device": "cpu", "samples": 4}
    with interrupted_at(pipeline, "quantize_layer", 2):
        pipeline.calibrate(tiny_model, tmp_path / "out", data_file, make_recipe(**given, max_pixels=4000))
    with pytest.raises(VLMQError, match="max_pixels was 4000, is now None"):
        pipeline.calibrate(tiny_model, tmp_path / "out", data_file, make_recipe(**given), resume=True)
