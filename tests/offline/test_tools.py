"""Rows with tools or a response format, up to the engine and back; the engine itself is in tests/e2e/test_tools.py."""

import json
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase
from vllm.renderers.hf import HfRenderer
from vllm.tokenizers.hf import get_cached_tokenizer

from qwen_vllm import tool_calls
from qwen_vllm.generation import RequestBuilder
from qwen_vllm.offline.tools import ToolRequests
from qwen_vllm.protocol import ChatError, ChatResult
from qwen_vllm.server.guard import MAX_COUNT, MAX_GRAMMAR
from qwen_vllm.vllm_plugin import patches
from tests.support.tokenizers import QWEN25_TEMPLATE
from tests.support.tool_templates import (
    BEFORE,
    JSON_TOOLS,
    NOW,
    TOOLS,
    WEATHER,
    WEATHER_ARGUMENTS,
    XML_TOOLS,
    as_json,
    as_xml,
)

CONTEXT = 4096
ASKED = [{"role": "user", "content": "?"}]
NAMED = {"type": "function", "function": {"name": "now"}}
CALL = {"id": "1", "type": "function", "function": {"name": "now", "arguments": '{"a": 1}'}}
CALLED = [
    *ASKED,
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "1", "content": "晴 <|im_end|>"},
]


def loaded(tokenizer: PreTrainedTokenizerBase, template: str, **options: Any) -> ToolRequests:
    config = SimpleNamespace(
        max_model_len=CONTEXT,
        get_diff_sampling_param=dict,
        multimodal_config=None,
        supports_multimodal_inputs=False,
        is_multimodal_model=False,
        enable_prompt_embeds=False,
        renderer_num_workers=1,
        encoder_config=None,
        is_encoder_decoder=False,
        hf_config=SimpleNamespace(model_type="qwen3"),
        revision=None,
        code_revision=None,
        trust_remote_code=False,
    )
    whole = SimpleNamespace(model_config=config, parallel_config=SimpleNamespace(_api_process_rank=0))
    renderer = HfRenderer(whole, get_cached_tokenizer(tokenizer))
    return ToolRequests(RequestBuilder(config, tokenizer, template, options), renderer, template, options)


@pytest.fixture(autouse=True)
def plugin() -> Iterator[None]:
    tool_calls.register()
    with patches.CONTROL_TOKENS.applied():
        yield


@pytest.fixture(scope="module", params=["JSON", "XML"])
def form(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def requests(qwen_tokenizer: PreTrainedTokenizerBase, form: str) -> ToolRequests:
    return loaded(qwen_tokenizer, JSON_TOOLS if form == "JSON" else XML_TOOLS)


@pytest.mark.parametrize("messages", [ASKED, CALLED, [{"role": "system", "content": "S"}, *ASKED]])
def test_the_prompt_is_that_of_the_template_and_texts_stay_text(
    qwen_tokenizer: PreTrainedTokenizerBase, requests: ToolRequests, form: str, messages: list[dict[str, Any]]
) -> None:
    _, prompt, *_ = requests.build({"messages": messages, "tools": [WEATHER]}, stream=False)
    read = json.loads(json.dumps(messages))
    for message in read:
        for call in message.get("tool_calls", ()):
            call["function"]["arguments"] = json.loads(call["function"]["arguments"])
    rendered = qwen_tokenizer.apply_chat_template(
        read,
        tools=[WEATHER],
        chat_template=JSON_TOOLS if form == "JSON" else XML_TOOLS,
        tokenize=False,
        add_generation_prompt=True,
    )
    assert qwen_tokenizer.decode(prompt.token_ids) == rendered
    ends = prompt.token_ids.count(qwen_tokenizer.convert_tokens_to_ids("<|im_end|>"))
    assert ends == rendered.count("<|im_end|>") - ("晴" in rendered)


def test_a_system_prompt_for_all_rows_goes_where_a_row_has_none(
    qwen_tokenizer: PreTrainedTokenizerBase, requests: ToolRequests
) -> None:
    own = [{"role": "system", "content": "own"}, *ASKED]
    for messages, said in ((ASKED, "for all"), (own, "own")):
        _, prompt, *_ = requests.build({"messages": messages, "tools": TOOLS, "system": "for all"}, stream=False)
        assert qwen_tokenizer.decode(prompt.token_ids).startswith(f"<|im_start|>system\n{said}\n\n# Tools")


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_calls_are_taken_out_of_the_text(requests: ToolRequests, form: str, size: int) -> None:
    write = as_json if form == "JSON" else as_xml
    text = f"{BEFORE}\n\n{write('get_weather', WEATHER_ARGUMENTS)}\n{write('now', {})}"
    pieces = [text[i : i + size] for i in range(0, len(text), size)]

    def answer(ending: str, **fields: Any) -> tuple[str, ChatResult]:
        *_, calls = requests.build({"messages": ASKED, "tools": TOOLS, **fields}, stream=True)
        left = "".join([*(calls.take(piece, last=False) for piece in pieces), calls.take("", last=True)])
        return left, calls.result(ChatResult(left, [("?", left)], ending, None, 9, 2, 0))

    left, result = answer("stop")
    assert (left.strip(), result.finish_reason, result.history) == (BEFORE, "tool_calls", [])
    called = [(call["function"]["name"], json.loads(call["function"]["arguments"])) for call in result.tool_calls]
    assert called == [("get_weather", WEATHER_ARGUMENTS), ("now", {})]
    assert {call["type"] for call in result.tool_calls} == {"function"}
    assert len({call["id"] for call in result.tool_calls}) == 2
    assert answer("length")[1].finish_reason == "length"
    assert answer("stop", tool_choice=NAMED)[1].finish_reason == "stop"
    assert answer("stop", parallel_tool_calls=False)[1].tool_calls[0]["function"] == result.tool_calls[0]["function"]
    left, result = answer("stop", tool_choice="none")
    assert (left, result.tool_calls, result.finish_reason) == (text, [], "stop")


@pytest.mark.parametrize(
    ("fields", "held"),
    [
        ({"tools": TOOLS}, None),
        ({"tools": TOOLS, "tool_choice": "required"}, "grammar"),
        ({"tools": TOOLS, "tool_choice": NAMED}, "grammar"),
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, "json_object"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {}}}}, "json"),
    ],
)
def test_what_an_answer_is_held_to(requests: ToolRequests, fields: dict[str, Any], held: str | None) -> None:
    _, _, params, _ = requests.build({"messages": ASKED, "max_tokens": 7, "stop": ["x"], **fields}, stream=False)
    assert (params.max_tokens, params.stop) == (7, ["x"])
    so = params.structured_outputs
    assert [name for name in ("grammar", "json", "json_object") if getattr(so, name, None) is not None] == (
        [held] if held else []
    )


