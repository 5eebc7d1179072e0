"""Qwen3.5 on the real engine: a tiny network of random weights, its vision tower in the checkpoint, most of its layers
gated delta nets. All ways in give the same answers, with the cache of prefixes (server) and without it (offline). And
one with an MTP layer, whose answers are known.
"""

import json
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import requests
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from benchmarks.shapes import said_words, write_words
from qwen_vllm.protocol import Reasoning, Sampling, Turn
from qwen_vllm.with_server import running_server
from tests.support.probes import gauge
from tests.support.tiny_checkpoints import write_qwen35
from tests.support.tiny_families import GATED_DELTA_NET, QWEN38, TINY
from vllm_wrapper import ChatModel

pytestmark = pytest.mark.long
TOKENS = 4  # more would meet a tie: first choices are often one rounding step of bfloat16 apart
GREEDY = {"temperature": 0, "max_tokens": TOKENS}
LONG = [("Tell me more of the sea. " * 80, "It is deep. " * 60)] * 2
CONVERSATIONS: list[tuple[str, list[Turn], str]] = [
    ("Be brief.", [], "你好"),
    ("", [("1 + 1 = ?", "2", "One and one."), ("And 3?", "")], "  def f():\n\treturn '👩‍👩‍👧‍👦'\n"),
    ("You are a helpful assistant.", LONG, "Who lives there?"),
    ("You are a helpful assistant.", LONG, "How deep is it?"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_qwen35(tmp_path_factory.mktemp("models") / "Qwen3.5-Tiny", QWEN38)


def rows() -> list[dict[str, Any]]:
    return [{"system": system, "history": history, "query": query} for system, history, query in CONVERSATIONS]


def say(folder: Path) -> list[tuple[str, str, str]]:
    """Offline without a cache of prefixes, the answers whole, streamed and in a batch, thoughts before texts; runs in a
    process of its own.
    """
    model = ChatModel(str(folder), enable_prefix_caching=False)
    sampling = Sampling(**GREEDY, repetition_penalty=1)
    said = []
    for row, result in zip(rows(), model.chat_batch(rows(), sampling), strict=True):
        whole = model.chat(**row, sampling=sampling)
        *parts, _ = model.stream_chat(**row, sampling=sampling)
        streamed = "".join(part.text if isinstance(part, Reasoning) else part for part in parts)
        said.append((whole.reasoning + whole.text, streamed, result.reasoning + result.text))
    return said


@pytest.fixture(scope="module")
def offline(folder: Path) -> Iterator[Future[list[tuple[str, str, str]]]]:
    """What `say` returns; at work while the server starts."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        yield process.submit(say, folder)


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory, folder: Path, offline: Future) -> Iterator[str]:
    flags = ["--model", str(folder), "--enable-prompt-tokens-details"]
    with running_server(flags, tmp_path_factory.mktemp("server") / "log") as url:
        yield url


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(folder)


def ask(url: str, row: dict[str, Any]) -> tuple[str, int]:
    """The answer to `row`, whole and streamed the same, its thought first; and the number of the prompt's tokens."""
    body = {**row, **GREEDY, "repetition_penalty": 1}
    whole = requests.post(f"{url}/chat", json=body, timeout=120).json()
    streamed = requests.post(f"{url}/chat", json={**body, "stream": True}, timeout=120).text
    *lines, last = map(json.loads, streamed.splitlines())
    joined = "".join(line.get("reasoning", "") + line.get("delta", "") for line in lines)
    text = whole.get("reasoning", "") + whole["text"]
    assert (joined, last["usage"]) == (text, whole["usage"])
    return text, whole["usage"]["prompt_tokens"]


def messages(row: dict[str, Any]) -> list[dict[str, str]]:
    said = [{"role": "system", "content": row["system"]}]
    for user, answer, *reasoning in row["history"]:
        said += [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]
        said[-1] |= {"reasoning_content": reasoning[0]} if reasoning else {}
    return [*said, {"role": "user", "content": row["query"]}]


def post(url: str, route: str, **fields: Any) -> dict[str, Any]:
    return requests.post(f"{url}/v1/{route}", json={**GREEDY, **fields}, timeout=120).json()


def test_a_chat_is_what_the_models_own_template_makes_of_it(url, tokenizer):
    for row in rows():
        text, tokens = ask(url, row)
        prompt = tokenizer.apply_chat_template(messages(row), tokenize=False, add_generation_prompt=True)
        completion = post(url, "completions", prompt=prompt, add_special_tokens=False)
        assert (completion["choices"][0]["text"], completion["usage"]["prompt_tokens"]) == (text, tokens)
        chat = post(url, "chat/completions", messages=messages(row))
        message = chat["choices"][0]["message"]
        assert (message["reasoning"] or "") + (message["content"] or "") == text
        assert chat["usage"]["prompt_tokens"] == tokens


def test_offline_and_in_a_batch_without_a_cache_of_prefixes_the_answers_are_the_same(url, offline):
    said = [ask(url, row)[0] for row in rows()]
    assert len(set(said)) > 2
    assert offline.result() == [(text, text, text) for text in said]


def test_what_is_read_from_the_cache_gives_the_same_probabilities(url, tokenizer):
    *_, row = rows()
    prompt = tokenizer.apply_chat_template(
        messages({**row, "system": "Answer at length."}), tokenize=False, add_generation_prompt=True
    )
    read, cached = (post(url, "completions", prompt=prompt, logprobs=2, max_tokens=16) for _ in range(2))
    counts = [answer["usage"]["prompt_tokens_details"]["cached_tokens"] for answer in (read, cached)]
    assert counts[0] == 0 < counts[1] < read["usage"]["prompt_tokens"]
    compared = 0
    steps = [answer["choices"][0]["logprobs"]["top_logprobs"] for answer in (read, cached)]
    for first, second in zip(*steps, strict=False):
        assert sorted(first.values()) == pytest.approx(sorted(second.values()), abs=0.05)
        compared += 1
        if max(first, key=first.get) != max(second, key=second.get):
            break
    assert compared > 3


@pytest.mark.skipif(bool(find_spec("torchvision")), reason="torchvision is installed: images are taken")
def test_without_torchvision_the_server_says_that_it_takes_no_images(url):
    assert requests.get(f"{url}/chat/info", timeout=60).json()["images"] is False
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}
    content = [image, {"type": "text", "text": "What is this?"}]
    body = {"messages": [{"role": "user", "content": content}], "max_tokens": 4}
    refused = requests.post(f"{url}/v1/chat/completions", json=body, timeout=60)
    assert refused.status_code == 400
    assert "image" in refused.json()["error"]["message"]


def test_with_multi_token_prediction_many_at_once_get_the_texts_of_the_model(tmp_path):
    text = {**TINY, **GATED_DELTA_NET, "hidden_size": 64, "max_position_embeddings": 2048}
    folder = write_words(tmp_path / "Words", text, guessed=0.7, words=50)
    guesses = {"method": "mtp", "num_speculative_tokens": 3}
    flags = ["--model", str(folder), "--language-model-only", "--speculative-config", json.dumps(guesses)]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    words = [tokenizer.decode([number]) for number in said_words(tokenizer)[:50]]

    def said(url: str, n: int) -> str:
        body = {"query": f"Say {n} words.", "temperature": 0, "max_tokens": 60 + n}
        return requests.post(f"{url}/chat", json=body, timeout=120).json()["text"]

    with running_server(flags, tmp_path / "log") as url:
        with ThreadPoolExecutor(8) as people:
            texts = [*people.map(lambda n: said(url, n), range(16))]
        guessed, right = (gauge(url, f"spec_decode_num_{kind}_tokens_total") for kind in ("draft", "accepted"))
    assert texts == ["".join(words[i % 50] for i in range(60 + n)) for n in range(16)]
    assert 0.3 * guessed < right < 0.9 * guessed
