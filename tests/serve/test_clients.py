"""What clients of the OpenAI API send, to one server of a quantized checkpoint: good, odd and broken requests."""

from __future__ import annotations

import base64
import io
import json
import re
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.quant_methods.checkpoints import quantize
from vlmq_serve.bench.client import Client
from vlmq_serve.bench.serving import note_start, run_load
from vlmq_serve.bench.tables import read_rows
from vlmq_serve.bench.variants import Load, Variant
from vlmq_serve.calibrate.chats import read_chats
from vlmq_serve.evaluate.server import Server, serve
from vlmq_serve.format.errors import VLMQError

pytestmark = pytest.mark.serve
EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
BOUNDS = (
    "--max-model-len", "1024", "--max-num-seqs", "32", "--kv-cache-memory-bytes", str(256 << 20), "--enforce-eager",
    "--limit-mm-per-prompt", '{"image": 3, "video": 0}', "--dtype", "float32",
    # A model that was never taught JSON would fill the answer with the blanks that JSON allows.
    "--structured-outputs-config", '{"backend": "xgrammar", "disable_any_whitespace": true}',
)  # fmt: skip
CHATS = read_chats(EXAMPLES / "data" / "evaluation.jsonl")[:8]
QUESTION = "What is on the poster?"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("clients")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}.items():
            patch.setenv(name, value)
        for name in ("VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_CPU_OMP_THREADS_BIND", "VLLM_LOGGING_LEVEL"):
            patch.delenv(name, raising=False)
        checkpoint = quantize(EXAMPLES / "tiny-qwen2vl", folder / "tiny-w4", "w4g64")
        with serve(checkpoint, folder / "serve.log", arguments=BOUNDS, timeout_s=500) as running:
            yield running


@pytest.fixture(scope="module")
def client(server: Server) -> Any:
    import openai

    return openai.OpenAI(base_url=server.base_url, api_key="none", timeout=120, max_retries=0)


@pytest.fixture
def ask(client: Any, server: Server) -> Callable[..., Any]:
    def send(content: Any, **options: Any) -> Any:
        messages = [{"role": "user", "content": content}]
        return client.chat.completions.create(
            model=server.model, messages=messages, **{"max_tokens": 8, "temperature": 0, **options}
        )

    return send


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> str:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def content(*urls: str, text: str = QUESTION) -> list[dict[str, Any]]:
    return [*({"type": "image_url", "image_url": {"url": url}} for url in urls), {"type": "text", "text": text}]


def poster(index: int = 0) -> Image.Image:
    return CHATS[index].images()[0].convert("RGB")


def question(index: int) -> list[dict[str, Any]]:
    """The question of an example with its image."""
    (message,) = [m for m in CHATS[index].prompt if m["role"] == "user"]
    text = next(part["text"] for part in message["content"] if part["type"] == "text")
    return content(encoded(poster(index)), text=text)


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_lossless_formats_give_one_answer(ask: Callable, kind: str) -> None:
    url = encoded(poster(), kind, **({"lossless": True} if kind == "WEBP" else {}))
    assert ask(content(url)).choices[0].message.content == ask(content(encoded(poster()))).choices[0].message.content


IMAGES = {
    "jpeg": lambda: encoded(poster(), "JPEG", quality=90),
    "one-pixel": lambda: encoded(Image.new("RGB", (1, 1), "red")),
    "one-row": lambda: encoded(Image.new("RGB", (150, 1), "red")),
    "huge": lambda: encoded(poster().resize((4000, 3000))),
    "grayscale": lambda: encoded(poster().convert("L")),
    "alpha": lambda: encoded(poster().convert("RGBA")),
    "palette": lambda: encoded(poster().convert("P")),
    "sixteen-bit": lambda: encoded(Image.new("I;16", (64, 64), 30000)),
}


@pytest.mark.parametrize("kind", IMAGES)
def test_images_of_any_kind_are_answered(ask: Callable, kind: str) -> None:
    reply = ask(content(IMAGES[kind]()))
    assert reply.choices[0].message.content
    assert reply.usage.prompt_tokens > 16


def test_an_opaque_alpha_channel_changes_nothing(ask: Callable) -> None:
    with_alpha, without = (ask(content(encoded(poster().convert(mode)))) for mode in ("RGBA", "RGB"))
    assert with_alpha.choices[0].message.content == without.choices[0].message.content


def test_several_images_are_all_seen(ask: Callable) -> None:
    one, three = (ask(content(*[encoded(poster(i)) for i in range(n)])) for n in (1, 3))
    assert three.usage.prompt_tokens > 2 * one.usage.prompt_tokens
    assert three.choices[0].message.content


def test_text_alone(ask: Callable) -> None:
    reply = ask("How many circles are there?")
    assert reply.choices[0].finish_reason in ("stop", "length")
    assert reply.usage.completion_tokens > 0


def test_a_stream_is_the_whole_answer_in_parts(ask: Callable) -> None:
    whole = ask(question(1)).choices[0].message.content
    parts = [c.choices[0].delta.content or "" for c in ask(question(1), stream=True) if c.choices]
    assert "".join(parts) == whole


