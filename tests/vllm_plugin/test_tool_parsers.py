"""Our tool parsers within vLLM's own handling of an answer, and the grammars that hold a model to calls."""

import json
from functools import cache
from types import SimpleNamespace
from typing import Any

import llguidance
import llguidance.hf
import pytest
from transformers import PreTrainedTokenizerBase
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
from vllm.exceptions import VLLMValidationError
from vllm.parser import ParserManager
from vllm.tokenizers.hf import get_cached_tokenizer

from qwen_vllm import reasoning, tool_calls
from qwen_vllm.reasoning import ALWAYS_PARSER, PARSER
from qwen_vllm.tool_calls import JSON_CALLS, XML_CALLS
from qwen_vllm.vllm_plugin.tool_parsers import only_where_tools_are
from tests.support.tool_templates import NOW, TOOLS, WEATHER, as_json, as_xml

reasoning.register()
tool_calls.register()
WRITE = {JSON_CALLS: as_json, XML_CALLS: as_xml}
PARSERS = {
    "": "",
    PARSER: "<think>\nHm.\n</think>\n\n",
    "qwen3": "Hm.\n</think>\n\n",
    ALWAYS_PARSER: "Hm.\n</think>\n\n",
}
ARGUMENTS = {"city": '北京 "x"\n', "days": 3, "options": {"z": [1]}}
FORMS = pytest.mark.parametrize("form", WRITE)


def asked(**fields: Any) -> ChatCompletionRequest:
    messages = [{"role": "user", "content": "?"}]
    return ChatCompletionRequest.model_validate({"messages": messages, "tools": TOOLS, **fields})


@FORMS
@pytest.mark.parametrize("parser", PARSERS)
@pytest.mark.parametrize(
    "choice", ["auto", "required", {"type": "function", "function": {"name": "now"}}, "none"], ids=str
)
def test_calls_are_read_beside_reasoning(
    qwen36_tokenizer: PreTrainedTokenizerBase, form: str, parser: str, choice: Any
) -> None:
    write = WRITE[form]
    calls = f"I look.\n\n{write('get_weather', ARGUMENTS)}\n{write('now', {})}"
    thought, text, read = whole(qwen36_tokenizer, form, parser, PARSERS[parser] + calls, tool_choice=choice)
    assert (thought or "").strip() == ("Hm." if parser else "")
    if choice == "none":
        assert (text.strip(), read) == (calls, [])
    else:
        assert text.strip() == "I look."
        assert read == [("get_weather", json.dumps(ARGUMENTS, ensure_ascii=False)), ("now", "{}")]
    assert streamed(qwen36_tokenizer, form, parser, PARSERS[parser] + calls, tool_choice=choice) == (
        thought,
        text,
        read,
    )


@FORMS
def test_a_call_that_is_cut_is_the_same_whole_and_streamed(
    qwen36_tokenizer: PreTrainedTokenizerBase, form: str
) -> None:
    answer = WRITE[form]("get_weather", ARGUMENTS)
    answer = answer[: answer.index("京") + 1]
    assert whole(qwen36_tokenizer, form, "", answer) == (None, None, [("get_weather", '{"city": "北京')])
    assert streamed(qwen36_tokenizer, form, "", answer) == (None, None, [("get_weather", '{"city": "北京')])


def whole(
    tokenizer: PreTrainedTokenizerBase, form: str, parser: str, answer: str, **fields: Any
) -> tuple[Any, Any, Any]:
    request = asked(**fields)
    thought, text, calls = _parser(tokenizer, form, parser, request).parse(answer, request, enable_auto_tools=True)
    return thought, text, [(call.name, call.arguments) for call in calls or []]


def streamed(
    tokenizer: PreTrainedTokenizerBase, form: str, parser: str, answer: str, **fields: Any
) -> tuple[Any, Any, Any]:
    request = asked(**fields)
    reader, thought, text, calls = _parser(tokenizer, form, parser, request), "", "", []
    token_ids, shown = tokenizer.encode(answer, add_special_tokens=False), ""
    for i, token_id in enumerate(token_ids):
        said = tokenizer.decode(token_ids[: i + 1])
        new, shown = ("", shown) if said.endswith("\ufffd") else (said[len(shown) :], said)
        delta = reader.parse_delta(new, [token_id], request, [0], finished=i == len(token_ids) - 1)
        if delta:
            thought, text = thought + (delta.reasoning or ""), text + (delta.content or "")
            for call in delta.tool_calls or []:
                if call.index == len(calls):
                    assert call.id
                    assert call.type == "function"
                    calls.append((call.function.name, ""))
                calls[call.index] = calls[call.index][0], calls[call.index][1] + (call.function.arguments or "")
    return thought or None, text or None, calls


def _parser(tokenizer: PreTrainedTokenizerBase, form: str, parser: str, request: ChatCompletionRequest) -> Any:
    kind = ParserManager.get_parser(form, parser, enable_auto_tools=True)
    return kind(_cached(tokenizer), request.tools, chat_template_kwargs={})


_cached = cache(get_cached_tokenizer)


