"""What is quantized beside the decoder layers: the head and the vision tower; and linears that no group fits."""

import json
import shutil
import weakref
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.calibrate.test_families import make_model  # noqa: F401  # a fixture
from vlmq_serve.calibrate import pipeline
from vlmq_serve.calibrate.memory_estimate import estimate_bytes
from vlmq_serve.calibrate.pipeline import calibrate
from vlmq_serve.calibrate.planning import make_plan
from vlmq_serve.calibrate.recipe import make_recipe
from vlmq_serve.calibrate.rounded_parts import round_parts
from vlmq_serve.calibrate.settings import override_of
from vlmq_serve.evaluate.loading import load_model
from vlmq_serve.format.config import QuantizationSpec
from vlmq_serve.format.errors import VLMQError
from vlmq_serve.format.scheme import Scheme

BOTH = {"bits": 3, "group_size": 32, "lm_head": "w8", "vision": "w8g32", "device": "cpu"}


def spec_of(folder):
    return QuantizationSpec.from_dict(json.loads((folder / "config.json").read_text())["quantization_config"])


@pytest.fixture(scope="module")
def calibrated(tiny_model, data_file, tmp_path_factory):
    """By VLMQ with a head and a tower of 8 bits."""
    out = tmp_path_factory.mktemp("parts") / "out"
    return out, calibrate(tiny_model, out, data_file, make_recipe(samples=8, **BOTH))


def test_a_tied_head_gets_a_weight_of_its_own_and_the_embeddings_stay(tiny_model, calibrated):
    out, _ = calibrated
    config, tensors = json.loads((out / "config.json").read_text()), load_file(out / "model.safetensors")
    assert config["tie_word_embeddings"] is False
    assert config["text_config"]["tie_word_embeddings"] is False
    name = next(key for key in tensors if key.endswith("embed_tokens.weight"))
    assert torch.equal(tensors[name], load_file(tiny_model / "model.safetensors")[name])
    head = load_model(out).lm_head.weight
    assert torch.allclose(head, tensors[name].float(), atol=0.1 * float(tensors[name].abs().max()))


def test_the_disk_must_hold_a_head_that_was_tied_twice(tiny_model, tmp_path, monkeypatch):
    """Once in the work folder and once in the checkpoint, beside the embeddings."""
    settings = {"method": "rtn", "bits": 4, "group_size": 32}
    without, chosen = make_recipe(**settings), make_recipe(**settings, lm_head="w8")
    plan = make_plan(tiny_model, chosen)
    assert plan.head.bytes_after > 0
    assert plan.bytes_needed == make_plan(tiny_model, without).bytes_needed + 2 * plan.head.bytes_after
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=plan.bytes_needed - 1))
    with pytest.raises(VLMQError, match="free some space"):
        calibrate(tiny_model, tmp_path / "out", None, chosen)
    calibrate(tiny_model, tmp_path / "out", None, without)


def test_the_report_has_the_tower_and_the_head(calibrated):
    _, report = calibrated
    assert [layer.index for layer in report.layers] == [0, 1, 2, 3, 4]
    vision, head = report.layers[3:]
    assert {row.scheme for row in vision.linears} == {"w8g32"}
    assert max(row.weight_error for row in vision.linears) < 1e-4
    assert head.linears[0].name == "lm_head"
    assert 0 < head.linears[0].errors["all"] < 1e-4


def test_the_head_is_solved_on_the_hidden_states_that_reach_it(tiny_model, data_file, tmp_path):
    """At 3 bits rounding to nearest must be worse on these inputs than GPTQ."""
    folder = tmp_path / "gptq"
    settings = {"bits": 8, "group_size": 32, "lm_head": "w3g32", "samples": 8, "device": "cpu"}
    report = calibrate(tiny_model, folder, data_file, make_recipe(method="gptq", **settings))
    rounded = calibrate(tiny_model, tmp_path / "rtn", None, make_recipe(method="rtn", **settings))
    ours, theirs = report.layers[-1].linears[0], rounded.layers[-1].linears[0]
    assert ours.weight_error > theirs.weight_error
    wanted, embeddings = load_model(tiny_model), "model.language_model.embed_tokens"
    plain, hidden = wanted.get_submodule(embeddings).weight.detach(), states(wanted, tiny_model, data_file)
    heads = [load_model(path).lm_head.weight.detach() for path in (folder, tmp_path / "rtn")]
    errors = [float((hidden @ (head - plain).T).square().sum()) for head in heads]
    assert errors[0] < errors[1]


