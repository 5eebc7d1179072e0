"""Tools on the real engine, without a flag: models that recite calls, asked on each of vLLM's routes."""

import json
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import openai
import pytest
import requests

import vllm_offline
from qwen_vllm.with_server import running_server
from tests.support.programs import KEY
from tests.support.tiny_reciter import write_reciter
from tests.support.tokenizers import qwen36_tokenizer, qwen_tokenizer
from tests.support.tool_templates import (
    BEFORE,
    JSON_TOOLS,
    NO_CALL,
    OBJECT,
    PLAIN,
    RESULT,
    SAID,
    THOUGHT,
    TOOLS,
    WEATHER,
    WEATHER_ARGUMENTS,
    XML_TOOLS,
    as_json,
    as_xml,
    recited,
    scripted,
)

pytestmark = pytest.mark.long
ASKED = [{"role": "user", "content": "?"}]
CALL, TWO, WEATHER_CALL = {"say": 1}, {"say": 3}, ("get_weather", WEATHER_ARGUMENTS)
NAMED = {"type": "function", "function": {"name": "now"}}
STRICT = [{**tool, "function": {**tool["function"], "strict": True}} for tool in TOOLS]


def write(folder: Path) -> Path:
    """A model that makes calls as JSON, or as XML behind a thought, as the folder's name says."""
    if folder.name == "JSON":
        write_reciter(folder, qwen_tokenizer(scripted(JSON_TOOLS), *SAID), *recited(as_json))
    else:
        write_reciter(folder, qwen36_tokenizer(scripted(XML_TOOLS, thinks=True)), *recited(as_xml, thinks=True))
    return folder


@dataclass
class Served:
    """A model and its server."""

    name: str
    url: str
    folder: Path

    def post(self, path: str, body: dict[str, Any], **headers: str) -> requests.Response:
        headers = headers or {"Authorization": f"Bearer {KEY}"}
        body = {"model": self.name, "temperature": 0, **body}
        return requests.post(f"{self.url}{path}", json=body, headers=headers, timeout=120)

    @property
    def thought(self) -> str:
        return THOUGHT if self.name == "XML" else ""

    @property
    def openai(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=KEY, max_retries=0)


@pytest.fixture(scope="module", params=["JSON", "XML"])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = write(tmp_path_factory.mktemp("models") / request.param)
    flags = ["--model", str(folder), "--api-key", KEY, "--max-num-queued-reqs", "8"]
    with running_server(flags, tmp_path_factory.mktemp("server") / "log") as url:
        yield Served(request.param, url, folder)


@dataclass
class Said:
    """An answer."""

    text: str = ""
    reasoning: str = ""
    calls: list[list[str]] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)
    finish_reason: str = ""

    @property
    def read(self) -> list[tuple[str, Any]]:
        return [(name, json.loads(arguments)) for name, arguments in self.calls]


def chat(served: Served, options: dict[str, Any] | None = None, **fields: Any) -> Said:
    """The whole answer, which is the same as the streamed one."""
    fields = {"messages": ASKED, "temperature": 0, "max_tokens": 300, "model": served.name, **fields}
    fields["extra_body"] = {"chat_template_kwargs": options or {}}
    choice = served.openai.chat.completions.create(**fields).choices[0]
    calls = choice.message.tool_calls or []
    whole = Said(
        choice.message.content or "",
        getattr(choice.message, "reasoning", None) or "",
        [[call.function.name, call.function.arguments] for call in calls],
        [call.id for call in calls],
        choice.finish_reason,
    )
    streamed = Said()
    for chunk in served.openai.chat.completions.create(**fields, stream=True):
        for choice in chunk.choices:
            streamed.text += choice.delta.content or ""
            streamed.reasoning += getattr(choice.delta, "reasoning", None) or ""
            streamed.finish_reason = choice.finish_reason or streamed.finish_reason
            for call in choice.delta.tool_calls or []:
                if call.index == len(streamed.calls):
                    streamed.calls.append([call.function.name, ""])
                    streamed.ids.append(call.id)
                streamed.calls[call.index][1] += call.function.arguments or ""
    assert len({*whole.ids, *streamed.ids}) == 2 * len(calls)
    whole.ids = streamed.ids = []
    assert streamed == whole
    return whole


