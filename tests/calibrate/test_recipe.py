import pytest

from vlmq_serve.calibrate.recipe import Recipe, load_recipe, make_recipe
from vlmq_serve.calibrate.unused import ALWAYS_READ, unused_settings
from vlmq_serve.format.errors import VLMQError
from vlmq_serve.format.scheme import Scheme


def test_yaml_with_overrides_and_options_that_win(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("method: gptq\nbits: 3\ngroup_size: 64\noverrides:\n  down_proj: w4g32s\n  o_proj: {bits: 4}\n")
    recipe = load_recipe(file, bits=2)
    assert recipe.method == "gptq"
    assert recipe.scheme == Scheme(2, 64)
    assert recipe.override_schemes == {"down_proj": Scheme(4, 32, True), "o_proj": Scheme(4, 64)}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 5}, "bits: got 5, allowed"),
        ({"group_size": 100}, "group_size: got 100, allowed"),
        ({"method": "awq2"}, "method: got 'awq2'.*'rtn'"),
        ({"bit": 4}, "unknown key 'bit'; allowed: .*bits"),
        ({"overrides": {"o_proj": {"group": 32}}}, "'overrides.o_proj.group'; allowed: bits, group_size, symmetric$"),
        ({"percdamp": 0}, "percdamp: got 0"),
        ({"overrides": {"q_proj": "w9g3"}}, "bits: got 9"),
        ({"samples": 0}, "samples: got 0"),
        ({"bits": 6}, "^recipe: bits: got 6, which exists for simulated activations only; use 4 or 8$"),
        ({"overrides": {"o_proj": "w6g64"}}, "^recipe: bits: got 6, which"),
        ({"method": "rtn", "base": "gptq"}, "^recipe: base: got 'gptq', method rtn allows auto$"),
        ({"max_pixels": 1000}, "max_pixels: got 1000.* 1024"),
        ({"exponent": 3}, "exponent: got 3"),
    ],
)
def test_faults_are_one_line(settings, message):
    with pytest.raises(VLMQError, match=message) as caught:
        make_recipe(**settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"), [("a: [", "not valid YAML"), ("- 1", "got a list"), ("bitz: 3", "recipe.yaml: .*'bitz'")]
)
def test_bad_files(tmp_path, text, message):
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(VLMQError, match=message):
        load_recipe(tmp_path / "recipe.yaml")
    with pytest.raises(VLMQError, match="cannot be read"):
        load_recipe(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("method", "base", "bits", "expected"),
    [
        ("vlmq", "auto", 2, False), ("vlmq", "auto", 3, True), ("vlmq", "gptq", 4, False), ("vlmq", "gptaq", 2, True),
        ("gptq", "auto", 3, False), ("gptaq", "auto", 2, True), ("rtn", "auto", 4, False),
    ],
)  # fmt: skip
def test_residual_follows_the_paper(method, base, bits, expected):
    assert make_recipe(method=method, base=base).uses_residual(bits) is expected


@pytest.mark.parametrize(
    ("settings", "unused"),
    [
        ({"method": "gptq", "alpha": 0.5, "token_budget": 9, "exponent": 0.5}, ["alpha", "exponent", "token_budget"]),
        ({"method": "vlmq", "bits": 2, "alpha": 0.5}, ["alpha"]),
        ({"method": "vlmq", "bits": 2, "alpha": 0.5, "overrides": {"down_proj": "w3g64"}}, []),
        ({"method": "awq", "percdamp": 0.1, "act_order": False}, ["act_order", "percdamp"]),
        ({"method": "awq", "percdamp": 0.1, "act_order": False, "lm_head": "w8"}, []),
        ({"method": "qvlm", "vision_epochs": 3, "activation_range": "tensor"}, ["activation_range", "vision_epochs"]),
        ({"method": "rtn", "samples": 9, "max_pixels": 5000}, []),
        ({"method": "qvlm", "grid": "mse"}, ["grid"]),
        ({"method": "qvlm", "grid": "mse", "vision": "w8"}, []),
    ],
)
def test_settings_that_nothing_reads(settings, unused):
    assert unused_settings(make_recipe(**settings)) == unused


def test_every_setting_is_known_to_be_read_or_not():
    """A new setting has to say who reads it."""
    unused_settings(make_recipe(**make_recipe().model_dump()))
    assert set(Recipe.model_fields) >= ALWAYS_READ
