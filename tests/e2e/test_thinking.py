"""Models that think, on the real engine: control tokens of Qwen's that the engine itself says, in every way to ask."""

import asyncio
import json
import re
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

from qwen_vllm.protocol import ChatResult, Part, Reasoning, Sampling, Turn, turn
from qwen_vllm.with_server import running_server
from tests.support.tiny_families import QWEN38
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
REASONED = [("1 + 1?", "2", "One and one."), ("?", "!", "Hm. " * 9)]
SPELLED = "One <think> or </think> in letters.", "The tags <think> and </think> too."
BUDGETS, ROWS = (1, 2, 5, 11, 16, 17, 24), range(300)


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


def load_and_say(folder: Path) -> Said:
    """Loads the model in `folder` and asks it; runs in a process of its own, with no other engine in it."""
    return say(ChatModel(str(folder)))


def say(model: ChatModel) -> Said:
    rows = [{"query": "2 + 3?"}, {"query": "?", "enable_thinking": False}, {"query": "?", "max_tokens": 6}]
    return Said(list(model.stream_chat("2 + 3?", HISTORY, sampling=GREEDY)), model.chat_batch(rows, GREEDY))


@pytest.fixture(scope="module")
def said(qwen3: Path) -> Iterator[Future[Said]]:
    """What Qwen3 says offline; at work while the server starts."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        yield process.submit(load_and_say, qwen3)


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
        ({"stop": ["three 是五"]}, THOUGHT, TEXT, ("stop", None)),
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


def openai_answer(url: str, **fields: Any) -> tuple[str, str, str]:
    """The reasoning, the text and why it ended, on OpenAI's route; whole and streamed they are the same."""
    body = {"messages": [{"role": "user", "content": "2 + 3?"}], "temperature": 0, **fields}
    [choice] = requests.post(f"{url}/v1/chat/completions", json=body, timeout=60).json()["choices"]
    whole = choice["message"].get("reasoning") or "", choice["message"]["content"] or "", choice["finish_reason"]
    reasoning, text, finish_reason = "", "", None
    streamed = requests.post(f"{url}/v1/chat/completions", json={**body, "stream": True}, timeout=60).content.decode()
    for line in streamed.splitlines():
        if line.startswith("data: {"):
            [choice] = json.loads(line[6:])["choices"]
            reasoning += choice["delta"].get("reasoning") or ""
            text += choice["delta"].get("content") or ""
            finish_reason = choice["finish_reason"] or finish_reason
    assert (reasoning.strip("\n"), text, finish_reason) == (whole[0].strip("\n"), *whole[1:])
    return reasoning.strip("\n"), text.lstrip("\n"), whole[2]


@pytest.mark.parametrize(
    ("stop", "text"),
    [(["three 是五"], TEXT), (["Hm"], TEXT), (["is five"], "It "), (["Hm", "It"], ""), (["\n\n\n"], TEXT)],
)
@pytest.mark.parametrize("fields", [{}, {"include_reasoning": False}])
def test_stop_words_count_in_the_text_alone_on_the_openai_route(url, stop, text, fields):
    thought = THOUGHT if fields == {} else ""
    assert openai_answer(url, stop=stop, **fields) == (thought, text, "stop")


def test_a_model_told_not_to_think_stops_at_stop_words_on_the_openai_route(url):
    answer = openai_answer(url, stop=["is five"], chat_template_kwargs={"enable_thinking": False})
    assert answer == ("", "It ", "stop")


