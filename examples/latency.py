"""How long an OpenAI-compatible server takes to answer about pictures: time to first token, tokens per second.

python examples/latency.py http://localhost:8000/v1 "What is on the sign?" photos/*.jpg --concurrency 4

One request per picture; a server keeps what it computed for a picture, so the same one twice is answered sooner.
A server that asks for a key gets that in OPENAI_API_KEY.
"""

import argparse
import base64
import mimetypes
import os
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai


def main() -> None:
    """Ask about every picture; print the median and the 90th percentile, or one line and status 1 where that fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base_url")
    parser.add_argument("question")
    parser.add_argument("images", type=Path, nargs="+")
    parser.add_argument("--concurrency", type=int, default=1)
    parser.add_argument("--max-tokens", type=int, default=64)
    options = parser.parse_args()
    pictures = [image(path) for path in options.images]  # before the first request: a wrong name costs no waiting
    try:
        measure(options, pictures)
    except openai.APIConnectionError:
        sys.exit(f"error: no server answers at {options.base_url}")
    except openai.APIError as error:
        sys.exit(f"error: {options.base_url} refuses the request ({' '.join(error.message.split())})")


def image(path: Path) -> dict[str, Any]:
    """The part of a message that holds a picture."""
    kind = mimetypes.guess_type(path.name)[0] or "image/png"
    try:
        url = f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"
    except OSError as error:
        sys.exit(f"error: {path} cannot be read ({error.strerror})")
    return {"type": "image_url", "image_url": {"url": url}}


def measure(options: argparse.Namespace, pictures: list[dict[str, Any]]) -> None:
    """Ask about all pictures, `concurrency` at a time, and print what it took."""
    client = openai.OpenAI(base_url=options.base_url, api_key=os.environ.get("OPENAI_API_KEY") or "none")
    served = client.models.list().data
    if not served:
        sys.exit(f"error: {options.base_url} serves no model")
    request = {"model": served[0].id, "max_tokens": options.max_tokens, "temperature": 0}

    def ask(*content: dict[str, Any]) -> tuple[float, float, int]:
        return timed(client, {**request, "messages": [{"role": "user", "content": [*content]}]})

    question = {"type": "text", "text": options.question}
    ask(question)  # the first request pays for what the server sets up lazily
    started = time.perf_counter()
    with ThreadPoolExecutor(options.concurrency) as pool:
        answers = [*pool.map(lambda picture: ask(picture, question), pictures)]
    seconds = time.perf_counter() - started
    show("time to first token, ms", [1000 * first for first, _, _ in answers])
    show("time per later token, ms", [1000 * (last - first) / (n - 1) for first, last, n in answers if n > 1])
    tokens = sum(n for _, _, n in answers)
    sys.stdout.write(f"{len(answers)} answers, {tokens} tokens, {tokens / seconds:.1f} tokens/s\n")


def timed(client: openai.OpenAI, request: dict[str, Any]) -> tuple[float, float, int]:
    """Seconds to the first and to the last piece of the answer, and its tokens."""
    started = time.perf_counter()
    pieces, tokens = [], 0
    for chunk in client.chat.completions.create(**request, stream=True, stream_options={"include_usage": True}):
        if chunk.choices and (chunk.choices[0].delta.content or chunk.choices[0].finish_reason):
            pieces.append(time.perf_counter() - started)
        if chunk.usage:
            tokens = chunk.usage.completion_tokens
    return pieces[0], pieces[-1], tokens


def show(name: str, values: list[float]) -> None:
    """One line: median and 90th percentile."""
    p90 = statistics.quantiles(values, n=10, method="inclusive")[-1] if len(values) > 1 else sum(values)
    sys.stdout.write(f"{name:26}p50 {statistics.median(values or [0]):8.1f}   p90 {p90:8.1f}\n")


if __name__ == "__main__":
    main()