def test_logprobs_are_those_of_the_greedy_tokens(ask: Callable) -> None:
    (choice,) = ask(question(2), logprobs=True, top_logprobs=3).choices
    for step in choice.logprobs.content:
        assert len(step.top_logprobs) == 3
        assert step.logprob == pytest.approx(max(top.logprob for top in step.top_logprobs))
        assert step.logprob <= 0


def test_stop_ends_the_answer_before_the_stop_text(ask: Callable) -> None:
    whole = ask(question(1), max_tokens=16).choices[0].message.content
    stop = whole[len(whole) // 2]
    (choice,) = ask(question(1), max_tokens=16, stop=[stop]).choices
    assert choice.message.content == whole[: whole.index(stop)]
    assert choice.finish_reason == "stop"


def test_n_answers_of_one_request(ask: Callable) -> None:
    choices = ask(question(0), n=3, temperature=1.0, seed=1).choices
    assert [choice.index for choice in choices] == [0, 1, 2]


def test_a_json_schema_is_kept(ask: Callable) -> None:
    schema = {
        "type": "object",
        "properties": {"seen": {"type": "boolean"}},
        "required": ["seen"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}
    reply = ask(question(0), response_format=form, max_tokens=64)
    assert set(json.loads(reply.choices[0].message.content)) == {"seen"}


def test_32_requests_at_once_get_the_answers_of_one_at_a_time(ask: Callable) -> None:
    alone = [ask(question(i)).choices[0].message.content for i in range(8)]
    with ThreadPoolExecutor(32) as pool:
        together = list(pool.map(lambda i: ask(question(i % 8)).choices[0].message.content, range(32)))
    assert together == alone * 4


def test_the_latency_example_times_its_requests(server: Server, tmp_path: Path) -> None:
    images = [tmp_path / f"{index}.png" for index in range(3)]
    for index, path in enumerate(images):
        poster(index).save(path)
    command = [sys.executable, EXAMPLES / "latency.py", server.base_url, QUESTION, *images, "--concurrency", "2"]
    told = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=120, check=True).stdout
    first, later, total = told.splitlines()
    assert re.fullmatch(r"time to first token, ms +p50 +[1-9][\d.]+ +p90 +[1-9][\d.]+", first)
    assert later.startswith("time per later token, ms")
    assert re.fullmatch(r"3 answers, \d+ tokens, [\d.]+ tokens/s", total)


def test_bench_serve_measures_images_and_goes_on_after_a_failed_load(server: Server, tmp_path: Path) -> None:
    variant = Variant("w4", server.log.parent / server.model)
    (tmp_path / "w4").mkdir()
    note_start(variant, server, tmp_path)
    with Client(tmp_path / "client.log") as client:
        with pytest.raises(VLMQError, match="0 of 1 requests answered"):
            run_load(variant, server, Load(1, 5000, 4, requests=1), tmp_path, client)  # longer than the model allows
        run_load(variant, server, Load(2, 16, 4, (112, 112), requests=3), tmp_path, client)
    (row,) = read_rows(tmp_path, ["w4"])
    assert row.load == "c2-p16-o4-i112-n3"
    assert row.values["prompt tokens"] > 16 + 60  # the image is 64 of them
    assert row.values["peak_mib"] > row.values["worker_mib"] > 100
    assert all(row.values[name] > 0 for name in ("TTFT ms", "TPOT ms", "processor s/request", "disk_mib", "kv_tokens"))


def test_cancelled_streams_leave_room_for_others(ask: Callable) -> None:
    for _ in range(8):
        stream = ask(question(0), stream=True, max_tokens=512, extra_body={"ignore_eos": True})
        next(iter(stream))
        stream.close()
    assert ask(question(0)).choices[0].message.content


BROKEN: dict[str, dict[str, Any]] = {
    "base64": {"content": content("data:image/png;base64,!!!!notbase64")},
    "not-an-image": {"content": content("data:image/png;base64," + base64.b64encode(b"hello").decode())},
    "truncated-image": {"content": content(encoded(poster())[:200])},
    "no-such-type": {"content": [{"type": "picture", "picture": "x"}]},
    "image-is-a-number": {"content": [{"type": "image_url", "image_url": {"url": 7}}]},
    "too-many-images": {"content": content(*[encoded(poster())] * 4)},
    "too-long": {"content": "red " * 3000},
    "temperature-is-text": {"content": "hi", "temperature": "hot"},
    "negative-max-tokens": {"content": "hi", "max_tokens": -1},
    "messages-is-text": {"messages": "hi"},
    "no-messages": {"messages": None},
    "unknown-model": {"content": "hi", "model": "nobody"},
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_request_is_refused_and_the_server_lives_on(ask: Callable, server: Server, case: str) -> None:
    body = {"model": server.model, **BROKEN[case]}
    if "content" in body:
        body["messages"] = [{"role": "user", "content": body.pop("content")}]
    request = urllib.request.Request(
        f"{server.base_url}/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request, timeout=60)
    assert 400 <= refused.value.code < 500, refused.value.read()
    assert json.loads(refused.value.read())["error"]["message"]
    assert ask("hi").choices[0].finish_reason
