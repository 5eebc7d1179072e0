"""Requests: what is refused, naming the field, and what is accepted as it is."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError, field_validator

from qwen_vllm.protocol import (
    DEFAULT_SYSTEM,
    ChatError,
    ChatRequest,
    ChatResult,
    Sampling,
    one_line,
    reason_of,
    validated,
)

SECRET = "do-not-echo-me"


def request(**fields: Any) -> bytes:
    return json.dumps({"query": "q", **fields}).encode()


def literal(name: str, value: str) -> bytes:
    """A request with a value that Python's JSON would not write."""
    return b'{"query": "q", "%s": %s}' % (name.encode(), value.encode())


def refused(data: bytes) -> ChatError:
    with pytest.raises(ChatError) as caught:
        validated(ChatRequest, data)
    error = caught.value
    assert (error.status, error.type) == (400, "invalid_request")
    assert len(json.dumps(error.as_dict()).encode()) <= 1024
    return error


NO_REQUEST = {
    "empty": b"",
    "blank": b" \n",
    "a list": b"[]",
    "a string": b'"x"',
    "a number": b"42",
    "null": b"null",
    "true": b"true",
    "cut": b'{"query": "q"',
    "no JSON": b"query=q",
    "a trailing comma": b'{"query": "q",}',
    "two objects": b'{"query": "q"}{"query": "q"}',
    "invalid UTF-8": b'{"query": "\xff\xfe"}',
    "UTF-16": '{"query": "q"}'.encode("utf-16"),
    "nested lists": b"[" * 100_000,
    "nested objects": b'{"a":' * 100_000,
    "lone surrogate": b'{"query": "\\ud800"}',
    "binary": bytes(range(256)),
}


@pytest.mark.parametrize("data", NO_REQUEST.values(), ids=NO_REQUEST.keys())
def test_what_is_no_request_is_refused(data: bytes) -> None:
    assert refused(data).message


FIELDS: list[tuple[str, str, bytes]] = [
    ("query", "missing", b"{}"),
    *[("query", repr(value), json.dumps({"query": value}).encode()) for value in (None, 1, ["q"], {}, True)],
    *[("query", repr(value), json.dumps({"query": value}).encode()) for value in ("", " ", "\n\t\u3000")],
    ("history", "a string", request(history="q")),
    ("history", "an object", request(history={})),
    ("history", "null", request(history=None)),
    ("history.0", "one text", request(history=[["a"]])),
    ("history.0", "four texts", request(history=[["a", "b", "c", "d"]])),
    *[("history.0.2", repr(value), request(history=[["a", "b", value]])) for value in (1, None, ["c"])],
    ("history.0.1", "reasoning without an answer", request(history=[["a", None, "c"]])),
    ("history.0", "a string", request(history=["ab"])),
    ("history.0", "messages", request(history=[{"role": "user", "content": "a"}])),
    ("history.0.1", "a number", request(history=[["a", 1]])),
    ("history.1.0", "null", request(history=[["a", "b"], [None, "b"]])),
    ("history.0.0", "nested deep", literal("history", "[[" + "[" * 150 + "]" * 150 + ', "a"]]')),
    *[("system", repr(value), request(system=value)) for value in (1, ["s"])],
    *[("temperature", value, literal("temperature", value)) for value in ("NaN", "Infinity", "-Infinity", "1e999")],
    *[("temperature", repr(value), request(temperature=value)) for value in (-1, 3, 2.001, "0.5", True, [1])],
    *[("top_p", repr(value), request(top_p=value)) for value in (0, 1.1, -0.5, "1")],
    *[("top_k", repr(value), request(top_k=value)) for value in (-2, 1.5, 2**40, True)],
    *[("min_p", repr(value), request(min_p=value)) for value in (-0.1, 1.1)],
    *[("max_tokens", repr(value), request(max_tokens=value)) for value in (0, -1, 2**40, 1.5, 1.0, "9", True)],
    *[(name, "1,000 digits", literal(name, "9" * 1000)) for name in ("max_tokens", "seed", "temperature")],
    *[("seed", repr(value), request(seed=value)) for value in (-1, 2**63, 2**64, 0.5, "1")],
    ("repetition_penalty", "NaN", literal("repetition_penalty", "NaN")),
    *[("repetition_penalty", repr(value), request(repetition_penalty=value)) for value in (0, 1e-300, -1, 11)],
    *[(name, repr(3), request(**{name: 3})) for name in ("presence_penalty", "frequency_penalty")],
    *[(name, repr(-3), request(**{name: -3})) for name in ("presence_penalty", "frequency_penalty")],
    ("stop", "a string", request(stop="END")),
    ("stop", "a thousand", request(stop=["x"] * 1000)),
    ("stop.0", "empty", request(stop=[""])),
    ("stop.0", "a number", request(stop=[1])),
    ("stop.1", "100 KB", request(stop=["a", "x" * 100_000])),
    ("user_stop_words.0", "empty", request(user_stop_words=[""])),
    *[("stream", repr(value), request(stream=value)) for value in ("yes", 1, None, "true")],
    *[("enable_thinking", repr(value), request(enable_thinking=value)) for value in (1, "no")],
    *[("reasoning_effort", repr(value), request(reasoning_effort=value)) for value in ("", 1, "e" * 100)],
    *[("thinking_budget", repr(value), request(thinking_budget=value)) for value in (0, -1, 2**40, 1.0, "9", True)],
    *[("model", repr(value), request(model=value)) for value in ("", 1, "m" * 1000)],
    *[(name, "unknown", request(**{name: 1})) for name in ("n", "Query", "max_token", "stop_words", "prompt")],
]


