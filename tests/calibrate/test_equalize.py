"""Channel scale search against a search written out by hand, and the pipeline's AWQ and MBQ."""

import pytest
import torch

from vlmq_serve.calibrate.activations import fake_quantize
from vlmq_serve.calibrate.balance import modality_ratios, modality_weights
from vlmq_serve.calibrate.equalize import (
    RATIOS,
    ChannelSearch,
    TokenError,
    candidate_scales,
    equalize_block,
    scaled_rounding,
)
from vlmq_serve.calibrate.families.decoder import MLP
from vlmq_serve.calibrate.families.qwen2_vl import QWEN2_VL
from vlmq_serve.calibrate.linear_plan import LinearPlan
from vlmq_serve.calibrate.pipeline import calibrate
from vlmq_serve.calibrate.recipe import make_recipe
from vlmq_serve.calibrate.samples import ANSWER, PROMPT, VISION
from vlmq_serve.calibrate.simulation import ActivationScheme
from vlmq_serve.calibrate.solvers.solution import SolverOptions
from vlmq_serve.calibrate.streams import StreamItem
from vlmq_serve.evaluate.loading import load_model
from vlmq_serve.format.errors import VLMQError
from vlmq_serve.format.headers import read_tensor_index
from vlmq_serve.format.scheme import Scheme
from vlmq_serve.format.shards import read_tensors

SCHEME, OPTIONS = Scheme(2, 32), SolverOptions(torch.bfloat16)
KINDS = torch.tensor([[PROMPT, VISION, VISION, ANSWER, ANSWER]], dtype=torch.uint8)