@torch.no_grad()
def states(model, folder, data_file):
    """What enters the head for the text tokens of some samples."""
    from tests.calibrate.test_families import samples_of
    from vlmq_serve.calibrate.samples import VISION

    seen = []
    model.model.language_model.norm.register_forward_hook(lambda _, __, output: seen.append(output[0]))
    samples = samples_of(folder, data_file, 8)
    for sample in samples:
        model(**sample.inputs, use_cache=False)
    return torch.cat([h[s.modality != VISION] for h, s in zip(seen, samples, strict=True)])


def test_the_decoder_is_calibrated_on_the_quantized_tower(tiny_model, data_file, tmp_path):
    """A tower of 2 bits changes what the first layer sees, so its codes cannot be those below a plain tower."""
    settings = {"method": "gptq", "bits": 3, "group_size": 32, "samples": 8, "device": "cpu"}
    for name, vision in (("plain", None), ("w2", "w2g32")):
        calibrate(tiny_model, tmp_path / name, data_file, make_recipe(vision=vision, **settings))
    codes = [load_file(tmp_path / name / "model.safetensors") for name in ("plain", "w2")]
    key = next(key for key in codes[0] if key.endswith("layers.0.self_attn.q_proj.qweight"))
    assert not torch.equal(codes[0][key], codes[1][key])


ALL = {**BOTH, "embeddings": "w4g32"}


@pytest.fixture(scope="module")
def everything(tiny_model, data_file, tmp_path_factory):
    """With embeddings of 4 bits as well."""
    out = tmp_path_factory.mktemp("all") / "out"
    return out, calibrate(tiny_model, out, data_file, make_recipe(samples=8, **ALL))


def test_embeddings_are_packed_beside_a_head_of_their_own(tiny_model, everything):
    out, report = everything
    tensors = load_file(out / "model.safetensors")
    names = [name.rpartition(".")[0] for name in tensors if name.endswith(("embed_tokens.qweight", "lm_head.qweight"))]
    assert len(names) == 2
    assert not any(f"{name}.weight" in tensors for name in names)
    assert [(layer.index, layer.linears[0].scheme) for layer in report.layers[3:]] == [
        (3, "w8g32"),
        (4, "w8g32"),
        (5, "w4g32"),
    ]
    plain, model = load_model(tiny_model), load_model(out)
    source, table = (m.get_input_embeddings().weight.detach() for m in (plain, model))
    errors = [float((weight - source).norm() / source.norm()) for weight in (table, model.lm_head.weight.detach())]
    assert errors[1] < 0.01 < errors[0] < 0.2


def test_the_decoder_is_calibrated_on_the_rounded_embeddings(everything, calibrated):
    codes = [load_file(folder / "model.safetensors") for folder, _ in (everything, calibrated)]
    key = next(key for key in codes[0] if key.endswith("layers.0.self_attn.q_proj.qweight"))
    assert not torch.equal(codes[0][key], codes[1][key])


@pytest.mark.parametrize("tied", [True, False])
def test_the_plan_counts_what_rounded_embeddings_take(tiny_model, tmp_path, tied):
    """A table beside the one that a tied head keeps; one that nothing else uses is replaced."""
    source = tiny_model if tied else untied(tiny_model, tmp_path)
    settings = {"method": "gptq", "dtype": "float32", **BOTH}
    plan = make_plan(source, make_recipe(**settings, embeddings="w8"))
    model = load_model(source)
    before = bytes_of(model)
    round_parts(model, plan, None)
    taken = bytes_of(model) - before
    assert (taken > 0) == tied
    assert estimate_bytes(plan, True) - estimate_bytes(make_plan(source, make_recipe(**settings)), True) == taken


def test_rounded_parts_leave_the_memory_before_the_layers_begin(tiny_model, data_file, tmp_path, monkeypatch):
    """Their packed weights are in the work folder; on a GPU a table of embeddings would take what the layers need."""
    alive = []

    def rounded(*given):
        found = round_parts(*given)
        alive.extend(weakref.ref(weight) for _, packed in found for weight in packed.values())
        assert len(alive) > 1
        return found

    def begin(*given):
        assert [ref for ref in alive if ref() is not None] == []
        raise VLMQError("begun")

    monkeypatch.setattr(pipeline, "round_parts", rounded)
    monkeypatch.setattr(pipeline, "quantize_layer", begin)
    with pytest.raises(VLMQError, match="begun"):
        calibrate(tiny_model, tmp_path / "out", data_file, make_recipe(samples=2, **ALL))


def untied(model, folder):
    """A copy of `model` with a head of its own."""
    copy = shutil.copytree(model, folder / "untied")
    tensors, config = load_file(copy / "model.safetensors"), json.loads((copy / "config.json").read_text())
    tensors["lm_head.weight"] = next(v for k, v in tensors.items() if k.endswith("embed_tokens.weight")).clone()
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    config |= {"tie_word_embeddings": False, "text_config": config["text_config"] | {"tie_word_embeddings": False}}
    (copy / "config.json").write_text(json.dumps(config))
    return copy


