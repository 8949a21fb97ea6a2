"""Settings that somebody has given and that nothing of the calibration reads: most likely a mistake."""

from vlmq_serve.calibrate.recipe import PARTS, Recipe

ALWAYS_READ = frozenset(
    {
        "method", "bits", "group_size", "symmetric", "overrides", "lm_head", "vision", "embeddings", "unfit",
        "ignore", "base", "activation_bits", "simulated_vision", "device", "dtype",
        "samples", "seed", "max_tokens", "max_pixels", "allow_text_only", "batch_tokens",
    }
)  # fmt: skip
"""By every method, or refused by the recipe where they do not fit. Those about data count as read by rtn too."""


def unused_settings(recipe: Recipe) -> list[str]:
    """Names of those settings, sorted."""
    read = _read(recipe)
    return sorted(name for name in recipe.model_fields_set - ALWAYS_READ if not read[name])


def _read(recipe: Recipe) -> dict[str, bool]:
    """For each other setting whether it is read."""
    widths = (recipe.scheme, *recipe.override_schemes.values())
    solvers = {recipe.solver(scheme.bits) for scheme in widths}
    if recipe.lm_head is not None and recipe.method != "rtn":
        solvers.add("gptq")
    vlmq, tlq, qvlm = (recipe.method == name for name in ("vlmq", "tlq", "qvlm"))
    return {
        "grid": not qvlm or any(recipe.part_scheme(part) for part in PARTS),
        "percdamp": solvers != {"rtn"},
        "act_order": solvers != {"rtn"},
        "alpha": "gptaq" in solvers,
        "exposed": recipe.equalizes,
        "token_budget": tlq,
        "exponent": vlmq or tlq,
        "importance": vlmq,
        "weighted": vlmq,
        "per_sample": vlmq,
        "save_saliency": vlmq,
        "dependency_threshold": qvlm,
        "activation_range": recipe.activation_bits is not None,
        "vision_epochs": recipe.simulated_vision,
        "vision_entropy": recipe.simulated_vision,
        "vision_error": recipe.simulated_vision,
    }