class Gate(torch.nn.Module):
    """The parts of a decoder layer that its MLP block needs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.post_attention_layernorm = torch.nn.RMSNorm(32)
        self.mlp = torch.nn.Module()
        self.mlp.gate_proj, self.mlp.up_proj = (torch.nn.Linear(32, 64, bias=False) for _ in range(2))
        self.mlp.down_proj = torch.nn.Linear(64, 32, bias=False)
        self.mlp.forward = self._mlp
        self.requires_grad_(False)

    def _mlp(self, x):
        return self.mlp.down_proj(torch.nn.functional.silu(self.mlp.gate_proj(x)) * self.mlp.up_proj(x))

    def __deepcopy__(self, memo):
        made = Gate()
        made.load_state_dict(self.state_dict())
        return made


class OneBatch(list):
    """Streams of one batch that never moves."""


@pytest.fixture
def streams():
    torch.manual_seed(2)
    hidden = torch.randn(1, 5, 32) * torch.linspace(0.05, 4, 32)
    quantized = hidden + 0.2 * torch.randn_like(hidden)
    return OneBatch([StreamItem(0, hidden, quantized, KINDS, {})])


@pytest.mark.parametrize("activations", [None, ActivationScheme(4)])
@pytest.mark.parametrize("exposed", [False, True])
@pytest.mark.parametrize(
    "error",
    [TokenError(), TokenError(1, [torch.tensor([[0, 0.5, 0.5, 1, 1]])]),
     TokenError(2, [torch.tensor([[0, 2.0, 0, 0, 3]])], True)],
)  # fmt: skip
def test_scales_are_the_best_of_the_grid(streams, error, exposed, activations):
    layer = Gate()
    linears = {n: LinearPlan(n, 0, n, tuple(layer.get_parameter(f"{n}.weight").shape), torch.bfloat16, SCHEME)
               for group in MLP.linear_groups for n in group}  # fmt: skip
    folded = equalize_block(Gate(), layer, MLP, linears, streams, ChannelSearch(error, OPTIONS, exposed, activations))
    hidden = streams[0].quantized if exposed else streams[0].full
    x = layer.post_attention_layernorm(hidden)
    weights = error.weights[0][..., None] if error.weights else torch.ones(1, 5, 1)
    statistic = weights if error.weighted_statistic else torch.ones(1, 5, 1)
    magnitude = (x.abs() * statistic).sum((0, 1)) / statistic.sum()
    target = MLP.forward(layer, streams[0].full, {})
    errors = []
    for step in range(RATIOS):
        scales = candidate_scales(magnitude, step / RATIOS)
        trial = Gate()
        for name in ("gate_proj", "up_proj"):
            weight = trial.mlp.get_submodule(name).weight
            weight.copy_(scaled_rounding(weight, scales, SCHEME, OPTIONS))
        read = x
        if activations is not None:
            low, high = (x / scales).amin(-1, keepdim=True), (x / scales).amax(-1, keepdim=True)
            read = fake_quantize(x / scales, low, high, activations.bits) * scales
        output = hidden + trial.mlp.forward(read)
        difference = (output - target).abs() ** error.power
        errors.append(float((difference * weights).sum()))
    best = candidate_scales(magnitude, min(range(RATIOS), key=errors.__getitem__) / RATIOS)
    # What the stored norm really applies differs from the best scales by bf16's rounding only.
    applied = folded.weights["mlp.gate_proj"] / layer.mlp.gate_proj.weight
    torch.testing.assert_close(applied.median(0).values, best, rtol=2**-7, atol=0)
    assert min(errors) < errors[0]


def test_candidates_are_powers_centred_at_one():
    magnitude = torch.tensor([0.01, 1.0, 100.0])
    torch.testing.assert_close(candidate_scales(magnitude, 0.5), torch.tensor([0.1, 1.0, 10.0]))
    torch.testing.assert_close(candidate_scales(magnitude, 0.0), torch.ones(3))


def test_modality_ratios_by_hand():
    layers = []
    for o, down in (
        ((1, 4, 2, 6, 2), (1, 1, 1, 1, 1)),
        ((9, 1, 1, 10, 10), (1, 8, 0, 1, 1)),
        ((1, 8, 8, 2, 2), (0,) * 5),
    ):
        layers.append(
            {"self_attn.o_proj": [torch.tensor([o]).float()], "mlp.down_proj": [torch.tensor([down]).float()]}
        )
    ratios = modality_ratios(layers, QWEN2_VL, [KINDS])
    assert ratios == [[0.75, 1.0], [0.75, 4.0], [4.0, 1.0]]  # 0.1 is lifted to the median of 0.75, 0.1 and 4
    assert torch.equal(modality_weights([KINDS], 0.25)[0], torch.tensor([[0, 0.25, 0.25, 1, 1]]))


def final_states(folder, inputs):
    model = load_model(folder)
    seen = []
    model.model.language_model.layers[-1].register_forward_hook(lambda _, __, out: seen.append(out))
    with torch.inference_mode():
        model(**inputs)
    return seen[0]


def inputs_of(tiny_model, data_file):
    from vlmq_serve.calibrate.chats import read_chats
    from vlmq_serve.calibrate.loading import load_processor
    from vlmq_serve.calibrate.samples import build_sample

    processor = load_processor(tiny_model)
    chat = read_chats(data_file)[0]
    return dict(build_sample(processor, chat, processor.tokenizer.convert_tokens_to_ids("<|image_pad|>")).inputs)


@pytest.mark.parametrize("method", ["awq", "mbq"])
def test_folded_norms_reach_the_checkpoint(tiny_model, data_file, tmp_path, method):
    """At 8 bits the written model computes what the source does: its norms fit its weights."""
    report = calibrate(tiny_model, tmp_path / "out", data_file, make_recipe(
        method=method, bits=8, group_size=32, samples=8, device="cpu"))  # fmt: skip
    inputs = inputs_of(tiny_model, data_file)
    wanted, got = final_states(tiny_model, inputs), final_states(tmp_path / "out", inputs)
    error = float((got - wanted).square().sum() / wanted.square().sum())
    assert error < 3 * report.layers[-1].errors["all"] < 0.01
    names = [n for n in read_tensor_index(tiny_model) if "layers.0" in n and ("layernorm" in n or "v_proj.bias" in n)]
    before, after = read_tensors(tiny_model, names), read_tensors(tmp_path / "out", names)
    assert len(names) == 3
    assert any(not torch.equal(before[name], after[name]) for name in names)


@pytest.mark.parametrize("method", ["awq", "mbq"])
def test_equalized_rounding_beats_rounding(tiny_model, data_file, tmp_path, method):
    errors = {}
    for name in ("rtn", method, f"{method}-gptq"):
        base = {"base": "gptq"} if name.endswith("gptq") else {}
        recipe = make_recipe(method=name.partition("-")[0], bits=3, group_size=-1, samples=8, device="cpu", **base)
        report = calibrate(tiny_model, tmp_path / name, data_file, recipe)
        errors[name] = report.layers[-1].errors["answer" if method == "mbq" else "all"]
    assert errors[method] < errors["rtn"]
    assert errors[f"{method}-gptq"] < 0.9 * errors["rtn"]


def test_an_interrupted_run_goes_on_with_its_norms(tiny_model, data_file, tmp_path, interrupted_at):
    from vlmq_serve.calibrate import layer as layer_module

    recipe = make_recipe(method="awq", bits=3, group_size=32, samples=3, device="cpu")
    calibrate(tiny_model, tmp_path / "whole", data_file, recipe)
    with interrupted_at(layer_module, "measure_importance", 3):
        calibrate(tiny_model, tmp_path / "out", data_file, recipe)
    calibrate(tiny_model, tmp_path / "out", data_file, recipe, resume=True)
    names = list(read_tensor_index(tmp_path / "whole"))
    first, second = read_tensors(tmp_path / "whole", names), read_tensors(tmp_path / "out", names)
    assert all(torch.equal(first[name], second[name]) for name in names)


def test_left_out_values_stop_the_fold_before_them(tiny_model, data_file, tmp_path):
    recipe = make_recipe(
        method="awq",
        bits=3,
        group_size=32,
        samples=4,
        device="cpu",
        ignore=["visual", "lm_head", "q_proj", "k_proj", "v_proj"],
    )
    calibrate(tiny_model, tmp_path / "out", data_file, recipe)
    names = [n for n in read_tensor_index(tiny_model) if "v_proj" in n or "input_layernorm" in n]
    before, after = read_tensors(tiny_model, names), read_tensors(tmp_path / "out", names)
    assert all(torch.equal(before[name], after[name]) for name in names)


def test_a_base_that_does_not_fit_is_one_error():
    with pytest.raises(VLMQError, match="method awq allows auto, rtn, gptq"):
        make_recipe(method="awq", base="gptaq")
