"""Gradients of the answers' cross-entropy against finite differences through the whole model."""

import pytest
import torch

from vlmq_serve.calibrate.capture import batch_inputs
from vlmq_serve.calibrate.chats import read_chats
from vlmq_serve.calibrate.cross_entropy import answer_gradients, answer_loss
from vlmq_serve.calibrate.families.qwen2_vl import QWEN2_VL
from vlmq_serve.calibrate.loading import load_model, load_processor
from vlmq_serve.calibrate.samples import ANSWER, PROMPT, VISION, build_samples


def test_loss_is_the_sum_over_answer_tokens():
    logits = torch.randn(2, 5, 7)
    ids = torch.randint(7, (2, 5))
    kinds = torch.tensor([[PROMPT, VISION, ANSWER, ANSWER, PROMPT], [ANSWER, PROMPT, PROMPT, PROMPT, ANSWER]])
    expected = sum(
        -float(logits[b, t - 1].log_softmax(-1)[ids[b, t]])
        for b in range(2)
        for t in range(1, 5)
        if kinds[b, t] == ANSWER
    )
    assert float(answer_loss(logits, ids, kinds)) == pytest.approx(expected, rel=1e-5)


@pytest.fixture(scope="module")
def case(tiny_model, data_file):
    model = load_model(tiny_model, torch.float64)
    processor = load_processor(tiny_model)
    chats = [chat for chat in read_chats(data_file)][:6]
    samples = list(build_samples(processor, chats, QWEN2_VL.image_token_id(model.config)))
    same = [sample for sample in samples if sample.length == samples[0].length][:2]
    inputs = batch_inputs(same, torch.device("cpu"))
    return model, inputs, torch.stack([sample.modality for sample in same])


@pytest.mark.parametrize(("index", "linear"), [(0, "self_attn.v_proj"), (2, "mlp.down_proj")])
def test_equal_finite_differences(case, index, linear):
    model, inputs, modality = case
    layers = QWEN2_VL.decoder_layers(model)
    got = answer_gradients(model, layers, QWEN2_VL.linears, inputs, modality)[index][linear]
    module = layers[index].get_submodule(linear)
    first_answer = int((modality[0] == ANSWER).nonzero()[0])
    token, step, slopes = first_answer - 1, 1e-3, []  # RMSNorm works in fp32: small steps drown
    for channel in range(module.out_features):
        ends = []
        for sign in (1, -1):

            def nudge(_, __, output, channel=channel, sign=sign):
                output[0, token, channel] += sign * step
                return output

            handle = module.register_forward_hook(nudge)
            with torch.no_grad():
                logprobs = model(**inputs).logits.log_softmax(-1)
            chosen = logprobs[:, :-1].gather(2, inputs["input_ids"][:, 1:, None])[..., 0]
            ends.append(-float(chosen[modality[:, 1:] == ANSWER].sum()))
            handle.remove()
        slopes.append(abs(ends[0] - ends[1]) / (2 * step))
    assert float(got[0, token]) == pytest.approx(sum(slopes) / len(slopes), rel=0.01)


def test_tokens_behind_the_last_answer_have_no_gradient_in_the_last_layer(case):
    model, inputs, modality = case
    layers = QWEN2_VL.decoder_layers(model)
    last = answer_gradients(model, layers, QWEN2_VL.linears, inputs, modality)[-1]["self_attn.o_proj"]
    predicting = torch.zeros_like(modality, dtype=torch.bool)
    predicting[:, :-1] = modality[:, 1:] == ANSWER
    assert (last[~predicting] == 0).all()
    assert (last[predicting] > 0).all()
