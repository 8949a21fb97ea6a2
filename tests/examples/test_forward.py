"""The fast training forward equals transformers, and packed questions equal chats of their own."""

from __future__ import annotations

import pytest
import torch

from examples.tiny_world.channels import spread_channels
from examples.tiny_world.draw import draw
from examples.tiny_world.forward import PREFIX, packed_layout, packed_logits, to_patches, vision_tokens
from examples.tiny_world.model import CHAT_TEMPLATE, build_image_processor, build_model
from examples.tiny_world.packing import SLOT_KINDS, make_batch, prefix_tokens, questions_of
from examples.tiny_world.scenes import SPLITS, scene_from_seed
from examples.tiny_world.tokenizer import build_tokenizer

FIRST = SPLITS["validation"].start + 77
IMAGES = 3


@pytest.fixture(scope="module")
def model():
    """Random weights; the vision tower's enlarged, so that its attention is far from uniform and every path matters."""
    model = build_model(1).eval()
    with torch.no_grad():
        for param in model.model.visual.parameters():
            if param.ndim > 1:
                param.mul_(3.0)
    return model


@pytest.fixture(scope="module")
def batch():
    return make_batch(FIRST, IMAGES)


@pytest.fixture(scope="module")
def processed():
    return build_image_processor()([draw(scene_from_seed(FIRST + i)).convert("RGB") for i in range(IMAGES)])


def test_patches_equal_those_of_the_image_processor(batch, processed) -> None:
    patches = processed["pixel_values"]
    patches = torch.as_tensor(patches).view(IMAGES, 256, 3, 2, 49)
    assert torch.equal(patches[:, :, :, 0], patches[:, :, :, 1])
    torch.testing.assert_close(to_patches(batch.images), patches[:, :, :, 0].flatten(2), rtol=0, atol=1e-5)


@torch.no_grad()
def test_batched_vision_equals_transformers(model, batch, processed) -> None:
    expected = model.model.visual(
        torch.as_tensor(processed["pixel_values"]), grid_thw=torch.as_tensor(processed["image_grid_thw"])
    ).pooler_output
    actual = vision_tokens(model.model.visual, to_patches(batch.images)).flatten(0, 1)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_packed_questions_equal_chats_of_their_own(model, batch, processed) -> None:
    """The logits of each of the ten packed questions against transformers on that question alone."""
    vision = vision_tokens(model.model.visual, to_patches(batch.images))
    packed = packed_logits(model, vision, prefix_tokens(), batch.slots, batch.places)
    tokenizer = build_tokenizer()
    pixel_values = torch.as_tensor(processed["pixel_values"]).view(IMAGES, 256, -1)
    for i in (0, IMAGES - 1):
        for j, question in enumerate(questions_of(scene_from_seed(FIRST + i), SLOT_KINDS)):
            content = [{"type": "image"}, {"type": "text", "text": question.text}]
            text = tokenizer.apply_chat_template(
                [{"role": "user", "content": content}, {"role": "assistant", "content": question.answer}],
                chat_template=CHAT_TEMPLATE,
                tokenize=False,
            )
            ids = torch.tensor([tokenizer.encode(text.replace("<|image_pad|>", "<|image_pad|>" * 64))])
            output = model(
                input_ids=ids,
                pixel_values=pixel_values[i],
                image_grid_thw=torch.as_tensor(processed["image_grid_thw"])[i : i + 1],
                mm_token_type_ids=(ids == tokenizer.convert_tokens_to_ids("<|image_pad|>")).int(),
            )
            for place, target, weight, logits in zip(
                batch.places[i, j], batch.targets[i, j], batch.weights[i, j], packed[i, j], strict=True
            ):
                if weight:
                    assert ids[0, PREFIX + place + 1] == target
                    torch.testing.assert_close(logits, output.logits[0, PREFIX + place], rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_a_question_does_not_see_another(model, batch) -> None:
    vision = vision_tokens(model.model.visual, to_patches(batch.images))
    before = packed_logits(model, vision, prefix_tokens(), batch.slots, batch.places)
    changed = batch.slots.clone()
    changed[:, 4] = changed[:, 4].flip(-1)
    after = packed_logits(model, vision, prefix_tokens(), changed, batch.places)
    others = [j for j in range(batch.slots.shape[1]) if j != 4]
    assert torch.equal(before[:, others], after[:, others])
    assert not torch.allclose(before[:, 4], after[:, 4])


@torch.no_grad()
def test_spreading_channels_changes_weights_but_no_logit(batch) -> None:
    model = build_model(2).eval()
    vision = vision_tokens(model.model.visual, to_patches(batch.images))
    before = packed_logits(model, vision, prefix_tokens(), batch.slots, batch.places)
    spread_channels(model, 1.0)
    gains = model.model.language_model.layers[0].input_layernorm.weight
    assert gains.max() / gains.min() >= 16
    after = packed_logits(model, vision, prefix_tokens(), batch.slots, batch.places)
    assert torch.equal(before, after)


def test_layout_lets_every_token_see_itself_and_the_image() -> None:
    layout = packed_layout(3, 5)
    assert layout.mask.diagonal().all()
    assert layout.mask[PREFIX:, :PREFIX].all()
    assert not layout.mask[:PREFIX, PREFIX:].any()
    assert layout.positions.shape == (3, PREFIX + 15)
    assert torch.equal(layout.positions[:, PREFIX : PREFIX + 5], layout.positions[:, PREFIX + 10 :])