def bytes_of(model):
    """Memory of all weights, shared ones once."""
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    return sum(storages.values())


def test_tied_embeddings_need_a_head(tiny_model):
    with pytest.raises(VLMQError, match=r"embeddings: got w8g32, but they are the head's weight too.*give `lm_head`"):
        make_plan(tiny_model, make_recipe(method="rtn", group_size=32, embeddings="w8"))


def test_tied_embeddings_need_a_head_that_gets_its_scheme(tiny_model):
    """64 hidden units do not divide into groups of 128, so this head would be left as it is."""
    recipe = make_recipe(method="rtn", group_size=32, embeddings="w8g64", lm_head="w8g128", unfit="ignore")
    with pytest.raises(VLMQError, match="embeddings: got w8g64, but they are the head's weight too"):
        make_plan(tiny_model, recipe)


@pytest.mark.parametrize("entry", ["embed_tokens", "model.embed_tokens"])
def test_embeddings_cannot_be_ignored_and_quantized(tiny_model, entry):
    recipe = make_recipe(method="rtn", group_size=32, embeddings="w8", lm_head="w8", ignore=[entry])
    with pytest.raises(VLMQError, match=r"ignore: .*remove one of the two"):
        make_plan(tiny_model, recipe)


def test_embeddings_that_vllm_builds_without_a_name_are_refused(make_model):  # noqa: F811
    folder = make_model("internvl")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["model_type"] = "llama"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(VLMQError, match="embeddings: got w8g32 for a decoder of type 'llama'"):
        make_plan(folder, make_recipe(method="rtn", bits=4, group_size=32, embeddings="w8", lm_head="w8"))