@pytest.mark.parametrize("parser", PARSERS)
def test_only_a_request_with_tools_has_our_parser(qwen36_tokenizer: PreTrainedTokenizerBase, parser: str) -> None:
    make = only_where_tools_are(OpenAIServingChat._make_parser)
    kind = ParserManager.get_parser(JSON_CALLS, parser, enable_auto_tools=True)
    serving = SimpleNamespace(parser_cls=kind, model_config=None)
    assert make(serving, asked(), _cached(qwen36_tokenizer), {}).tool_parser
    request = asked(tools=None)
    made = make(serving, request, _cached(qwen36_tokenizer), {})
    if not parser:
        assert made is None  # vLLM then hands the text on
        return
    assert made.tool_parser is None
    text = as_json("now", {})
    thought, said, _ = made.parse(f"{PARSERS[parser]}{text}", request, enable_auto_tools=True)
    assert (thought.strip(), said.strip()) == ("Hm.", text)


def test_vllms_own_parsers_are_made_for_every_request(qwen36_tokenizer: PreTrainedTokenizerBase) -> None:
    serving = SimpleNamespace(parser_cls=ParserManager.get_parser("hermes", "", True), model_config=None)
    make = only_where_tools_are(OpenAIServingChat._make_parser)
    assert make(serving, asked(tools=None), _cached(qwen36_tokenizer), {}).tool_parser


def strict(*tools: dict[str, Any]) -> list[dict[str, Any]]:
    return [{**tool, "function": {**tool["function"], "strict": True}} for tool in tools]


REQUIRED = {"tool_choice": "required"}
NAMED = {"tool_choice": {"type": "function", "function": {"name": "get_weather"}}}
SINGLE = {"parallel_tool_calls": False}
STRICT = {"tools": strict(WEATHER, NOW)}
AS_JSON = {"response_format": {"type": "json_object"}}
GOOD, WRONG = ("get_weather", {**ARGUMENTS, "unit": "C"}), ("get_weather", {**ARGUMENTS, "unit": "K"})


@FORMS
@pytest.mark.parametrize(
    ("fields", "answer", "taken"),
    [
        (REQUIRED, ["\n\n", GOOD, "\n", ("now", {})], True),
        (REQUIRED, [WRONG], True),  # no tool is strict
        (REQUIRED, ["Hello"], False),
        (REQUIRED, [("other", {})], False),
        (REQUIRED | STRICT, [GOOD], True),
        (REQUIRED | STRICT, [WRONG], False),
        (REQUIRED | SINGLE, [GOOD], True),
        (REQUIRED | SINGLE, [GOOD, GOOD], False),
        (NAMED, [GOOD], True),
        (NAMED, [("now", {})], False),
        (STRICT, ["Hello"], True),
        (STRICT, ["Hello\n", GOOD, "\n", GOOD], True),
        (STRICT, [WRONG], False),
        (STRICT | AS_JSON, ['{"a": 1}'], True),
        (STRICT | AS_JSON, [GOOD], True),
        (STRICT | AS_JSON, ["Hello"], False),
        (SINGLE, ["Hello\n", GOOD], True),
        (SINGLE, [GOOD, GOOD], False),
    ],
    ids=str,
)
def test_the_model_is_held_to_calls(
    qwen36_tokenizer: PreTrainedTokenizerBase, form: str, fields: dict[str, Any], answer: list[Any], taken: bool
) -> None:
    request = asked(**fields)
    _parser(qwen36_tokenizer, form, "", request).adjust_request(request)
    grammar = llguidance.grammar_from("grammar", request.structured_outputs.grammar)
    assert not llguidance.LLMatcher.validate_grammar(grammar, _guide(qwen36_tokenizer))
    matcher = llguidance.LLMatcher(_guide(qwen36_tokenizer), grammar)
    text = "".join(part if isinstance(part, str) else WRITE[form](*part) for part in answer)
    token_ids = qwen36_tokenizer.encode(text, add_special_tokens=False)
    fits = matcher.validate_tokens(token_ids) == len(token_ids)
    if fits:
        matcher.consume_tokens(token_ids)
    assert (fits and matcher.is_accepting()) is taken
    assert request.response_format is None


@FORMS
def test_a_strict_schema_that_is_none_is_refused_at_once(qwen36_tokenizer: PreTrainedTokenizerBase, form: str) -> None:
    function = {"name": "f", "strict": True, "parameters": {"type": "object", "properties": {"x": {"type": "y"}}}}
    request = asked(tools=[{"type": "function", "function": function}])
    with pytest.raises(VLLMValidationError, match=r"tools: .*parameter=tools"):
        _parser(qwen36_tokenizer, form, "", request).adjust_request(request)


@cache
def _guide(tokenizer: PreTrainedTokenizerBase) -> Any:
    return llguidance.hf.from_tokenizer(tokenizer, len(tokenizer))


@FORMS
@pytest.mark.parametrize("fields", [{}, AS_JSON, {"tool_choice": "none"}, {"tools": None}], ids=str)
def test_a_request_that_asks_for_nothing_is_left_free(
    qwen36_tokenizer: PreTrainedTokenizerBase, form: str, fields: dict[str, Any]
) -> None:
    request = asked(**fields)
    before = request.model_dump()
    assert _parser(qwen36_tokenizer, form, "", request).adjust_request(request).model_dump() == before