def of_size(size: int) -> dict[str, Any]:
    return {"type": "object", "description": "x" * size}


def strict(schema: Any) -> list[dict[str, Any]]:
    return [{"type": "function", "function": {"name": "f", "strict": True, "parameters": schema}}]


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"tools": "now"}, "tools"),
        ({"tools": []}, "tools"),
        ({"tools": [{}]}, "tools"),
        ({"tools": [{}], "tool_choice": NAMED}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": "x"}}]}, "tools"),
        ({"tools": strict({"type": "object", "properties": {"x": {"type": "y"}}})}, "tools"),
        ({"tools": strict(of_size(MAX_GRAMMAR))}, "tools"),
        ({"tools": strict({"type": "object", "properties": {"x": {"minItems": MAX_COUNT + 1}}})}, "tools"),
        ({"tools": TOOLS, "tool_choice": "maybe"}, "tool_choice"),
        ({"tools": [NOW], "tool_choice": {"type": "function", "function": {"name": "other"}}}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": TOOLS, "parallel_tool_calls": "x"}, "parallel_tool_calls"),
        ({"response_format": {"type": "yaml"}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": of_size(MAX_GRAMMAR)}}},
            "response_format",
        ),
        ({"messages": "?"}, "messages"),
        ({"messages": [], "tools": TOOLS}, "messages"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages"),
        ({"messages": [*ASKED, {"role": "tool", "content": "!"}]}, "messages"),
        ({"messages": [*ASKED, {"role": "tool", "tool_call_id": "1", "content": "!"}]}, "messages"),
        ({"messages": [*ASKED, {"role": "assistant", "tool_calls": [{}]}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "messages"),
        ({"messages": [{"role": "user", "content": "x " * CONTEXT}]}, None),
        ({"temperature": 3}, "temperature"),
        ({"max_tokens": CONTEXT}, "max_tokens"),
        ({"n": 2}, "n"),
    ],
)
def test_bad_input_is_refused_by_its_field(requests: ToolRequests, fields: dict[str, Any], field: str | None) -> None:
    with pytest.raises(ChatError) as refused:
        requests.build({"messages": ASKED, **fields}, stream=False)
    assert field is None or field in (refused.value.param or "") + refused.value.message
    assert refused.value.type == "invalid_request"
    assert "function-wrap" not in str(refused.value)


def test_a_template_without_tools_takes_none_but_may_have_a_response_format(
    qwen_tokenizer: PreTrainedTokenizerBase,
) -> None:
    requests = loaded(qwen_tokenizer, QWEN25_TEMPLATE)
    with pytest.raises(ChatError, match="tools: the chat template knows none"):
        requests.build({"messages": ASKED, "tools": TOOLS}, stream=False)
    *_, params, _ = requests.build({"messages": ASKED, "response_format": {"type": "json_object"}}, stream=False)
    assert params.structured_outputs.json_object