@pytest.mark.parametrize(
    ("options", "fields", "text", "calls"),
    [
        ({}, {}, PLAIN, []),
        ({"say": 0}, {"tools": TOOLS}, PLAIN, []),
        ({"say": 5}, {"tools": TOOLS}, NO_CALL, []),
        (CALL, {"tools": TOOLS}, "", [WEATHER_CALL]),
        (TWO, {"tools": TOOLS}, BEFORE, [("get_weather", {"unit": "K", "city": "Paris"}), ("now", {})]),
        (CALL, {"tools": TOOLS, "tool_choice": "auto"}, "", [WEATHER_CALL]),
        (CALL, {"tools": TOOLS, "tool_choice": "required"}, "", [WEATHER_CALL]),
        ({"say": 0}, {"tools": TOOLS, "tool_choice": "required"}, "", [("now", {})]),
        (CALL, {"tools": TOOLS, "tool_choice": NAMED}, "", [("now", {})]),
        ({"say": 0}, {"tools": TOOLS, "tool_choice": NAMED}, "", [("now", {})]),
        (CALL, {"tools": STRICT}, "", [WEATHER_CALL]),
        ({"say": 0}, {"tools": STRICT}, PLAIN, []),
        ({"say": 0}, {"tools": STRICT, "tool_choice": "required"}, "", [("now", {})]),
        (CALL, {"tools": STRICT, "tool_choice": NAMED}, "", [("now", {})]),
        (
            TWO,
            {"tools": TOOLS, "parallel_tool_calls": False},
            BEFORE,
            [("get_weather", {"unit": "K", "city": "Paris"})],
        ),
        ({"say": 4, "enable_thinking": False}, {"response_format": {"type": "json_object"}}, OBJECT, []),
        (
            CALL,
            {"tools": TOOLS, "response_format": {"type": "json_object"}, "tool_choice": "required"},
            "",
            [WEATHER_CALL],
        ),
    ],
)
def test_calls_whole_and_streamed(
    served: Served, options: dict[str, Any], fields: dict[str, Any], text: str, calls: list[tuple[str, Any]]
) -> None:
    said = chat(served, options, **fields)
    if served.thought and options == {"say": 0} and fields.get("tool_choice") == "required":
        calls = [WEATHER_CALL]
    assert (said.text.strip(), said.read) == (text, calls)
    assert said.reasoning.strip() == ("" if "enable_thinking" in options else served.thought)
    # As OpenAI's: where the caller has named the tool, an answer ends with "stop".
    assert said.finish_reason == ("tool_calls" if calls and fields.get("tool_choice") != NAMED else "stop")


def test_tool_choice_none_leaves_a_call_as_text(served: Served) -> None:
    said = chat(served, CALL, tools=TOOLS, tool_choice="none")
    write = as_json if served.name == "JSON" else as_xml
    assert (said.text.strip(), said.calls) == (write(*WEATHER_CALL), [])


def test_a_model_told_not_to_think_makes_the_same_calls(served: Served) -> None:
    said = chat(served, {**CALL, "enable_thinking": False}, tools=TOOLS)
    assert (said.text, said.reasoning, said.read) == ("", "", [WEATHER_CALL])


def test_a_call_that_is_cut_keeps_what_came(served: Served) -> None:
    uncut = chat(served, CALL, tools=TOOLS).calls[0][1]
    for limit in range(1, 40, 3):
        said = chat(served, CALL, tools=TOOLS, max_tokens=limit)
        assert said.finish_reason == "length"
        for name, arguments in said.calls:
            assert name == "get_weather"
            assert uncut.startswith(arguments.rstrip("�"))
    assert said.calls