def other_answer(url: str, route: str, *stop: str) -> tuple[str, str]:
    """The reasoning and the text on another of vLLM's routes; whole and streamed they are the same."""
    messages = [{"role": "user", "content": "2 + 3?"}]
    fields = {
        "/v1/responses": {"input": "2 + 3?", "stop": stop},
        "/v1/messages": {"messages": messages, "max_tokens": 200, "stop_sequences": stop},
    }
    model = requests.get(f"{url}/v1/models", timeout=60).json()["data"][0]["id"]
    body = {"model": model, "temperature": 0, **fields[route]}
    said = requests.post(f"{url}{route}", json=body, timeout=60).json()
    parts = said.get("content") or [part for item in said["output"] for part in item["content"] or ()]
    whole = [(part["type"], part.get("thinking") or part.get("text")) for part in parts]
    streamed = []
    for line in requests.post(f"{url}{route}", json={**body, "stream": True}, timeout=60).content.decode().splitlines():
        match json.loads(line[6:]) if line.startswith("data: {") else None:
            case {
                "type": "content_block_delta",
                "delta": {"type": kind, "thinking": piece} | {"type": kind, "text": piece},
            }:
                streamed.append((kind, piece))
            case {"type": "response.reasoning_text.delta" | "response.output_text.delta" as kind, "delta": piece}:
                streamed.append((kind, piece))

    def joined(pieces: list[tuple[str, str]]) -> tuple[str, str]:
        thought = "".join(piece for kind, piece in pieces if "thinking" in kind or "reasoning" in kind)
        text = "".join(piece for kind, piece in pieces if "text" in kind and "reasoning" not in kind)
        return thought.strip("\n"), text.lstrip("\n")

    assert joined(streamed) == joined(whole)
    return joined(whole)


OTHER_ROUTES = pytest.mark.parametrize("route", ["/v1/responses", "/v1/messages"])


@OTHER_ROUTES
@pytest.mark.parametrize(("stop", "text"), [("three 是五", TEXT), ("Hm", TEXT), ("is five", "It ")])
def test_stop_words_count_in_the_text_alone_on_the_other_routes(url: str, route: str, stop: str, text: str) -> None:
    assert other_answer(url, route, stop) == (THOUGHT, text)


