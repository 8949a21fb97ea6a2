"""Settings that somebody has given and that nothing of the calibration reads: most likely a mistake."""

from vlmq_serve.calibrate.recipe import Recipe


def unused_settings(recipe: Recipe) -> list[str]:
    """Names of those settings, sorted. Data settings count as read: a recipe may be used for several methods."""
    widths = (recipe.scheme, *recipe.override_schemes.values())
    solvers = {recipe.solver(scheme.bits) for scheme in widths}
    if recipe.lm_head is not None and recipe.method != "rtn":
        solvers.add("gptq")
    vlmq, tlq, qvlm = (recipe.method == name for name in ("vlmq", "tlq", "qvlm"))
    read = {
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
    return sorted(name for name, is_read in read.items() if name in recipe.model_fields_set and not is_read)