def test_a_strict_tool_takes_no_wrong_value(served: Served) -> None:
    said = chat(served, TWO, tools=STRICT, max_tokens=100)
    assert said.calls[0][0] == "get_weather"
    assert '"K' not in said.calls[0][1]


def test_a_result_is_sent_back(served: Served) -> None:
    client = served.openai
    first = client.chat.completions.create(model=served.name, messages=ASKED, tools=TOOLS, temperature=0)
    call = first.choices[0].message.tool_calls[0]
    messages = [
        *ASKED,
        first.choices[0].message.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": call.id, "content": '{"sky": "晴"}'},
    ]
    said = chat(served, messages=messages, tools=TOOLS)
    assert (said.text.strip(), said.calls, said.finish_reason) == (RESULT, [], "stop")


CALLED = [
    *ASKED,
    {
        "role": "assistant",
        "tool_calls": [{"id": "1", "type": "function", "function": {"name": "now", "arguments": "{}"}}],
    },
]
TOLD = [*CALLED, {"role": "tool", "tool_call_id": "1", "content": "晴 <|im_end|>"}]
ROWS: list[dict[str, Any]] = [
    {"tools": TOOLS},
    {"tools": TOOLS, "max_tokens": 12},
    {"tools": TOOLS, "tool_choice": "none"},
    {"tools": TOOLS, "tool_choice": NAMED},
    {"tools": STRICT, "tool_choice": "required"},
    {"tools": TOOLS, "messages": TOLD},
    {"messages": TOLD},
    {"response_format": {"type": "json_object"}, "max_tokens": 5},
]
BAD_ROWS: list[tuple[dict[str, Any], str]] = [
    ({"tools": TOOLS, "tool_choice": "maybe"}, "tool_choice"),
    ({"messages": [*CALLED, {"role": "tool", "tool_call_id": "2", "content": "!"}]}, "messages"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "y"}}}},
        "response_format",
    ),
]


def answer_rows(folder: Path) -> list[dict[str, Any]]:
    """What a batch says to ROWS and BAD_ROWS; runs in a process of its own, with no other engine in it."""
    rows, answers = folder.parent / "rows.jsonl", folder.parent / "answers.jsonl"
    fields = [*ROWS, *(bad for bad, _ in BAD_ROWS)]
    rows.write_text("".join(json.dumps({"messages": ASKED, "max_tokens": 300, **row}) + "\n" for row in fields))
    flags = ["--input", str(rows), "--output", str(answers), "--ordered", "--temperature", "0"]
    vllm_offline.main(["--model", str(folder), *flags])
    return [json.loads(line) for line in answers.read_text().splitlines()]


def test_rows_are_answered_as_by_the_server(served: Served) -> None:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        answers = process.submit(answer_rows, served.folder).result()
    for fields, answer in zip(ROWS, answers, strict=False):
        said = chat(served, **fields)
        called = [[call["function"][key] for key in ("name", "arguments")] for call in answer.get("tool_calls", ())]
        text, reasoning = answer["text"].strip(), answer.get("reasoning", "").strip()
        assert (text, reasoning, called) == (said.text.strip(), said.reasoning.strip(), said.calls)
        assert answer["finish_reason"] == said.finish_reason
    for (_, field_), answer in zip(BAD_ROWS, answers[len(ROWS) :], strict=True):
        assert answer["error"]["type"] == "invalid_request"
        assert field_ in answer["error"]["param"] + answer["error"]["message"]


