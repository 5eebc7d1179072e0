"""Models that think, on the real engine: control tokens of Qwen's that the engine itself says, in every way to ask."""

import asyncio
import json
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import openai
import pytest
import requests
from transformers import PreTrainedTokenizerBase

from qwen_vllm.protocol import ChatResult, Part, Reasoning, Sampling
from qwen_vllm.with_server import running_server
from tests.support.tiny_reciter import write_reciter
from tests.support.tokenizers import QWEN3_TEMPLATE
from vllm_client import stream_messages_async
from vllm_wrapper import ChatModel

pytestmark = pytest.mark.long
THOUGHT, TEXT = "Hm, two and three 是五，👩‍🚀 knows that.", "It is five 朋友！🎉"
ANSWER = f"{THOUGHT}\n\n\n</think>\n\n{TEXT}<|im_end|>"
THOUGHT_TOKENS, ALL_TOKENS = 16, 27
GREEDY = Sampling(temperature=0)
HISTORY = [("1 + 1?", "<think>\nOne and one.\n</think>\n\n2")]


def write(folder: Path, tokenizer: PreTrainedTokenizerBase, template: str, start: str) -> Path:
    """A model that says ANSWER, with its start mark where `start` has it, and only the text if told not to think."""
    own, tokenizer.chat_template = tokenizer.chat_template, template
    write_reciter(folder, tokenizer, start + ANSWER)
    tokenizer.chat_template = own
    return folder


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory, qwen_tokenizer: PreTrainedTokenizerBase) -> Path:
    return write(tmp_path_factory.mktemp("models") / "Qwen3-Tiny", qwen_tokenizer, QWEN3_TEMPLATE, "\n<think>")


@dataclass
class Said:
    """What a model says offline: streamed; in a batch, with thinking on, off, and cut in the thought."""

    parts: list[Part]
    batch: list[ChatResult]


def say(folder: Path) -> Said:
    """Loads the model in `folder` and asks it; runs in a process of its own, with no other engine in it."""
    model = ChatModel(str(folder))
    rows = [{"query": "2 + 3?"}, {"query": "?", "enable_thinking": False}, {"query": "?", "max_tokens": 6}]
    return Said(list(model.stream_chat("2 + 3?", HISTORY, sampling=GREEDY)), model.chat_batch(rows, GREEDY))