@pytest.fixture(scope="module")
def speller(tmp_path_factory: pytest.TempPathFactory, qwen_tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """A server of a model that also spells the marks in plain letters."""
    thought, text = (
        [token for part in re.split("(?<=<)", said) for token in qwen_tokenizer.encode(part)] for said in SPELLED
    )
    folder, encode = tmp_path_factory.mktemp("models") / "Speller", qwen_tokenizer.encode
    own, qwen_tokenizer.chat_template = qwen_tokenizer.chat_template, QWEN3_TEMPLATE
    write_reciter(
        folder, qwen_tokenizer, encode("\n<think>\n") + thought + encode("\n</think>\n\n") + text + encode("<|im_end|>")
    )
    qwen_tokenizer.chat_template = own
    with running_server(["--model", str(folder)], tmp_path_factory.mktemp("server") / "log") as url:
        yield url


def test_marks_in_plain_letters_are_text_on_both_routes(speller: str) -> None:
    assert openai_answer(speller) == (*SPELLED, "stop")
    assert openai_answer(speller, stop=["too"]) == (SPELLED[0], SPELLED[1].partition("too")[0], "stop")
    _, whole = ask(speller)
    assert (whole["reasoning"], whole["text"]) == SPELLED


@OTHER_ROUTES
def test_marks_in_plain_letters_are_text_on_the_other_routes(speller: str, route: str) -> None:
    assert other_answer(speller, route) == SPELLED
    assert other_answer(speller, route, "too") == (SPELLED[0], SPELLED[1].partition("too")[0])


def check(said: Said, tokens: int, kept: str) -> None:
    """The answers hold the thought and the text, of `tokens` tokens; the new turn has the reasoning `kept`."""
    *parts, result = said.parts
    thinking, unthinking, cut = said.batch
    assert "".join(part.text for part in parts if isinstance(part, Reasoning)) == THOUGHT
    assert "".join(part for part in parts if isinstance(part, str)) == TEXT
    assert result.history == [*HISTORY, turn("2 + 3?", TEXT, kept)]
    assert (thinking.reasoning, thinking.text) == (result.reasoning, result.text) == (THOUGHT, TEXT)
    assert (result.reasoning_tokens, result.completion_tokens) == (THOUGHT_TOKENS, tokens)
    assert (unthinking.reasoning, unthinking.text, unthinking.reasoning_tokens) == ("", TEXT, 0)
    assert (cut.text, cut.finish_reason) == ("", "length")
    assert cut.reasoning and THOUGHT.startswith(cut.reasoning)


def test_offline_thoughts_stand_apart_too(said):
    check(said.result(), ALL_TOKENS, "")


@dataclass
class Budgeted:
    """What Qwen3.8 says offline without a budget, with each of BUDGETS, and in a batch whose rows have one or none."""

    plain: Said
    streamed: list[list[Part]]
    batch: list[tuple[dict[str, Any], ChatResult]]


def say_within_budgets(folder: Path) -> Budgeted:
    """Runs in a process of its own."""
    model = ChatModel(str(folder))
    rows = [
        {"query": "?", "history": REASONED[: n % 3]} | ({"thinking_budget": n % 7 + 1} if n % 3 else {}) for n in ROWS
    ]
    rows[4::5] = [{**row, "enable_thinking": False} for row in rows[4::5]]
    streamed = [
        list(model.stream_chat("?", REASONED, sampling=Sampling(temperature=0, thinking_budget=budget)))
        for budget in BUDGETS
    ]
    return Budgeted(say(model), streamed, list(zip(rows, model.chat_batch(rows, GREEDY), strict=True)))


@pytest.fixture(scope="module")
def qwen38(tmp_path_factory: pytest.TempPathFactory, qwen_tokenizer: PreTrainedTokenizerBase) -> Path:
    """A model whose prompt begins the reasoning, and holds that of earlier turns."""
    return write(tmp_path_factory.mktemp("models") / "Qwen3.8-Tiny", qwen_tokenizer, QWEN38, "\n")


@pytest.fixture(scope="module")
def budgeted(qwen38: Path) -> Budgeted:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(say_within_budgets, qwen38).result()


def within(budget: int, reasoning: str, tokens: int) -> bool:
    """Whether this is the start of the thought, and all that the budget allows."""
    return THOUGHT.startswith(reasoning.rstrip("�")) and tokens == min(budget, THOUGHT_TOKENS)


def test_a_thought_that_the_prompt_begins(budgeted: Budgeted) -> None:
    check(budgeted.plain, ALL_TOKENS - 1, THOUGHT)


def test_a_budget_ends_the_reasoning_and_the_answer_still_comes_offline(budgeted: Budgeted) -> None:
    for budget, (*parts, result) in zip(BUDGETS, budgeted.streamed, strict=True):
        # The line break that the prompt puts behind its tag counts as one.
        assert within(budget - 1, result.reasoning, result.reasoning_tokens)
        assert "".join(part.text for part in parts if isinstance(part, Reasoning)) == result.reasoning
        assert (result.text, result.finish_reason) == (TEXT, "stop")
        assert result.history[:2] == REASONED


def test_a_row_keeps_to_its_own_budget_whatever_others_have(budgeted: Budgeted) -> None:
    for row, result in budgeted.batch:
        budget = 1 if row.get("enable_thinking") is False else row.get("thinking_budget", ALL_TOKENS)
        assert within(budget - 1, result.reasoning, result.reasoning_tokens), row
        assert result.text == TEXT


@pytest.mark.parametrize("history", [[], REASONED])
def test_a_budget_ends_the_reasoning_and_the_answer_still_comes(url: str, history: list[Turn]) -> None:
    for budget in BUDGETS:
        _, whole = ask(url, thinking_budget=budget, history=history)
        assert within(budget, whole["reasoning"], whole["usage"]["reasoning_tokens"])
        assert (whole["text"], whole["finish_reason"]) == (TEXT, "stop")
    _, whole = ask(url, thinking_budget=3, enable_thinking=False, history=history)
    assert "reasoning" not in whole
    assert whole["text"] == TEXT
