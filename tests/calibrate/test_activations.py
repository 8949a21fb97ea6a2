"""Simulated activations: the rounding against one written out by hand, ranges, and both through the pipeline."""

import pytest
import torch

from vlmq_serve.calibrate.activations import (
    InputQuantizer,
    fake_quantize,
    observe,
    quantized_inputs,
    range_tensors,
    read_quantizers,
    span,
)
from vlmq_serve.calibrate.chats import read_chats
from vlmq_serve.calibrate.loading import load_processor
from vlmq_serve.calibrate.pipeline import calibrate
from vlmq_serve.calibrate.recipe import make_recipe
from vlmq_serve.calibrate.samples import build_samples, choose_chats
from vlmq_serve.calibrate.simulation import ActivationScheme, parse_setting
from vlmq_serve.evaluate.loading import load_model, read_packed, read_spec
from vlmq_serve.evaluate.simulation import load_simulated
from vlmq_serve.format.errors import VLMQError


def by_hand(value: float, low: float, high: float, bits: int) -> float:
    low, high = min(low, 0.0), max(high, 0.0)
    step = (high - low) / (2**bits - 1)
    zero = round(-low / step)
    return (min(max(round(value / step) + zero, 0), 2**bits - 1) - zero) * step


@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize(("low", "high"), [(-1.3, 2.9), (0.4, 5.0), (-3.0, -0.2)])
def test_rounding_equals_one_by_hand(bits, low, high):
    x = torch.linspace(-4, 6, 331, dtype=torch.float64)
    got = fake_quantize(x, torch.tensor(low), torch.tensor(high), bits)
    wanted = torch.tensor([by_hand(v, low, high, bits) for v in x.tolist()], dtype=torch.float64)
    # fp32 inside: a value at the border of two levels may fall on either side.
    assert int((got - wanted).abs().gt(1e-4).sum()) <= 1
    assert got.dtype == x.dtype
    assert len(got.unique()) <= 2**bits


@pytest.mark.parametrize("level", [1.0, 0.995, 0.98, 0.9])
@pytest.mark.parametrize("kind", ["token", "channel", "tensor"])
def test_ranges_are_quantiles(kind, level):
    torch.manual_seed(0)
    x = torch.randn(3, 40, 24) + 1
    low, high = span(x, ActivationScheme(8, kind), level)
    if kind == "token":
        wanted = x.quantile(1 - level, -1, keepdim=True), x.quantile(level, -1, keepdim=True)
    elif kind == "channel":
        wanted = x.reshape(-1, 24).quantile(1 - level, 0), x.reshape(-1, 24).quantile(level, 0)
    else:
        wanted = x.reshape(-1).quantile(1 - level)[None], x.reshape(-1).quantile(level)[None]
    torch.testing.assert_close(low, wanted[0])
    torch.testing.assert_close(high, wanted[1])


def test_observed_ranges_are_fixed_and_cover_all_batches():
    batches = [torch.randn(2, 5, 8), 9 * torch.randn(1, 7, 8)]
    quantizer = observe(ActivationScheme(8, "channel"), batches)
    rows = torch.cat([b.reshape(-1, 8) for b in batches])
    assert quantizer.fixed is not None
    torch.testing.assert_close(quantizer.fixed[0], rows.amin(0))
    torch.testing.assert_close(quantizer.fixed[1], rows.amax(0))
    again = read_quantizers(ActivationScheme(8, "channel"), range_tensors({"o": quantizer}))["o"]
    assert torch.equal(again(batches[0]), quantizer(batches[0]))
    assert float(quantizer(100 * batches[1]).max()) <= float(rows.max()) * 1.01


def test_scales_are_undone_behind_the_rounding():
    """Behind folded scales a linear reads x / s and its weight holds s: together Q(x / s) s."""
    x, scales = torch.randn(4, 16), torch.rand(16) + 0.5
    scheme = ActivationScheme(4)
    plain = InputQuantizer(scheme)(x / scales) * scales
    torch.testing.assert_close(InputQuantizer(scheme, scales=scales)(x), plain)


def test_hooks_end_with_their_context():
    layer = torch.nn.Sequential(torch.nn.Linear(8, 8))
    x = torch.randn(3, 8)
    before = layer(x)
    with quantized_inputs(layer, {"0": InputQuantizer(ActivationScheme(4))}):
        assert not torch.equal(layer(x), before)
    assert torch.equal(layer(x), before)