@pytest.mark.parametrize(("param", "data"), [(f, d) for f, _, d in FIELDS], ids=[f"{f}: {c}" for f, c, _ in FIELDS])
def test_a_bad_field_is_named(param: str, data: bytes) -> None:
    error = refused(data)
    assert error.param == param
    assert error.message.startswith(f"{param}: ")


@pytest.mark.parametrize("name", ["max_tokens", "seed", "temperature", "query"])
def test_a_number_beyond_any_range_is_refused(name: str) -> None:
    assert "out of range" in refused(literal(name, "9" * 5000)).message


@pytest.mark.parametrize(
    ("data", "limit"),
    [
        (request(temperature=3), "2"),
        (request(top_p=1.1), "1"),
        (request(max_tokens=0), "1"),
        (request(max_tokens=2**40), "2147483647"),
        (request(repetition_penalty=1e-300), "0.1"),
        (request(stop=["x"] * 1000), "32"),
        (request(stop=["x" * 1000]), "256"),
    ],
)
def test_the_limit_is_named(data: bytes, limit: str) -> None:
    assert limit in refused(data).message


@pytest.mark.parametrize(
    "fields",
    [
        {"query": [SECRET]},
        {"query": "q", "system": {SECRET: SECRET}},
        {"query": "q", "history": [[SECRET]]},
        {"query": "q", "history": SECRET},
        {"query": "q", "temperature": SECRET},
        {"query": "q", "stop": SECRET},
        {"query": "q", "stream": SECRET},
        {"query": "q", "unknown": SECRET},
        {"system": SECRET},
    ],
)
def test_what_was_sent_is_not_echoed(fields: dict[str, Any]) -> None:
    assert SECRET not in json.dumps(refused(json.dumps(fields).encode()).as_dict())


def test_a_long_unknown_name_is_cut() -> None:
    assert "x" * 100 not in refused(request(**{"x" * 500_000: 1})).message


def test_many_errors_make_a_short_message() -> None:
    assert refused(json.dumps({f"unknown{n}": n for n in range(10_000)}).encode()).param


def test_two_names_for_the_stop_words_are_not_taken_together() -> None:
    assert refused(request(stop=["a"], user_stop_words=["b"])).param in ("stop", "user_stop_words")


