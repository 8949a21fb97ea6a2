"""Q-VLM's vision optimisation: each term of Eq. 8 to 10 against a direct computation, and the simulated tower."""

import json
import math

import pytest
import torch

from vlmq_serve.calibrate.activations import fake_quantize
from vlmq_serve.calibrate.capture import batch_inputs
from vlmq_serve.calibrate.chats import read_chats
from vlmq_serve.calibrate.cross_entropy import answer_loss
from vlmq_serve.calibrate.families import find_adapter
from vlmq_serve.calibrate.loading import load_processor
from vlmq_serve.calibrate.pipeline import calibrate
from vlmq_serve.calibrate.recipe import make_recipe
from vlmq_serve.calibrate.samples import CalibrationSample, build_samples
from vlmq_serve.calibrate.vision import Factors, VisionSimulation, quantized_tower, vision_linears
from vlmq_serve.calibrate.vision_clipping import equal_batches, learn_factors
from vlmq_serve.calibrate.vision_loss import jacobian_norms, level_entropy, vision_loss
from vlmq_serve.evaluate.loading import load_model
from vlmq_serve.evaluate.simulation import load_simulated
from vlmq_serve.format.errors import VLMQError
from vlmq_serve.format.headers import read_tensor_index
from vlmq_serve.format.shards import read_tensors

CPU = torch.device("cpu")


def recipe_of(**changes):
    given = {"method": "qvlm", "bits": 4, "group_size": 32, "activation_bits": 4, "simulated_vision": True}
    return make_recipe(**{**given, "samples": 2, "device": "cpu", **changes})


def test_entropy_equals_a_direct_computation():
    torch.manual_seed(0)
    x, factor, bits = torch.randn(3, 4), 0.8, 2
    sums = [0.0] * 4
    for row in x.tolist():
        low, high = min(factor * min(row), 0.0), max(factor * max(row), 0.0)
        step = (high - low) / 3
        for value in row:
            powers = [math.exp(-((value - (low + m * step)) ** 2) / step) for m in range(4)]
            sums = [s + p / sum(powers) / 12 for s, p in zip(sums, powers, strict=True)]
    expected = -sum(p * math.log(p) for p in sums)
    assert float(level_entropy(x, factor, bits)) == pytest.approx(expected, rel=1e-5)


def test_jacobian_norms_are_those_of_the_drift():
    torch.manual_seed(0)
    x, y = torch.randn(3, 4, requires_grad=True), torch.randn(4, requires_grad=True)
    drift = (x @ torch.arange(4.0)).norm()
    expected = torch.outer(x @ torch.arange(4.0), torch.arange(4.0)).norm() / drift
    torch.testing.assert_close(jacobian_norms(drift, [x, y]), torch.stack([expected.detach(), torch.tensor(0.0)]))


def test_gradients_of_the_range_pass_the_rounding():
    """Outside of the range dQ/dc is the end of the range, inside it is the error of rounding (LSQ)."""
    x, c = torch.tensor([5.0, 0.3]), torch.tensor(1.0, requires_grad=True)
    q = fake_quantize(x, c * 0.0, c * 1.5, 2)
    assert q.tolist() == [1.5, 0.5]
    torch.testing.assert_close(torch.autograd.grad(q[0], c, retain_graph=True)[0], torch.tensor(1.5))
    torch.testing.assert_close(torch.autograd.grad(q[1], c)[0], torch.tensor(0.5 - 0.3))


@pytest.fixture(scope="module")
def setting(tiny_model, data_file):
    model, adapter, processor = load_model(tiny_model), find_adapter(tiny_model), load_processor(tiny_model)
    model.requires_grad_(False)
    image = processor.tokenizer.convert_tokens_to_ids("<|image_pad|>")
    return model, adapter, list(build_samples(processor, read_chats(data_file)[:4], image))


