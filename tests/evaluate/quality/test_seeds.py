"""Seeds that draw the same chats are refused, since their calibrations are one."""

import pytest

from vlmq_serve.calibrate.samples import draw
from vlmq_serve.evaluate.quality.seeds import check_seeds, mean_overlap
from vlmq_serve.evaluate.quality.variants import Selection
from vlmq_serve.format.errors import VLMQError


def variants(samples: int, methods=("gptq", "rtn")):
    return Selection(methods, ["w2g64"], [0, 1, 2], {"samples": samples}).variants()


@pytest.mark.parametrize("samples", [512, 600])
def test_all_chats_of_the_file_leave_nothing_to_draw(samples):
    with pytest.raises(VLMQError, match="got 0 and 1 for gptq, which draw the same 512 of the 512 chats"):
        check_seeds(variants(samples), 512, "c.jsonl")


def test_small_files_can_draw_the_same_by_chance():
    seeds = [seed for seed in range(9) if draw(2, 1, seed) == draw(2, 1, 0)]
    chosen = Selection(["gptq"], ["w2g64"], seeds[:2], {"samples": 1}).variants()
    with pytest.raises(VLMQError, match="one calibration counted twice"):
        check_seeds(chosen, 2, "c.jsonl")


def test_seeds_that_differ_pass_and_say_how_much_they_share():
    check_seeds(variants(128), 512, "c.jsonl")
    overlap = mean_overlap(variants(128), 512)
    assert overlap == pytest.approx(0.25, abs=0.08)
    assert mean_overlap(variants(512, ["rtn"]), 512) is None


def test_one_seed_may_use_all():
    chosen = Selection(["gptq", "gptq:samples=64"], ["w2g64"], [0], {"samples": 512}).variants()
    check_seeds(chosen, 512, "c.jsonl")
    assert mean_overlap(chosen, 512) is None