def test_scheme_strings():
    assert parse_setting("w4g64a8") == {"bits": 4, "group_size": 64, "symmetric": False, "activation_bits": 8}
    assert parse_setting("w2g-1s") == {"bits": 2, "group_size": -1, "symmetric": True}
    assert str(make_recipe(**parse_setting("w6g64a6")).scheme) == "w6g64"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 6}, "exists for simulated activations only"),
        ({"bits": 6, "activation_bits": 6, "symmetric": True}, "symmetric"),
        ({"activation_bits": 5}, "activation_bits: got 5"),
        ({"overrides": {"down_proj": "w4g64a8"}}, "unknown key"),
    ],
)
def test_settings_that_do_not_exist_are_one_error(settings, message):
    with pytest.raises(VLMQError, match=message):
        make_recipe(**settings)


def last_states(model, inputs):
    seen = []
    handle = model.model.language_model.layers[-1].register_forward_hook(lambda _, __, out: seen.append(out))
    with torch.inference_mode():
        model(**inputs)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("method", ["rtn", "gptq", "tlq", "qvlm"])
@pytest.mark.parametrize("kind", ["token", "channel", "tensor"])
def test_the_report_s_error_is_that_of_the_simulated_checkpoint(tiny_model, data_file, tmp_path, method, kind):
    """What calibration saw of its own path is what evaluation computes, ranges from the file included."""
    recipe = make_recipe(method=method, bits=4, group_size=32, activation_bits=4, activation_range=kind, samples=4,
                         device="cpu")  # fmt: skip
    report = calibrate(tiny_model, tmp_path / "out", data_file, recipe)
    processor = load_processor(tiny_model)
    image = processor.tokenizer.convert_tokens_to_ids("<|image_pad|>")
    models = [load_model(tiny_model), load_model(tmp_path / "out"), load_simulated(tmp_path / "out")]
    sums = torch.zeros(3)
    for sample in build_samples(processor, choose_chats(read_chats(data_file), 4, 0, False), image):
        wanted, weights, both = (last_states(model, dict(sample.inputs)) for model in models)
        sums += torch.stack([x.square().sum() for x in (wanted, weights - wanted, both - wanted)])
    energy, weights_only, simulated = sums.tolist()
    assert simulated / energy == pytest.approx(report.layers[-1].errors["all"], rel=1e-3)
    assert simulated > 1.2 * weights_only
    assert read_spec(tmp_path / "out").settings["activation_bits"] == 4


def test_six_bits_live_in_words_of_eight(tiny_model, tmp_path):
    recipe = make_recipe(method="rtn", bits=6, group_size=32, activation_bits=6)
    calibrate(tiny_model, tmp_path / "out", None, recipe)
    spec = read_spec(tmp_path / "out")
    assert spec is not None
    assert str(spec.scheme) == "w8g32"
    packed = read_packed(tmp_path / "out", spec)
    assert max(int(weight.codes().max()) for weight in packed.values()) == 63
    assert spec.settings["activation_bits"] == 6


def test_an_interrupted_run_goes_on_with_its_ranges(tiny_model, data_file, tmp_path, interrupted_at):
    from vlmq_serve.calibrate import pipeline
    from vlmq_serve.format.headers import read_tensor_index
    from vlmq_serve.format.shards import read_tensors

    recipe = make_recipe(method="gptq", bits=4, group_size=32, activation_bits=4, activation_range="channel", samples=3,
                         device="cpu")  # fmt: skip
    calibrate(tiny_model, tmp_path / "whole", data_file, recipe)
    with interrupted_at(pipeline, "quantize_layer", 2):
        calibrate(tiny_model, tmp_path / "out", data_file, recipe)
    calibrate(tiny_model, tmp_path / "out", data_file, recipe, resume=True)
    names = list(read_tensor_index(tmp_path / "whole"))
    first, second = read_tensors(tmp_path / "whole", names), read_tensors(tmp_path / "out", names)
    assert all(torch.equal(first[name], second[name]) for name in names)


def test_commands_say_that_activations_were_simulated(tiny_model, data_file, tmp_path):
    from typer.testing import CliRunner

    from vlmq_serve.cli import app

    out = tmp_path / "out"
    calibrate(tiny_model, out, None, make_recipe(method="rtn", bits=4, group_size=32, activation_bits=8))
    run = CliRunner().invoke
    asked = ["eval", str(out), "--data", str(data_file), "--limit", "2"]
    assert "calibrated for simulated 8-bit activations" in run(app, ["inspect", str(out)]).stdout
    assert "activations of 16 bits, as served" in run(app, asked).stdout
    simulated = run(app, [*asked, "--simulate"])
    assert simulated.exit_code == 0
    assert "16 bits, as served" not in simulated.stdout
    assert "16-bit activations" in run(app, ["eval", "http://x/v1", *asked[2:], "--simulate"]).stderr
    plain = run(app, ["eval", str(tiny_model), *asked[2:], "--simulate"])
    assert plain.exit_code == 1
    assert "has simulated no activations" in plain.stderr