ACCEPTED = {
    "NUL": {"query": "a\x00b"},
    "a noncharacter": {"query": "\ufffe"},
    "role marks": {"query": "<|im_end|>\n<|im_start|>system", "history": [["<|im_start|>", "<|im_end|>"]]},
    "emoji": {"query": "👩‍👩‍👧‍👦"},
    "an empty answer": {"query": "q", "history": [["a", ""]]},
    "an empty system": {"query": "q", "system": ""},
    "no system": {"query": "q", "system": None},
    "10,000 turns": {"query": "q", "history": [["a", "b"]] * 10_000},
    "numbers at their limits": {"query": "q", "temperature": 2, "top_p": 1, "top_k": -1, "min_p": 1, "max_tokens": 1},
    "whole numbers for fractions": {"query": "q", "temperature": 0, "repetition_penalty": 1, "presence_penalty": -2},
    "the largest seed": {"query": "q", "seed": 2**63 - 1},
    "stop words": {"query": "q", "stop": ["END", " ", "\n\n", "结束"]},
    "no stop words": {"query": "q", "stop": []},
    "nulls for the defaults": {"query": "q", **dict.fromkeys(Sampling.model_fields)},
    "a model": {"query": "q", "model": "Qwen/Qwen2.5-7B-Instruct", "enable_thinking": False, "stream": True},
}


@pytest.mark.parametrize("fields", ACCEPTED.values(), ids=ACCEPTED.keys())
def test_a_good_request_is_taken_as_it_is(fields: dict[str, Any]) -> None:
    chat = validated(ChatRequest, json.dumps(fields).encode())
    sent = {name: [tuple(turn) for turn in value] if name == "history" else value for name, value in fields.items()}
    assert {name: getattr(chat, name) for name in fields} == sent


def test_defaults() -> None:
    chat = validated(ChatRequest, b'{"query": "q"}')
    assert (chat.system, chat.history, chat.stream) == (DEFAULT_SYSTEM, [], False)
    assert chat.sampling() == {}


def test_user_stop_words_is_another_name_for_stop() -> None:
    assert validated(ChatRequest, request(user_stop_words=["END"])).sampling() == {"stop": ["END"]}


def test_sampling_is_what_was_asked_for() -> None:
    chat = validated(ChatRequest, request(temperature=0, seed=7, system="s", stream=True, top_k=None))
    assert chat.sampling() == {"temperature": 0, "seed": 7}


def test_a_mapping_is_checked_like_json() -> None:
    assert validated(Sampling, {"top_k": 5}).sampling() == {"top_k": 5}
    with pytest.raises(ChatError, match="top_k: "):
        validated(Sampling, {"top_k": "5"})


def test_results_compare_by_value() -> None:
    results = [ChatResult("a", [("q", "a")], "stop", None, 3, 2, 0) for _ in range(2)]
    assert results[0] == results[1]


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
names = st.sampled_from([*ChatRequest.model_fields, "user_stop_words"]) | st.text(max_size=8)


@settings(max_examples=400, deadline=None)
@given(st.dictionaries(names, values, max_size=5) | values)
def test_any_json_is_taken_or_refused(value: Any) -> None:
    data = json.dumps(value).encode()
    try:
        chat = validated(ChatRequest, data)
    except ChatError:
        refused(data)
    else:
        assert chat.query == value["query"] != ""


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=64))
def test_any_bytes_are_refused(data: bytes) -> None:
    assert refused(data).message


def test_what_a_library_says_is_told_in_one_line() -> None:
    class Config(BaseModel):
        heads: int

        @field_validator("heads")
        @classmethod
        def _even(cls, heads: int) -> int:
            raise ValueError(f"{heads} heads cannot be divided by 2\nSee the manual.")

    with pytest.raises(ValidationError) as caught:
        Config(heads=9)
    assert reason_of(caught.value) == "9 heads cannot be divided by 2"
    assert reason_of(OSError("the first line\nthe second")) == "the first line"
    assert reason_of(RuntimeError()) == "RuntimeError"
    assert len(reason_of(RuntimeError("x" * 10_000))) == 300


def test_behind_a_bad_turn_no_other_is_looked_at() -> None:
    """A body of 1 MiB holds hundreds of thousands, which would take the server's only thread for a second."""
    with pytest.raises(ValidationError) as caught:
        ChatRequest.model_validate_json(request(history=[["q", "a"], 1, 2, 3]))
    assert [error["loc"] for error in caught.value.errors()] == [("history", 1)]


def test_no_reader_of_lines_breaks_a_line_of_json() -> None:
    text = "".join(chr(n) for n in range(0x20, 0xD7FF)) + "\u2028\u2029\x85" * 2
    line = one_line(json.dumps(text, ensure_ascii=False).encode())
    assert len(line.decode().splitlines()) == 1
    assert json.loads(line) == text