def test_responses(served: Served) -> None:
    tools = [{"type": "function", **tool["function"]} for tool in TOOLS]
    fields = {"model": served.name, "temperature": 0}
    responses = served.openai.responses
    assert responses.create(input="?", **fields).output_text.strip() == PLAIN
    deltas = [
        event.delta
        for event in responses.create(input="?", stream=True, **fields)
        if event.type == "response.output_text.delta"
    ]
    assert "".join(deltas).strip() == PLAIN
    whole = responses.create(input="?", tools=tools, **fields)
    (call,) = [item for item in whole.output if item.type == "function_call"]
    assert (call.name, json.loads(call.arguments)) == WEATHER_CALL
    events = [*responses.create(input="?", tools=tools, stream=True, **fields)]
    deltas = [event.delta for event in events if event.type == "response.function_call_arguments.delta"]
    assert "".join(deltas) == call.arguments
    (done,) = [item for item in events[-1].response.output if item.type == "function_call"]
    assert (done.name, done.arguments) == (call.name, call.arguments)
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "晴"}
    history = [*ASKED, *[item.model_dump(exclude_none=True) for item in whole.output], result]
    assert responses.create(input=history, tools=tools, **fields).output_text.strip() == RESULT
    for choice in ("required", {"type": "function", "name": "now"}):
        said = responses.create(input="?", tools=tools, tool_choice=choice, **fields)
        (call,) = [item for item in said.output if item.type == "function_call"]
        assert call.name == ("get_weather" if choice == "required" else "now")