def test_the_loss_is_the_sum_of_its_terms(setting):
    model, adapter, samples = setting
    sample = samples[0]
    names = vision_linears(model, adapter)
    assert names
    assert not any("merger" in name for name in names)
    simulation = VisionSimulation(4, 4, {name: Factors(0.9, 0.9) for name in names})
    inputs, modality = batch_inputs([sample], CPU), sample.modality[None]
    ends = {"tower": model.get_submodule(adapter.merger), "decoder": adapter.decoder_layers(model)[-1]}

    def run():
        seen = {}
        handles = [m.register_forward_hook(lambda _, __, out, k=k: seen.update({k: out})) for k, m in ends.items()]
        with torch.no_grad():
            logits = model(**inputs).logits
        for handle in handles:
            handle.remove()
        return seen["tower"].double(), seen["decoder"].double(), logits

    tower, decoder, _ = run()
    with quantized_tower(model, simulation):
        tower_q, decoder_q, logits = run()
    drift = float((tower_q - tower).norm() / tower.norm() + (decoder_q - decoder).norm() / decoder.norm())
    answers = float(answer_loss(logits, inputs["input_ids"], modality))
    assert drift > 0.01

    def loss(**weights):
        settings = {"vision_entropy": 0, "vision_error": 0, **weights}
        return vision_loss(model, adapter, inputs, modality, simulation, recipe_of(**settings)).item()

    assert loss() == pytest.approx(answers, rel=1e-4)
    assert loss(vision_error=3) == pytest.approx(answers + 3 * drift, rel=1e-4)
    entropy = loss(vision_entropy=2) - answers
    assert 0 < entropy < 2 * math.log(16)  # a weighted mean of entropies of 16 levels, times 2


def test_learning_lowers_the_loss_and_no_epochs_leave_the_ranges(setting):
    model, adapter, samples = setting
    recipe = recipe_of(vision_epochs=5)
    plain = learn_factors(model, adapter, samples, recipe_of(vision_epochs=0), CPU)
    learned = learn_factors(model, adapter, samples, recipe, CPU)
    assert {(f.weights, f.inputs) for f in plain.values()} == {(1.0, 1.0)}
    assert all(0.2 <= c <= 1 for f in learned.values() for c in (f.weights, f.inputs))
    losses = []
    for factors in (plain, learned):
        simulation = VisionSimulation(4, 4, factors)
        total = 0.0
        for sample in samples:
            inputs = batch_inputs([sample], CPU)
            total += vision_loss(model, adapter, inputs, sample.modality[None], simulation, recipe).item()
        losses.append(total)
    assert losses[1] < losses[0]


def test_batches_are_of_eight_however_short_the_samples_are():
    """Twenty of 10 tokens hold fewer tokens than one of 1,000."""
    samples = [
        CalibrationSample(i, "", {"input_ids": torch.zeros(1, length)}, torch.zeros(length, dtype=torch.uint8))
        for i, length in enumerate([10] * 20 + [1000])
    ]
    batches = equal_batches(samples)
    assert sorted(len(batch) for batch in batches) == [1, 4, 8, 8]
    assert sorted(sample.index for batch in batches for sample in batch) == list(range(21))
    assert all(len({sample.length for sample in batch}) == 1 for batch in batches)


def test_the_tower_is_simulated_and_stored_as_it_is(tiny_model, data_file, tmp_path):
    calibrate(tiny_model, tmp_path / "out", data_file, recipe_of(vision_epochs=1))
    report = calibrate(tiny_model, tmp_path / "plain", data_file, recipe_of(simulated_vision=False))
    tower = [name for name in read_tensor_index(tiny_model) if "visual" in name]
    before, after = read_tensors(tiny_model, tower), read_tensors(tmp_path / "out", tower)
    assert all(torch.equal(before[name], after[name]) for name in tower)
    assert "vision" not in report.details
    processor = load_processor(tiny_model)
    image = processor.tokenizer.convert_tokens_to_ids("<|image_pad|>")
    sample = next(iter(build_samples(processor, read_chats(data_file)[:1], image)))
    seen = []
    for load in (load_model, load_simulated):
        model = load(tmp_path / "out")
        model.model.visual.register_forward_hook(lambda _, __, out: seen.append(out))
        with torch.inference_mode():
            model(**sample.inputs)
    values = [out if isinstance(out, torch.Tensor) else out.last_hidden_state for out in seen]
    assert not torch.equal(values[0], values[1])


def test_chats_without_an_image_teach_the_tower_nothing(tiny_model, data_file, tmp_path):
    blind = [{"role": "user", "content": "Colour?"}, {"role": "assistant", "content": "red"}]
    for name, lines in (("mixed", data_file.read_text().splitlines()[:1]), ("blind", [])):
        file = data_file.with_name(f"{name}.jsonl")
        file.write_text("\n".join([*lines, json.dumps({"messages": blind})]))
        report = calibrate(tiny_model, tmp_path / name, file, recipe_of(vision_epochs=1, allow_text_only=True))
        learned = any(c < 1 for pair in report.details["vision"]["factors"].values() for c in pair)
        assert learned == bool(lines)


@pytest.mark.parametrize("changes", [{"method": "gptq"}, {"activation_bits": None}])
def test_it_belongs_to_qvlm_with_activations(changes):
    with pytest.raises(VLMQError, match="simulated_vision: needs method qvlm and activation_bits"):
        recipe_of(**changes)
