"""Files and config of a checkpoint folder."""

from pathlib import Path

from vlmq_serve.format.headers import read_json
from vlmq_serve.verify.finding import Finding, Level, judge

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json")
PROCESSORS = ("preprocessor_config.json", "processor_config.json")
TEMPLATES = ("chat_template.jinja", "chat_template.json")


def check_files(folder: Path) -> list[Finding]:
    """What vLLM opens beside the weights: tokenizer, image processor and chat template."""
    config = read_json(folder / "config.json")
    problems = []
    if not any((folder / name).is_file() for name in TOKENIZERS):
        problems.append(f"tokenizer: found none of {list(TOKENIZERS)}; copy it from the original model")
    if "vision_config" in config and not any((folder / name).is_file() for name in PROCESSORS):
        problems.append(f"image processor: found none of {list(PROCESSORS)}; copy it from the original model")
    if not config.get("architectures"):
        problems.append("config.json: architectures is missing, vLLM finds the model class by it")
    findings = judge("files", problems, "config.json, tokenizer and processor are there")
    if not _has_template(folder):
        message = "no chat template: chat requests get an error unless you give `vllm serve --chat-template`"
        findings.append(Finding(Level.NOTE, "files", message))
    return findings


def _has_template(folder: Path) -> bool:
    if any((folder / name).is_file() for name in TEMPLATES):
        return True
    path = folder / "tokenizer_config.json"
    return path.is_file() and "chat_template" in read_json(path)