def test_an_interrupted_run_goes_on_with_its_parts(tiny_model, data_file, tmp_path, everything):
    from vlmq_serve.calibrate.progress import SilentProgress

    class Stopping(SilentProgress):
        def advance(self, detail=""):
            if detail.startswith("layer 1"):
                raise KeyboardInterrupt

    recipe = make_recipe(samples=8, **ALL)
    with pytest.raises(KeyboardInterrupt):
        calibrate(tiny_model, tmp_path / "out", data_file, recipe, progress=Stopping())
    calibrate(tiny_model, tmp_path / "out", data_file, recipe, resume=True)
    first, second = (load_file(path / "model.safetensors") for path in (everything[0], tmp_path / "out"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize(
    ("family", "quantized", "plain"),
    [
        ("qwen2_5_vl", ["visual.blocks.0.attn.qkv", "visual.merger.mlp.2"], ["visual.blocks.0.mlp.down_proj"]),
        ("qwen3_vl", ["visual.deepstack_merger_list.1.linear_fc1"], ["visual.pos_embed", "mlp.linear_fc2"]),
        ("llava_onevision", ["vision_tower.encoder.layers.1.self_attn.k_proj"], ["vision_tower.encoder.layers.0.mlp"]),
    ],
)
def test_towers_of_other_families(make_model, tmp_path, family, quantized, plain):  # noqa: F811
    """48 inputs are no multiple of 32, and SigLIP's MLP is one that vLLM leaves alone at these widths."""
    folder = make_model(family)
    plan = make_plan(folder, make_recipe(method="rtn", bits=4, group_size=32, vision="w4g32", lm_head="w8"))
    schemes = {linear.name: linear.scheme for linear in plan.vision}
    for end in quantized:
        assert any(name.endswith(end) and scheme == Scheme(4, 32) for name, scheme in schemes.items()), end
    for part in plain:
        found = [linear for linear in plan.vision if part in linear.name and linear.scheme is None]
        assert found, part
        assert all(linear.reason for linear in found)
    calibrate(folder, tmp_path / "out", None, plan.recipe.model_copy(update={"ignore": None, "overrides": {}}))
    spec = spec_of(tmp_path / "out")
    for linear in plan.all_linears:
        assert spec.scheme_for(linear.name) == linear.scheme
    load_model(tmp_path / "out")


def test_a_tower_that_vllm_does_not_quantize_is_refused(make_model):  # noqa: F811
    with pytest.raises(VLMQError, match="vision: got w8g32 for 'internvl', whose vision tower vLLM builds without"):
        make_plan(make_model("internvl"), make_recipe(method="rtn", bits=4, group_size=32, vision="w8"))


def test_a_checkpoint_without_a_tower_is_one_error(tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model, tmp_path / "decoder")
    tensors = load_file(folder / "model.safetensors")
    save_file({k: t for k, t in tensors.items() if "visual" not in k}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(VLMQError, match=r"vision: no tensors below model\.visual and visual"):
        make_plan(folder, make_recipe(method="rtn", bits=4, group_size=32, vision="w8"))


def test_linears_that_no_group_fits(tiny_model):
    """96 inputs of down_proj: neither 64 nor 128 divide them, 32 does."""
    with pytest.raises(VLMQError, match=r"q_proj: group_size: got 128 for K=64.*use one of \[32, 64, -1\]"):
        make_plan(tiny_model, make_recipe(method="rtn", group_size=128))
    ignored = make_plan(tiny_model, make_recipe(method="rtn", group_size=64, unfit="ignore"))
    left = {linear.local: linear.reason for linear in ignored.linears if linear.scheme is None}
    assert left == {"mlp.down_proj": "K=96 does not fit w4g64"}
    assert sum(name.endswith("mlp.down_proj") for name in ignored.recipe.ignore) == 3
    smaller = make_plan(tiny_model, make_recipe(method="rtn", group_size=64, unfit="group"))
    assert {str(linear.scheme) for linear in smaller.linears if linear.local == "mlp.down_proj"} == {"w4g32"}
    assert smaller.by_layer[0]["mlp.up_proj"].scheme == Scheme(4, 64)


def test_embeddings_that_no_group_fits_stay(tiny_model, data_file, tmp_path):
    settings = {"bits": 4, "group_size": 32, "embeddings": "w8g128", "lm_head": "w8g128", "unfit": "ignore"}
    source, out = untied(tiny_model, tmp_path), tmp_path / "out"
    report = calibrate(source, out, data_file, make_recipe(method="gptq", samples=4, device="cpu", **settings))
    assert [layer.linears for layer in report.layers[3:]] == [(), ()]
    name = "model.embed_tokens.weight"
    assert torch.equal(load_file(out / "model.safetensors")[name], load_file(source / "model.safetensors")[name])


def test_overrides_of_the_decoder_are_not_those_of_the_tower(make_model):  # noqa: F811
    folder = make_model("llava_onevision")
    overrides = {"v_proj": "w8g32", "k_proj": "w8g32", "q_proj": "w8g32", "vision_tower.encoder.layers.1": "w2g32"}
    recipe = make_recipe(method="rtn", group_size=32, vision="w4g32", overrides=overrides)
    plan = make_plan(folder, recipe)
    schemes = {linear.name: str(linear.scheme) for linear in plan.vision if "v_proj" in linear.name}
    assert sorted(schemes.values()) == ["w2g32", "w4g32"]
    assert str(plan.by_layer[0]["self_attn.v_proj"].scheme) == "w8g32"
    with pytest.raises(VLMQError, match="overrides: 'fc1' fits no linear that is quantized"):
        make_plan(folder, recipe.model_copy(update={"overrides": {"fc1": override_of(Scheme(2, 32))}}))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lm_head": "w5g32"}, "lm_head: bits: got 5"),
        ({"vision": "int4"}, "vision: scheme: got 'int4"),
        ({"unfit": "pad"}, "unfit: got 'pad'"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(VLMQError, match=message):
        make_recipe(**settings)


def test_a_part_cannot_be_ignored_and_quantized(tiny_model):
    with pytest.raises(VLMQError, match="ignore: got 'lm_head', which has a scheme of its own"):
        make_plan(tiny_model, make_recipe(method="rtn", group_size=32, lm_head="w8", ignore=["visual", "lm_head"]))


@pytest.mark.parametrize("ignore", [[], ["lm_head"], ["layers.1"]])
def test_what_has_no_scheme_is_left_alone_whatever_a_recipe_ignores(tiny_model, tmp_path, ignore):
    """Else vLLM asks for a packed vision tower, and the checkpoint cannot be served."""
    calibrate(tiny_model, tmp_path / "out", None, make_recipe(method="rtn", group_size=32, ignore=ignore))
    spec, tensors = spec_of(tmp_path / "out"), load_file(tmp_path / "out" / "model.safetensors")
    plain = [name.removesuffix(".weight") for name in tensors if name.endswith(".weight") and "norm" not in name]
    assert any("visual" in name for name in plain)
    assert [name for name in [*plain, "lm_head"] if "embed" not in name and spec.scheme_for(name)] == []


def test_experts_are_refused(tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    prefix = next(key for key in tensors if key.endswith("layers.0.mlp.up_proj.weight")).removesuffix("up_proj.weight")
    tensors[f"{prefix}experts.0.up_proj.weight"] = torch.zeros(32, 64)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(VLMQError, match=r"experts\.0\.up_proj\.weight: got mixture-of-experts weights"):
        make_plan(folder, make_recipe(method="rtn", group_size=32))
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "qwen3_vl_moe", "text_config": {"num_experts": 8}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(VLMQError, match="'qwen3_vl_moe' with mixture-of-experts layers"):
        make_plan(folder, make_recipe(method="rtn", group_size=32))