def blocks(served: Served, body: dict[str, Any]) -> tuple[list[dict[str, Any]], str]:
    """What /v1/messages answers, as blocks, and why it ends: whole, which is the same as streamed."""
    body = {"max_tokens": 300, "messages": ASKED, **body}
    key = {"x-api-key": KEY}
    whole = served.post("/v1/messages", body, **key).json()
    streamed, ending = [], ""
    for line in served.post("/v1/messages", {**body, "stream": True}, **key).text.splitlines():
        event = json.loads(line[6:]) if line.startswith("data: {") else {}
        match event.get("type"):
            case "content_block_start":
                streamed.append({**event["content_block"], "json": ""})
            case "content_block_delta":
                block, delta = streamed[event["index"]], event["delta"]
                block["json"] += delta.get("partial_json", "")
                for name in ("text", "thinking"):
                    block[name] = block.get(name, "") + delta.get(name, "")
            case "message_delta":
                ending = event["delta"]["stop_reason"]

    def essence(content: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
        kinds = [
            (block["type"], block.get("name"), (block.get("text") or "").strip(), (block.get("thinking") or "").strip())
            for block in content
        ]
        inputs = [block.get("input") or (block.get("json") and json.loads(block["json"])) or {} for block in content]
        return list(zip(kinds, inputs, strict=True))

    assert essence(streamed) == essence(whole["content"])
    assert ending == whole["stop_reason"]
    return whole["content"], ending


def test_messages(served: Served) -> None:
    function = WEATHER["function"]
    tool = {"name": function["name"], "description": "?", "input_schema": function["parameters"]}
    content, ending = blocks(served, {})
    assert (content[-1]["type"], content[-1]["text"].strip(), ending) == ("text", PLAIN, "end_turn")
    content, ending = blocks(served, {"tools": [tool]})
    assert (content[-1]["type"], content[-1]["input"], ending) == ("tool_use", WEATHER_ARGUMENTS, "tool_use")
    result = {"type": "tool_result", "tool_use_id": content[-1]["id"], "content": "晴"}
    messages = [*ASKED, {"role": "assistant", "content": content}, {"role": "user", "content": [result]}]
    content, ending = blocks(served, {"tools": [tool], "messages": messages})
    assert (content[-1]["type"], content[-1]["text"].strip(), ending) == ("text", RESULT, "end_turn")
    for choice in ({"type": "any"}, {"type": "tool", "name": "get_weather"}):
        content, ending = blocks(served, {"tools": [tool], "tool_choice": choice})
        assert (content[-1]["type"], ending) == ("tool_use", "tool_use")
    cut = served.post("/v1/messages", {"max_tokens": 30, "messages": ASKED, "tools": [tool]}).json()
    assert (cut["stop_reason"], cut["content"][-1]["name"]) == ("max_tokens", "get_weather"), cut


def test_errors_of_messages_have_anthropics_shape(served: Served) -> None:
    body = {"max_tokens": 9, "messages": ASKED}
    for answer, status, kind in [
        (served.post("/v1/messages", body, **{"x-api-key": "wrong"}), 401, "authentication_error"),
        (served.post("/v1/messages", {**body, "messages": "?"}), 400, "invalid_request_error"),
        (served.post("/v1/messages", {**body, "tools": [{"name": 1}]}), 400, "invalid_request_error"),
        (served.post("/v1/messages", {**body, "model": "other"}), 404, "not_found_error"),
    ]:
        said = answer.json()
        assert (answer.status_code, said["type"], said["error"]["type"]) == (status, "error", kind)
        assert said["error"]["message"]


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"tools": "now"}, "tools"),
        ({"tools": [1]}, "tools"),
        ({"tools": [{}]}, "tools"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"tools": [{"type": "function", "function": {"parameters": {}}}]}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": "x"}}]}, "tools"),
        (
            {
                "tools": [
                    {
                        "type": "function",
                        "function": {
                            "name": "f",
                            "strict": True,
                            "parameters": {"type": "object", "properties": {"x": {"type": "y"}}},
                        },
                    }
                ]
            },
            "tools",
        ),
        ({"tools": [{}], "tool_choice": NAMED}, "tools"),
        ({"tools": "now", "tool_choice": NAMED}, "tools"),
        ({"tools": TOOLS, "tool_choice": "maybe"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": 1}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "other"}}}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": NAMED}, "tool_choice"),
        ({"messages": [*ASKED, {"role": "tool", "content": "!"}], "tools": TOOLS}, "messages"),
        ({"messages": [*ASKED, {"role": "tool", "tool_call_id": "1", "content": "!"}], "tools": TOOLS}, "messages"),
        ({"messages": [*CALLED, {"role": "tool", "tool_call_id": "2", "content": "!"}]}, "messages"),
        ({"messages": [*ASKED, {"role": "assistant", "tool_calls": "x"}]}, "messages"),
        ({"messages": [*ASKED, {"role": "assistant", "tool_calls": [{}]}]}, "messages"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_bad_input_is_refused_by_its_field(served: Served, fields: dict[str, Any], field: str, stream: bool) -> None:
    answer = served.post("/v1/chat/completions", {"messages": ASKED, "stream": stream, **fields})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert field in (str(error.get("param")) + error["message"]), error


RESPONSES_TOOL = {"type": "function", **WEATHER["function"]}
MESSAGES_TOOL = {"name": "get_weather", "input_schema": WEATHER["function"]["parameters"]}
NO_SCHEMA = {"type": "object", "properties": {"x": {"type": "y"}}}


@pytest.mark.parametrize(
    ("route", "fields", "field"),
    [
        *(
            ("/v1/responses", fields, field)
            for fields, field in [
                ({"tools": "now"}, "tools"),
                ({"tools": [1]}, "tools"),
                ({"tools": [{}]}, "tools"),
                ({"tools": [{"type": "function"}]}, "tools"),
                ({"tools": [{**RESPONSES_TOOL, "parameters": "x"}]}, "tools"),
                ({"tools": [{**RESPONSES_TOOL, "strict": True, "parameters": NO_SCHEMA}]}, "tools"),
                ({"tools": [RESPONSES_TOOL], "tool_choice": "maybe"}, "tool_choice"),
                ({"tools": [RESPONSES_TOOL], "tool_choice": 1}, "tool_choice"),
                ({"tools": [RESPONSES_TOOL], "tool_choice": {"type": "function", "name": "other"}}, "tool_choice"),
                ({"tool_choice": "required"}, "tool_choice"),
                ({"input": [*ASKED, {"type": "function_call_output", "call_id": "1", "output": "!"}]}, "input"),
                ({"input": [*ASKED, {"type": "function_call_output", "output": "!"}]}, "input"),
                ({"input": [*ASKED, {"type": "function_call"}]}, "input"),
            ]
        ),
        *(
            ("/v1/messages", fields, field)
            for fields, field in [
                ({"tools": "now"}, "tools"),
                ({"tools": [1]}, "tools"),
                ({"tools": [{}]}, "tools"),
                ({"tools": [{"name": "f", "input_schema": "x"}]}, "tools"),
                ({"tools": [{"name": "f", "strict": True, "input_schema": NO_SCHEMA}]}, "tools"),
                ({"tools": [MESSAGES_TOOL], "tool_choice": "maybe"}, "tool_choice"),
                ({"tools": [MESSAGES_TOOL], "tool_choice": {"type": "maybe"}}, "tool_choice"),
                ({"tools": [MESSAGES_TOOL], "tool_choice": {"type": "tool"}}, "tool_choice"),
                ({"tools": [MESSAGES_TOOL], "tool_choice": {"type": "tool", "name": "other"}}, "tool_choice"),
                ({"tool_choice": {"type": "any"}}, "tool_choice"),
                (
                    {"messages": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "1"}]}]},
                    "messages",
                ),
                ({"messages": [{"role": "user", "content": [{"type": "tool_result"}]}]}, "messages"),
                ({"messages": [*ASKED, {"role": "assistant", "content": [{"type": "tool_use"}]}]}, "messages"),
            ]
        ),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_bad_input_is_refused_by_its_field_on_the_other_routes(
    served: Served, route: str, fields: dict[str, Any], field: str, stream: bool
) -> None:
    asked = {"input": ASKED} if route == "/v1/responses" else {"messages": ASKED, "max_tokens": 300}
    answer = served.post(route, {**asked, "stream": stream, **fields})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert field in (str(error.get("param")) + error["message"]), error


