"""Does a served checkpoint say what its weights say? `vllm serve` against transformers with dequantized weights.

    python -m benchmarks.quality.serving CHECKPOINT... --output benchmarks/results/serving-agreement.csv

For every checkpoint and dtype: greedy answers to the same questions with images, token by token, and the
log-probabilities of the tokens chosen. `--kernel cpu_int8` asks for a kernel other than the automatic choice. Rows of
other checkpoints and kernels in the output file are kept.
"""

import argparse
import csv
import json
import os
import statistics
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import transformers

from vlmq_serve.calibrate.chats import Chat, read_chats
from vlmq_serve.cli.console import err, hide_loading_bars, one_line_errors, out, progress_bar
from vlmq_serve.evaluate.endpoint import connect, openai_messages
from vlmq_serve.evaluate.loading import load_model
from vlmq_serve.evaluate.server import serve

ROOT = Path(__file__).resolve().parents[2]
BOUNDS = (
    "--max-model-len", "1024", "--max-num-seqs", "8", "--kv-cache-memory-bytes", "67108864", "--enforce-eager",
    "--gpu-memory-utilization", "0.1",  # vLLM refuses to start where less than this is free, however small the model
)  # fmt: skip
Tokens = list[tuple[str, float]]
"""Text and log-probability of each answer token, without the end token."""


@dataclass(frozen=True)
class Agreement:
    """One checkpoint served in one dtype, compared with transformers in the same and in fp32."""

    checkpoint: str
    kernel: str
    served_dtype: str
    reference_dtype: str
    questions: int
    tokens: int
    equal_tokens: float
    equal_answers: float
    median_logprob_difference: float
    max_logprob_difference: float


@one_line_errors
def main() -> None:
    """Measure and write the table."""
    options = _options()
    hide_loading_bars()
    chats = read_chats(options.evaluation)[: options.questions]
    for folder in options.checkpoints:
        for dtype in options.dtypes:
            rows = _measure(folder, dtype, options.kernel, chats)
            _write(options.output, rows)
            for row in rows:
                out.print(asdict(row))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", type=Path, nargs="+")
    parser.add_argument("--dtypes", nargs="+", default=["auto", "float32"], help="as `vllm serve --dtype` takes them")
    parser.add_argument("--kernel", default="", help="as VLMQ_KERNEL takes it; default: the automatic choice")
    parser.add_argument("--evaluation", type=Path, default=ROOT / "examples" / "data" / "evaluation.jsonl")
    parser.add_argument("--questions", type=int, default=100)
    parser.add_argument("--output", type=Path, required=True)
    return parser.parse_args()


def _measure(folder: Path, dtype: str, kernel: str, chats: Sequence[Chat]) -> list[Agreement]:
    served = _served(folder, dtype, kernel, chats)
    references = ["float32"] if dtype == "float32" else ["bfloat16", "float32"]
    return [_compare(folder, dtype, kernel, name, served, _reference(folder, name, chats)) for name in references]


def _served(folder: Path, dtype: str, kernel: str, chats: Sequence[Chat]) -> list[Tokens]:
    log = Path(os.environ.get("TMPDIR", "/tmp")) / f"{folder.name}-{dtype}.log"
    forced = ("--hf-overrides", json.dumps({"vlmq_kernel": kernel})) if kernel else ()
    arguments = (*BOUNDS, "--dtype", dtype, *forced)
    with err.status(f"vllm serve {folder.name}, dtype {dtype}"), serve(folder, log, arguments=arguments) as server:
        client, model = connect(server.base_url)
        with ThreadPoolExecutor(8) as pool:
            return list(pool.map(lambda chat: _ask(client, model, chat), chats))


def _ask(client: Any, model: str, chat: Chat) -> Tokens:
    reply = client.chat.completions.create(
        model=model, messages=openai_messages(chat), max_tokens=8, temperature=0, logprobs=True
    )
    tokens = [(entry.token, entry.logprob) for entry in reply.choices[0].logprobs.content]
    return [entry for entry in tokens if not entry[0].startswith("<|")]


@torch.inference_mode()
def _reference(folder: Path, dtype: str, chats: Sequence[Chat]) -> list[Tokens]:
    model, processor = load_model(folder, getattr(torch, dtype)), transformers.AutoProcessor.from_pretrained(folder)
    answers = []
    with progress_bar() as bar:
        task = bar.add_task(f"transformers {dtype}", total=len(chats), note="")
        # One chat at a time: padding would add rounding of its own.
        for chat in chats:
            text = processor.apply_chat_template(chat.prompt, tokenize=False, add_generation_prompt=True)
            inputs = processor(text=[text], images=chat.images() or None, return_tensors="pt")
            result = model.generate(
                **inputs, max_new_tokens=8, do_sample=False, return_dict_in_generate=True, output_logits=True
            )
            new = result.sequences[0, inputs["input_ids"].shape[1] :]
            logprobs = torch.stack(result.logits)[:, 0].float().log_softmax(-1)
            chosen = logprobs.gather(1, new[:, None])[:, 0].tolist()
            texts = [processor.tokenizer.decode([token]) for token in new.tolist()]
            answers.append([entry for entry in zip(texts, chosen, strict=True) if not entry[0].startswith("<|")])
            bar.advance(task)
    return answers


def _compare(
    folder: Path, dtype: str, kernel: str, reference: str, served: list[Tokens], expected: list[Tokens]
) -> Agreement:
    total = equal = 0
    differences = []
    for ours, theirs in zip(served, expected, strict=True):
        total += max(len(ours), len(theirs))
        for (token, logprob), (other, other_logprob) in zip(ours, theirs, strict=False):
            if token != other:
                break  # what follows answers another prompt
            equal += 1
            differences.append(abs(logprob - other_logprob))
    answers = [[t for t, _ in a] == [t for t, _ in b] for a, b in zip(served, expected, strict=True)]
    return Agreement(
        checkpoint=folder.name,
        kernel=kernel,
        served_dtype=dtype,
        reference_dtype=reference,
        questions=len(answers),
        tokens=total,
        equal_tokens=round(equal / total, 4),
        equal_answers=round(sum(answers) / len(answers), 4),
        median_logprob_difference=float(f"{statistics.median(differences):.2g}"),
        max_logprob_difference=float(f"{max(differences):.2g}"),
    )


def _write(path: Path, rows: list[Agreement]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    new = {(row.checkpoint, row.kernel, row.served_dtype) for row in rows}
    kept: list[dict[str, Any]] = []
    if path.exists():
        with path.open(encoding="utf-8") as handle:
            kept = [
                r
                for r in csv.DictReader(handle)
                if (r["checkpoint"], r.get("kernel", ""), r["served_dtype"]) not in new
            ]
    with path.open("w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, [field.name for field in fields(Agreement)], lineterminator="\n")
        writer.writeheader()
        writer.writerows([*kept, *map(asdict, rows)])


if __name__ == "__main__":
    main()
