"""What is read as a row, and what is said of what is none."""

import io
import json
from types import SimpleNamespace

import pytest
from vllm.renderers.chat_utils import parse_chat_messages

from qwen_vllm.offline.rows import MAX_LINE, Row, read_rows
from qwen_vllm.protocol import DEFAULT_SYSTEM


def read(*lines: str | bytes, reference: str | None = None) -> list[Row]:
    data = b"\n".join(line if isinstance(line, bytes) else line.encode() for line in lines)
    return list(read_rows(io.BytesIO(data), reference))


def only(line: str | bytes, reference: str | None = None) -> Row:
    [row] = read(line, reference=reference)
    return row


def test_a_row_is_a_request_with_an_id():
    row = only('{"id": "a", "query": "你好", "history": [["1", "2"]], "system": null, "temperature": 0.5}')
    assert (row.line, row.id, row.error) == (1, "a", None)
    assert row.request == {"query": "你好", "history": [["1", "2"]], "temperature": 0.5}


def test_byte_order_mark_line_ends_and_blank_lines():
    rows = read(b'\xef\xbb\xbf{"query": "1"}\r', b"", b"  \r", b'{"query": "2"}\r', b'{"query": "3"}')
    assert [(row.line, row.request) for row in rows] == [(1, {"query": "1"}), (4, {"query": "2"}), (5, {"query": "3"})]
    assert read("") == read("\n\n") == read(b"\xef\xbb\xbf\n") == []


def test_openai_messages():
    messages = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "U"},
        {"role": "assistant", "content": "A"},
        {"role": "user", "content": "Q"},
    ]
    wanted = {"query": "Q", "history": [("U", "A")], "system": "S"}
    assert only(json.dumps({"messages": messages, "id": 7})).request == wanted
    body = {"model": "gpt", "messages": messages, "max_completion_tokens": 9, "stop": "\n"}
    line = {"custom_id": "x", "method": "POST", "url": "/v1/chat/completions", "body": body}
    assert only(json.dumps(line)).id == "x"
    assert only(json.dumps(line)).request == wanted | {"max_tokens": 9, "stop": ["\n"]}
    assert only(json.dumps({"messages": messages[-1:]})).request == {"query": "Q", "history": []}
    messages[0]["role"] = "developer"
    assert only(json.dumps({"messages": messages})).request == wanted


def test_parts_of_text_are_joined_as_vllm_does():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b\n"}]
    messages = [{"role": role, "content": parts} for role in ("system", "user", "assistant", "user")]
    wanted = {"query": "a\nb\n", "history": [("a\nb\n", "a\nb\n")], "system": "a\nb\n"}
    assert only(json.dumps({"messages": messages})).request == wanted
    parsed, _, _ = parse_chat_messages(
        messages[1:2], SimpleNamespace(multimodal_config=None, enable_prompt_embeds=False), "string"
    )
    assert parsed[0]["content"] == wanted["query"]


def test_without_a_system_message_openais_form_has_none_and_ours_has_the_default():
    ours, openais = read('{"query": "Q"}', '{"messages": [{"role": "user", "content": "Q"}]}')
    assert (ours.default_system, openais.default_system) == (DEFAULT_SYSTEM, None)


@pytest.mark.parametrize(
    ("fields", "further"),
    [
        ({"tools": [], "tool_choice": "none"}, []),
        ({"response_format": {"type": "text"}}, []),
        ({}, [{"role": "assistant", "tool_calls": [{}]}, {"role": "tool", "content": "!"}]),
    ],
)
def test_a_row_with_tools_or_calls_keeps_its_messages(fields, further):
    messages = [{"role": "user", "content": "?"}, *further]
    asked = {"messages": messages, **fields, "model": "gpt", "max_completion_tokens": 9, "stop": "x"}
    assert only(json.dumps(asked)).request == {"messages": messages, **fields, "max_tokens": 9, "stop": ["x"]}


@pytest.mark.parametrize("name", ["reasoning", "reasoning_content"])
def test_an_answer_may_have_its_reasoning(name):
    user, query = {"role": "user", "content": "U"}, {"role": "user", "content": "Q"}
    messages = [
        user,
        {"role": "assistant", "content": "A", name: "R"},
        user,
        {"role": "assistant", "content": "B"},
        query,
    ]
    assert only(json.dumps({"messages": messages})).request["history"] == [("U", "A", "R"), ("U", "B")]
    wrong = {
        f"messages.1.{name}": [user, {"role": "assistant", "content": "A", name: ["R"]}, query],
        f"messages.0.{name}": [{**user, name: "R"}, {"role": "assistant", "content": "A"}, query],
        "messages.1.content": [user, {"role": "assistant", name: "R"}, query],
    }
    assert [only(json.dumps({"messages": messages})).error.param for messages in wrong.values()] == [*wrong]


