"""Fast training-time forward passes over the modules of a Hugging Face Qwen2-VL model.

transformers runs vision attention image by image; in training all images have one size, so here they run as one
batch. Several questions share one pass over their image: each question's tokens attend to the image prefix and to
themselves only and carry the positions they would have alone, so every question gets exactly the output of a chat
of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import Qwen2VLForConditionalGeneration

from examples.tiny_world.draw import SIDE, TOKENS_PER_SIDE
from examples.tiny_world.model import IMAGE_MEAN, IMAGE_STD, MERGE, PATCH

TEXT_BEFORE_IMAGE = 4  # <|im_start|> user \n <|vision_start|>
IMAGE_TOKENS = TOKENS_PER_SIDE**2
PREFIX = TEXT_BEFORE_IMAGE + IMAGE_TOKENS + 1  # and <|vision_end|>
FIRST_QUESTION_POSITION = TEXT_BEFORE_IMAGE + TOKENS_PER_SIDE + 1


@dataclass(frozen=True)
class Layout:
    """Mask and positions of one image prefix followed by question slots of one length.

    mask: bool [S, S], True where attention is allowed; positions: int64 [3, S] (time, height, width).
    """

    mask: Tensor
    positions: Tensor


@cache
def packed_layout(slots: int, slot_length: int) -> Layout:
    """The layout for `slots` questions of `slot_length` tokens each behind one image."""
    size = PREFIX + slots * slot_length
    owner = torch.zeros(size, dtype=torch.long)
    owner[PREFIX:] = 1 + torch.arange(slots).repeat_interleave(slot_length)
    causal = torch.ones(size, size, dtype=torch.bool).tril()
    mask = causal & ((owner[:, None] == owner[None, :]) | (owner[None, :] == 0))
    grid = torch.arange(TOKENS_PER_SIDE)
    image = torch.stack(
        [
            torch.zeros(IMAGE_TOKENS, dtype=torch.long),
            grid.repeat_interleave(TOKENS_PER_SIDE),
            grid.repeat(TOKENS_PER_SIDE),
        ]
    )
    before = torch.arange(TEXT_BEFORE_IMAGE).expand(3, -1)
    end = torch.full((3, 1), FIRST_QUESTION_POSITION - 1)
    question = (FIRST_QUESTION_POSITION + torch.arange(slot_length)).repeat(slots).expand(3, -1)
    return Layout(mask, torch.cat([before, image + TEXT_BEFORE_IMAGE, end, question], dim=1))


def to_patches(images: Tensor) -> Tensor:
    """Normalise and cut uint8 images [B, 112, 112, 3] into fp32 patches [B, 256, 147], ordered as by the processor.

    The processor repeats each patch for the two time steps; one copy is enough here (see `vision_tokens`).
    """
    pixels = (images.float() / 255 - torch.tensor(IMAGE_MEAN)) / torch.tensor(IMAGE_STD)
    side = SIDE // (PATCH * MERGE)
    cut = pixels.view(-1, side, MERGE, PATCH, side, MERGE, PATCH, 3).permute(0, 1, 4, 2, 5, 7, 3, 6)
    return cut.reshape(images.shape[0], -1, 3 * PATCH * PATCH)


@cache
def _vision_rotation(head_dim: int) -> tuple[Tensor, Tensor]:
    """cos and sin [256, 1, head_dim] of the axial rotary embedding, 16x16 patches in merge-block order."""
    side = SIDE // PATCH
    blocks = torch.arange(side * side).view(side // MERGE, MERGE, side // MERGE, MERGE)
    index = blocks.transpose(1, 2).flatten()
    places = torch.stack([index // side, index % side], dim=1).float()
    frequencies = 10000.0 ** -(torch.arange(0, head_dim // 2, 2).float() / (head_dim // 2))
    angles = (places[:, :, None] * frequencies).flatten(1).repeat(1, 2)[:, None]
    return angles.cos(), angles.sin()


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), dim=-1) * sin


def vision_tokens(visual: Any, patches: Tensor) -> Tensor:
    """Vision tower and merger over equal-size images: fp32 [B, 256, 147] -> [B, 64, hidden].

    A still image repeats each patch over time, so its convolution equals one with the kernel
    summed over time.
    """
    batch, count = patches.shape[:2]
    x = F.linear(patches, visual.patch_embed.proj.weight.sum(dim=2).flatten(1))
    heads = visual.blocks[0].attn.num_heads
    cos, sin = _vision_rotation(x.shape[-1] // heads)
    for block in visual.blocks:
        q, k, v = block.attn.qkv(block.norm1(x)).view(batch, count, 3, heads, -1).unbind(2)
        q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
        mixed = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        x = x + block.attn.proj(mixed.transpose(1, 2).reshape(batch, count, -1))
        x = x + block.mlp(block.norm2(x))
    return visual.merger(x).view(batch, count // MERGE**2, -1)


def _rms_norm(norm: Any, x: Tensor) -> Tensor:
    return F.rms_norm(x, norm.weight.shape, norm.weight, norm.variance_epsilon)


def decode(decoder: Any, x: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
    """The text model on embeddings [B, S, hidden]; positions [3, S] and bool mask [S, S] hold for all samples."""
    batch, size, width = x.shape
    cos, sin = decoder.rotary_emb(x, positions[:, None])
    cos, sin = cos[:, None], sin[:, None]
    for layer in decoder.layers:
        attention, mlp = layer.self_attn, layer.mlp
        h = _rms_norm(layer.input_layernorm, x)
        heads = [
            projection(h).view(batch, size, -1, attention.head_dim).transpose(1, 2)
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        ]
        q, k = _rotate(heads[0], cos, sin), _rotate(heads[1], cos, sin)
        k, v = (t.repeat_interleave(attention.num_key_value_groups, dim=1) for t in (k, heads[2]))
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + attention.o_proj(mixed.transpose(1, 2).reshape(batch, size, width))
        h = _rms_norm(layer.post_attention_layernorm, x)
        x = x + mlp.down_proj(F.silu(mlp.gate_proj(h)) * mlp.up_proj(h))
    return _rms_norm(decoder.norm, x)


def packed_logits(
    model: Qwen2VLForConditionalGeneration, vision: Tensor, prefix: Tensor, slots: Tensor, places: Tensor
) -> Tensor:
    """Logits at chosen places of every question slot.

    vision: [B, 64, hidden]; prefix: int64 [5] the text tokens around the image (four before, one behind);
    slots: int64 [B, Q, L]; places: int64 [B, Q, P], indices into L. Returns [B, Q, P, vocabulary].
    """
    decoder = model.model.language_model
    batch, questions, length = slots.shape
    around = decoder.embed_tokens(prefix).expand(batch, -1, -1)
    text = decoder.embed_tokens(slots.flatten(1))
    x = torch.cat([around[:, :TEXT_BEFORE_IMAGE], vision, around[:, TEXT_BEFORE_IMAGE:], text], dim=1)
    layout = packed_layout(questions, length)
    hidden = decode(decoder, x, layout.positions, layout.mask)
    starts = PREFIX + length * torch.arange(questions)[:, None]
    index = (places + starts).flatten(1)[..., None].expand(-1, -1, x.shape[-1])
    picked = hidden.gather(1, index).view(*places.shape, -1)
    return model.lm_head(picked)