@pytest.fixture(scope="module")
def said(qwen3: Path) -> Iterator[Future[Said]]:
    """What Qwen3 says offline; at work while the server starts."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        yield process.submit(say, qwen3)


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory, qwen3: Path, said: Future[Said]) -> Iterator[str]:
    with running_server(["--model", str(qwen3)], tmp_path_factory.mktemp("server") / "log") as url:
        yield url


def ask(url: str, **fields: Any) -> tuple[list[dict[str, str]], dict[str, Any]]:
    """The lines of the streamed answer but the last, and the whole answer, which is the same."""
    body = {"query": "2 + 3?", "temperature": 0, **fields}
    whole = requests.post(f"{url}/chat", json=body, timeout=60).json()
    streamed = requests.post(f"{url}/chat", json={**body, "stream": True}, timeout=60).text
    *lines, last = map(json.loads, streamed.splitlines())
    joined = {name: "".join(line.get(name, "") for line in lines) for name in ("reasoning", "delta")}
    thought = {"reasoning": joined["reasoning"]} if joined["reasoning"] else {}
    assert {"text": joined["delta"], **thought, **last} == whole
    return lines, whole


def test_a_thought_comes_before_the_answer_and_apart_from_it(url):
    lines, whole = ask(url)
    assert (whole["reasoning"], whole["text"], whole["finish_reason"]) == (THOUGHT, TEXT, "stop")
    kinds = [name for line in lines for name in line]
    assert kinds == sorted(kinds, reverse=True)
    assert set(kinds) == {"reasoning", "delta"}
    assert kinds.count("reasoning") == THOUGHT_TOKENS - 1  # two tokens are one character
    assert whole["usage"] == {
        "prompt_tokens": 24,
        "completion_tokens": ALL_TOKENS,
        "reasoning_tokens": THOUGHT_TOKENS,
    }


def test_a_model_told_not_to_think_does_not(url):
    _, whole = ask(url, enable_thinking=False)
    assert "reasoning" not in whole
    assert (whole["text"], whole["usage"]["reasoning_tokens"]) == (TEXT, 0)


@pytest.mark.parametrize(
    ("fields", "thought", "text", "ending"),
    [
        ({"max_tokens": 6}, "Hm, two and", "", ("length", None)),
        ({"max_tokens": 1}, "", "", ("length", None)),
        ({"max_tokens": THOUGHT_TOKENS + 2}, THOUGHT, "", ("length", None)),
        ({"stop": ["three 是五"]}, "Hm, two and ", "", ("stop", "three 是五")),
        ({"stop": ["is five"]}, THOUGHT, "It ", ("stop", "is five")),
        ({"stop": ["</think>\n\nIt is six, and that is all"]}, THOUGHT, TEXT, ("stop", None)),
    ],
)
def test_an_answer_may_end_anywhere(url, fields, thought, text, ending):
    _, whole = ask(url, **fields)
    assert (whole.get("reasoning", ""), whole["text"]) == (thought, text)
    assert (whole["finish_reason"], whole["stop_reason"]) == ending


def test_the_openai_route_tells_the_same(url):
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="-")
    messages = [{"role": "system", "content": "You are a helpful assistant."}]
    for user, answer in HISTORY:
        messages += [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]
    messages.append({"role": "user", "content": "2 + 3?"})
    answer = client.chat.completions.create(model="Qwen3-Tiny", messages=messages, temperature=0)
    message, usage = answer.choices[0].message, answer.usage
    _, ours = ask(url, history=HISTORY)
    assert (message.reasoning.strip("\n"), message.content.lstrip("\n")) == (ours["reasoning"], ours["text"])
    assert (usage.prompt_tokens, usage.completion_tokens) == (ours["usage"]["prompt_tokens"], ALL_TOKENS)
    assert usage.completion_tokens_details.reasoning_tokens == THOUGHT_TOKENS

    async def streamed(sampling: Sampling) -> list[Part]:
        return [part async for part in stream_messages_async(url, messages, sampling)]

    *parts, result = asyncio.run(streamed(GREEDY))
    assert "".join(part.text for part in parts if isinstance(part, Reasoning)).strip("\n") == THOUGHT
    assert "".join(part for part in parts if isinstance(part, str)) == result.text == f"\n\n{TEXT}"
    *parts, result = asyncio.run(streamed(Sampling(temperature=0, enable_thinking=False)))
    assert ("".join(parts), result.reasoning) == (TEXT, "")


def check(said: Said, tokens: int) -> None:
    """The answers hold the thought and the text, of `tokens` tokens."""
    *parts, result = said.parts
    thinking, unthinking, cut = said.batch
    assert "".join(part.text for part in parts if isinstance(part, Reasoning)) == THOUGHT
    assert "".join(part for part in parts if isinstance(part, str)) == TEXT
    assert result.history == [*HISTORY, ("2 + 3?", TEXT)]
    assert (thinking.reasoning, thinking.text) == (result.reasoning, result.text) == (THOUGHT, TEXT)
    assert (result.reasoning_tokens, result.completion_tokens) == (THOUGHT_TOKENS, tokens)
    assert (unthinking.reasoning, unthinking.text, unthinking.reasoning_tokens) == ("", TEXT, 0)
    assert (cut.text, cut.finish_reason) == ("", "length")
    assert cut.reasoning and THOUGHT.startswith(cut.reasoning)


def test_offline_thoughts_stand_apart_too(said):
    check(said.result(), ALL_TOKENS)


def test_a_thought_that_the_prompt_begins(tmp_path, qwen_tokenizer):
    template = QWEN3_TEMPLATE.replace("assistant\\n' }}", "assistant\\n<think>\\n' }}")
    qwq = write(tmp_path / "QwQ-Tiny", qwen_tokenizer, template, "\n")
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        check(process.submit(say, qwq).result(), ALL_TOKENS - 1)