@pytest.mark.parametrize(
    "roles", ["", "s", "a", "ua", "uu", "us", "usu", "ssu", "su-a", "uau-u"], ids=lambda roles: roles or "none"
)
def test_messages_whose_roles_make_no_conversation(roles):
    names = {"s": "system", "u": "user", "a": "assistant"}
    messages = [{"role": names[role], "content": "?"} for role in roles if role in names]
    assert "take turns" in only(json.dumps({"messages": messages})).error.message


@pytest.mark.parametrize(
    "line, reason",
    [
        (b'{"query": "\xc4\xe3"}', "not UTF-8"),
        ('{"query": ', "not JSON"),
        ('{"query": "a", "temperature": NaN}', "not JSON"),
        ('{"query": "\\ud800"}', "not JSON"),
        ("[" * 2000, "not JSON"),
        ('"hello"', "not an object"),
        ("[]", "not an object"),
        ("42", "not an object"),
        ('{"id": true, "query": "a"}', "id: must be"),
        ('{"custom_id": 1.5, "query": "a"}', "custom_id: must be"),
        ('{"messages": "hello"}', "messages"),
        ('{"messages": [{"role": "function", "content": ""}]}', "messages.0.role"),
        ('{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}', "messages.0.content: of parts only"),
        ('{"messages": [{"role": "user", "content": [{"type": "text", "text": 1}]}]}', "messages.0.content: of parts"),
        ('{"messages": [{"role": "user", "content": ["a"]}]}', "messages.0.content: of parts only those of text"),
        ('{"messages": [], "query": "a"}', "query: cannot stand beside messages"),
        ('{"custom_id": "a", "url": "/v1/embeddings", "body": {}}', "url"),
        ('{"custom_id": "a", "body": {}, "query": "a"}', "query"),
        ('{"custom_id": "a", "body": []}', "body"),
    ],
)
def test_what_is_no_row_says_why_and_the_next_one_is_read(line, reason):
    bad, good = read(line, '{"query": "next"}')
    assert reason in bad.error.message
    assert len(bad.error.message) < 300
    assert (good.line, good.error, good.request) == (2, None, {"query": "next"})


def test_a_row_keeps_the_id_that_was_read_before_its_error():
    assert only('{"id": "a", "messages": 1}').id == "a"


def test_a_line_that_is_too_long_is_refused_by_its_number_and_not_held():
    class Counted(io.BytesIO):
        longest = 0

        def readline(self, size: int) -> bytes:
            line = super().readline(size)
            self.longest = max(self.longest, len(line))
            return line

    file = Counted(b'{"query": "1"}\n{"query": "' + b"x" * 40 * 2**20 + b'"}\n{"query": "3"}\n')
    first, long, last = read_rows(file)
    assert (first.error, last.error, last.line) == (None, None, 3)
    assert long.line == 2
    assert str(MAX_LINE) in long.error.message
    assert file.longest == MAX_LINE + 1


def test_the_reference_is_no_part_of_the_request():
    row = only('{"query": "1 + 1?", "answer": 2}', reference="answer")
    assert (row.reference, row.request) == ("2", {"query": "1 + 1?"})
    assert only('{"query": "1 + 1?"}', reference="answer").reference is None
    assert "answer" in only('{"query": "1 + 1?", "answer": ["2"]}', reference="answer").error.message


def test_the_key_is_of_id_and_request_or_of_line_and_request():
    a, b, c = read('{"query": "1"}', '{"query": "1"}', '{"query": "2"}')
    assert len({a.key, b.key, c.key}) == 3
    a, b, c = read('{"id": 1, "query": "1", "seed": 1}', '{"seed":1,"query":"1","id":1}', '{"id": "1", "query": "1"}')
    assert a.key == b.key != c.key
    with_reference = read("", '{"query": "1", "a": "x"}', reference="a")[0]
    assert with_reference.key == read("", '{"query": "1"}')[0].key
