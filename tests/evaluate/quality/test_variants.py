"""What `vlmq bench quality` is asked for, as variants."""

import pytest

from vlmq_serve.evaluate.quality.variants import Selection, parse_method
from vlmq_serve.format.errors import VLMQError


def test_settings_are_read_as_yaml():
    method, settings = parse_method("vlmq:exponent=2,ignore=[visual, lm_head],act_order=false,percdamp=0.1")
    assert method == "vlmq"
    assert settings == {"exponent": 2, "ignore": ["visual", "lm_head"], "act_order": False, "percdamp": 0.1}
    assert parse_method("gptq") == ("gptq", {})


@pytest.mark.parametrize("label", ["vlmq:", "vlmq:exponent", "vlmq:=2", "vlmq:exponent=7", "vlmq:unheard=1", "best"])
def test_bad_methods_are_one_error(label):
    with pytest.raises(VLMQError):
        Selection([label], ["w3g64"], [0]).variants()


def test_every_combination_once_and_rounding_for_one_seed_only():
    variants = Selection(["rtn", "gptq", "gptq", "gptq:act_order=false"], ["w3g64", "w2g-1s"], [0, 1]).variants()
    names = [variant.name for variant in variants]
    assert names[0] == "bf16"
    assert len(names) == len(set(names)) == 1 + 2 * (1 + 2 + 2)
    last = variants[-1]
    assert last.recipe is not None
    assert (last.recipe.act_order, last.recipe.seed, str(last.recipe.scheme)) == (False, 1, "w2g-1s")


def test_own_settings_win_over_shared_ones():
    variants = Selection(["gptq", "gptq:samples=8"], ["w3g64"], [0], {"samples": 64}).variants()
    assert [v.recipe.samples for v in variants if v.recipe] == [64, 8]


def test_schemes_with_simulated_activations():
    (variant,) = Selection(["tlq"], ["w4g64a8"], [0]).variants()[1:]
    assert variant.recipe is not None
    assert (str(variant.recipe.scheme), variant.recipe.activation_bits) == ("w4g64", 8)
    assert variant.name == "tlq-w4g64a8-seed0"
    with pytest.raises(VLMQError, match="exists for simulated activations only"):
        Selection(["rtn"], ["w6g64"], [0]).variants()
