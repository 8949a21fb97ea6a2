"""What users of vLLM combine with a checkpoint: weights reloaded, parts of the model left out, drafts, embeddings."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.quant_methods.checkpoints import quantize_parts
from tests.quant_methods.families import TEXT, write_family
from tests.quant_methods.test_engine import EVALUATION, ask, reference_logprobs, render
from tests.quant_methods.test_families import PROMPTS, check, check_text
from vlmq_serve.calibrate.chats import read_chats
from vlmq_serve.evaluate.loading import load_model

pytestmark = pytest.mark.serve
CHATS = read_chats(EVALUATION)[:4]
MIXED = {"model.layers.1.mlp": "w2g32s", "model.layers.2.self_attn": "w4g32"}


@pytest.fixture(scope="module")
def checkpoint(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    parts = {"overrides": MIXED, "lm_head": "w8", "embeddings": "w4", "vision": "w8g32"}
    return quantize_parts(tiny_model, tmp_path_factory.mktemp("features") / "w3", "w3g32", **parts)


@pytest.fixture
def processor(checkpoint: Path) -> Any:
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(checkpoint)


@pytest.fixture(autouse=True)
def exact_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is tested is which weights serve."""
    monkeypatch.setenv("VLMQ_KERNEL", "reference")


def with_other_scales(checkpoint: Path, folder: Path) -> Path:
    """The same model after some more training, so to say."""
    shutil.copytree(checkpoint, folder)
    tensors = load_file(folder / "model.safetensors")
    for name in tensors:
        if name.endswith(".scales"):
            tensors[name] *= 1 + 0.1 * torch.randn_like(tensors[name])
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_weights_are_reloaded_from_another_checkpoint_and_back(
    checkpoint: Path, tmp_path: Path, engine: Any, processor: Any
) -> None:
    other = with_other_scales(checkpoint, tmp_path / "other")
    llm = engine(checkpoint)
    before = ask(llm, processor, CHATS)
    check_answers(load_model(checkpoint, torch.float32), processor, before)
    reload(llm, other)
    model = load_model(other, torch.float32)
    changed = ask(llm, processor, CHATS)
    check_answers(model, processor, changed)
    with pytest.raises(AssertionError):  # or the other weights would not be other ones
        check_answers(model, processor, before)
    reload(llm, checkpoint)
    again = ask(llm, processor, CHATS)
    assert [answer.token_ids for answer in again] == [answer.token_ids for answer in before]
    assert [answer.cumulative_logprob for answer in again] == [answer.cumulative_logprob for answer in before]


def reload(llm: Any, folder: Path) -> None:
    llm.collective_rpc("reload_weights", kwargs={"weights_path": str(folder)})
    # The workers drop what they have computed with the old weights, and the scheduler has to know.
    llm.llm_engine.reset_encoder_cache()
    llm.llm_engine.reset_mm_cache()
    llm.reset_prefix_cache()


def check_answers(model: Any, processor: Any, answers: list[Any]) -> None:
    for chat, answer in zip(CHATS, answers, strict=True):
        check(answer, reference_logprobs(model, processor, chat, list(answer.token_ids)))


def test_text_alone_without_the_vision_tower(checkpoint: Path, engine: Any) -> None:
    """vLLM leaves the tower out, and its packed tensors unread."""
    llm = engine(checkpoint, language_model_only=True)
    check_text(llm, load_model(checkpoint, torch.float32))


def test_embeddings_of_a_model_whose_head_is_packed(checkpoint: Path, engine: Any, processor: Any) -> None:
    """The state of the last token, of text and of images; the head, which is not needed, vLLM keeps on meta."""
    llm, model = engine(checkpoint, runner="pooling"), load_model(checkpoint, torch.float32)
    inputs = [{"input_ids": torch.tensor([prompt])} for prompt in PROMPTS]
    prompts: list[dict[str, Any]] = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
    for chat in CHATS:
        prompts.append({"prompt": render(processor, chat), "multi_modal_data": {"image": chat.images()[0]}})
        inputs.append(processor(text=[render(processor, chat)], images=chat.images(), return_tensors="pt"))
    with torch.inference_mode():
        states = [model.model(**given).last_hidden_state[0, -1] for given in inputs]
    for state, output in zip(states, llm.embed(prompts, use_tqdm=False), strict=True):
        expected = torch.nn.functional.normalize(state, dim=0)
        torch.testing.assert_close(torch.tensor(output.outputs.embedding), expected, atol=1e-4, rtol=0)


def write_eagle_draft(folder: Path) -> Path:
    """A random EAGLE-3 draft for the tiny models of `families`, with the embeddings of its target."""
    hidden, wide, vocabulary = TEXT["hidden_size"], TEXT["intermediate_size"], TEXT["vocab_size"]
    shapes = {
        "fc": (hidden, 3 * hidden), "norm": (hidden,), "lm_head": (vocabulary, hidden),
        "midlayer.hidden_norm": (hidden,), "midlayer.input_layernorm": (hidden,),
        "midlayer.post_attention_layernorm": (hidden,),
        "midlayer.self_attn.q_proj": (hidden, 2 * hidden), "midlayer.self_attn.k_proj": (hidden // 2, 2 * hidden),
        "midlayer.self_attn.v_proj": (hidden // 2, 2 * hidden), "midlayer.self_attn.o_proj": (hidden, hidden),
        "midlayer.mlp.gate_proj": (wide, hidden), "midlayer.mlp.up_proj": (wide, hidden),
        "midlayer.mlp.down_proj": (hidden, wide),
    }  # fmt: skip
    folder.mkdir()
    tensors = {f"{name}.weight": torch.randn(shape) * 0.05 for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = {**TEXT, "num_hidden_layers": 1, "model_type": "llama", "architectures": ["LlamaForCausalLMEagle3"]}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_an_eagle_draft_looks_tokens_up_in_packed_embeddings(tiny_model: Path, tmp_path: Path, engine: Any) -> None:
    source = write_family("qwen3_vl", tiny_model, tmp_path / "source")
    checkpoint = quantize_parts(source, tmp_path / "w3", "w3g32", lm_head="w8", embeddings="w4")
    draft = {"method": "eagle3", "model": str(write_eagle_draft(tmp_path / "draft")), "num_speculative_tokens": 2}
    llm = engine(checkpoint, speculative_config=draft, disable_log_stats=False)
    check_text(llm, load_model(checkpoint, torch.float32))
    (drafted,) = [metric for metric in llm.get_metrics() if metric.name == "vllm:spec_decode_num_draft_tokens"]
    assert drafted.value > 0
