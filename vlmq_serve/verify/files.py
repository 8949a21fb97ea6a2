"""Files and config of a checkpoint folder."""

from pathlib import Path

from vlmq_serve.format.companions import has_template, missing_files
from vlmq_serve.format.headers import read_json
from vlmq_serve.verify.finding import Finding, Level, judge


def check_files(folder: Path) -> list[Finding]:
    """What vLLM opens beside the weights: tokenizer, image processor and chat template."""
    config = read_json(folder / "config.json")
    problems = missing_files(folder, images="vision_config" in config)
    if not config.get("architectures"):
        problems.append("config.json: architectures is missing, vLLM finds the model class by it")
    findings = judge("files", problems, "config.json, tokenizer and processor are there")
    if not has_template(folder):
        message = "no chat template: chat requests get an error unless you give `vllm serve --chat-template`"
        findings.append(Finding(Level.NOTE, "files", message))
    return findings
