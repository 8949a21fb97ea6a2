"""Files that stand beside the weights: tokenizer, image processor, chat template."""

from pathlib import Path

from vlmq_serve.format.headers import read_json

_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json")
_PROCESSORS = ("preprocessor_config.json", "processor_config.json")
_TEMPLATES = ("chat_template.jinja", "chat_template.json", "additional_chat_templates")
_HOLD_TEMPLATES = ("tokenizer_config.json", "processor_config.json")


def missing_files(folder: Path, images: bool = True) -> list[str]:
    """What a model, one of `images` or of text alone, cannot do without: a line per kind of file that is not there."""
    kinds = {"tokenizer": _TOKENIZERS} | ({"image processor": _PROCESSORS} if images else {})
    return [
        f"{kind}: found none of {list(names)}; copy it from the original model"
        for kind, names in kinds.items()
        if not any((folder / name).is_file() for name in names)
    ]


def has_template(folder: Path) -> bool:
    """Whether there is a chat template, in a file of its own or among the settings of tokenizer or processor."""
    if any((folder / name).exists() for name in _TEMPLATES):
        return True
    holders = [folder / name for name in _HOLD_TEMPLATES]
    return any(path.is_file() and read_json(path).get("chat_template") for path in holders)