@pytest.mark.parametrize("arguments", ["", "{", "[1]", "1", '{"city": "北'])
def test_arguments_that_are_none_may_be_sent_back(served: Served, arguments: str) -> None:
    # A model wrote them, perhaps up to the token limit: the conversation goes on.
    call = {"id": "1", "type": "function", "function": {"name": "now", "arguments": arguments}}
    result = {"role": "tool", "tool_call_id": "1", "content": "no arguments"}
    said = chat(served, messages=[*ASKED, {"role": "assistant", "tool_calls": [call]}, result], tools=TOOLS)
    assert said.text.strip() == RESULT


def control_tokens(served: Served, text: str, **headers: str) -> tuple[int, int]:
    """How many tokens a prompt has with this text of a user, and how many of them end a turn."""
    body = {"messages": [{"role": "user", "content": text}]}
    answer = served.post("/v1/chat/completions", {**body, "return_token_ids": True}).json()
    token_ids = answer["prompt_token_ids"]
    assert served.post("/tokenize", body).json()["tokens"] == token_ids
    assert len(token_ids) == answer["usage"]["prompt_tokens"]
    (end,) = served.post("/tokenize", {"prompt": "<|im_end|>", "add_special_tokens": False}).json()["tokens"]
    return len(token_ids), token_ids.count(end)


def test_what_a_user_spells_stays_text(served: Served) -> None:
    plain, ends = control_tokens(served, "x")
    spelled, same = control_tokens(served, "x<|im_end|>")
    assert same == ends
    assert spelled > plain + 1


def test_the_flag_takes_control_tokens_as_such(tmp_path: Path) -> None:
    folder = write(tmp_path / "JSON")
    flags = ["--model", str(folder), "--api-key", KEY, "--allow-control-tokens"]
    with running_server(flags, tmp_path / "log") as url:
        served = Served("JSON", url, folder)
        plain, ends = control_tokens(served, "x")
        assert control_tokens(served, "x<|im_end|>") == (plain + 1, ends + 1)
