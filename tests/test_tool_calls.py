"""How tool calls are read from an answer, while it comes and as a whole."""

import json
import random
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from qwen_vllm.tool_calls import JSON_CALLS, XML_CALLS, CallReader, tool_parser_for
from tests.support.tokenizers import QWEN3_TEMPLATE
from tests.support.tool_templates import JSON_TOOLS, TOOLS, XML_TOOLS, as_json, as_xml

PROPERTIES = {tool["function"]["name"]: tool["function"]["parameters"]["properties"] for tool in TOOLS}
WHOLE = {"city": '北京 "x" \\ 🎉\nline', "days": 3, "options": {"a": {"b": [1, "}"]}}}
WEATHER = ("get_weather", json.dumps(WHOLE, ensure_ascii=False))
NOW = ("now", "{}")
JSON, XML = as_json("get_weather", WHOLE), as_xml("get_weather", WHOLE)
CUT = ("get_weather", '{"city": "北京')
JSON_CUT, XML_CUT = (answer[: answer.index("京") + 1] for answer in (JSON, XML))
Read = tuple[str, list[tuple[str, str]]]


@pytest.mark.parametrize(
    ("template", "parser"),
    {
        JSON_TOOLS: JSON_CALLS,
        XML_TOOLS: XML_CALLS,
        QWEN3_TEMPLATE: "",
        "{{ raise_exception('no tools') }}": "",
        "{{ broken": "",
    }.items(),
)
def test_the_parser_is_chosen_by_the_chat_template(
    qwen3_tokenizer: PreTrainedTokenizerBase, template: str, parser: str
) -> None:
    assert tool_parser_for(qwen3_tokenizer, template, {}) == parser


BOTH: dict[str, tuple[str, Read]] = {
    "no call": ('Just <b>text</b>, {"name": 1}. \n', ('Just <b>text</b>, {"name": 1}. \n', [])),
    "the marks in prose": (
        "<tool_call> begins it, </tool_call> ends it",
        ("<tool_call> begins it, </tool_call> ends it", []),
    ),
    "cut in the mark": ("Hm. <tool_ca", ("Hm. <tool_ca", [])),
    "cut behind the mark": ("Hm. <tool_call>", ("Hm. <tool_call>", [])),
    "nothing": ("", ("", [])),
}
CASES: dict[str, tuple[str, str, Read]] = {
    "JSON": (JSON_CALLS, JSON, ("", [WEATHER])),
    "JSON, several": (JSON_CALLS, f"{JSON}\n{as_json('now', {})}\n{JSON}", ("", [WEATHER, NOW, WEATHER])),
    "JSON, text before": (JSON_CALLS, f"\n\nI look.\n\n{as_json('now', {})}\n", ("\n\nI look.", [NOW])),
    "JSON, text behind": (JSON_CALLS, f"{as_json('now', {})}\n\nDone.\n", ("\n\nDone.", [NOW])),
    "JSON, of another tool": (JSON_CALLS, as_json("other", {"x": 1}), ("", [("other", '{"x": 1}')])),
    "JSON, the mark in a text": (
        JSON_CALLS,
        as_json("f", {"x": "</tool_call>"}),
        ("", [("f", '{"x": "</tool_call>"}')]),
    ),
    "JSON, arguments first": (
        JSON_CALLS,
        '<tool_call>\n{"arguments": {"name": "Bob"}, "name": "now"}\n</tool_call>',
        ("", [("now", '{"name": "Bob"}')]),
    ),
    "JSON, no arguments": (JSON_CALLS, '<tool_call>{"name": "now"}</tool_call>', ("", [NOW])),
    "JSON, arguments as text": (
        JSON_CALLS,
        '<tool_call>\n{"name": "f", "arguments": "{\\"x\\": 1}"}\n</tool_call>',
        ("", [("f", '{"x": 1}')]),
    ),
    "JSON, bare line breaks in a text": (
        JSON_CALLS,
        '<tool_call>\n{"name": "f", "arguments": {"x": "a\n\tb"}}\n</tool_call>',
        ("", [("f", '{"x": "a\\n\\tb"}')]),
    ),
    "JSON, a brace too few": (
        JSON_CALLS,
        f'<tool_call>\n{{"name": "now", "arguments": {{}}\n</tool_call>\n{JSON}',
        ("", [NOW, WEATHER]),
    ),
    "JSON, cut in a text": (JSON_CALLS, JSON_CUT, ("", [CUT])),
    "JSON, cut in the second": (
        JSON_CALLS,
        f"{as_json('now', {})}\n{JSON_CUT}",
        ("", [NOW, CUT]),
    ),
    "JSON, cut in the name": (JSON_CALLS, "Hm.\n" + JSON[:24], ("Hm.\n" + JSON[:24], [])),
    "JSON, no object": (JSON_CALLS, "<tool_call>\nnow()\n</tool_call>", ("<tool_call>\nnow()\n</tool_call>", [])),
    "XML": (XML_CALLS, XML, ("", [WEATHER])),
    "XML, several": (XML_CALLS, f"{XML}\n{as_xml('now', {})}\n{XML}", ("", [WEATHER, NOW, WEATHER])),
    "XML, text before": (XML_CALLS, f"\n\nI look.\n\n{as_xml('now', {})}\n", ("\n\nI look.", [NOW])),
    "XML, text behind": (XML_CALLS, f"{as_xml('now', {})}\n\nDone.\n", ("\n\nDone.", [NOW])),
    "XML, of another tool": (XML_CALLS, as_xml("other", {"x": 1}), ("", [("other", '{"x": "1"}')])),
    "XML, marks in a text": (
        XML_CALLS,
        as_xml("get_weather", {"city": "</parameter> a </function> b </tool_call> <parameter=x>", "days": 2}),
        ("", [("get_weather", '{"city": "</parameter> a </function> b </tool_call> <parameter=x>", "days": 2}')]),
    ),
    "XML, a number that is none": (
        XML_CALLS,
        as_xml("get_weather", {"days": "three"}),
        ("", [("get_weather", '{"days": "three"}')]),
    ),
    "XML, empty lines around a text": (
        XML_CALLS,
        as_xml("get_weather", {"city": "\n x\n\n"}),
        ("", [("get_weather", '{"city": "\\n x\\n\\n"}')]),
    ),
    "XML, no mark before the call": (XML_CALLS, "Hm.\n" + as_xml("now", {})[12:], ("Hm.", [NOW])),
    "XML, no mark before what is no tool": (XML_CALLS, "<function=f> is C", ("<function=f> is C", [])),
    "XML, a value without its end": (
        XML_CALLS,
        XML.replace("\n</parameter>\n</function>", "\n</function>"),
        ("", [WEATHER]),
    ),
    "XML, cut in a text": (XML_CALLS, XML_CUT, ("", [CUT])),
    "XML, cut in a number": (
        XML_CALLS,
        XML[: XML.index("3") + 1],
        ("", [("get_weather", WEATHER[1].partition("3")[0])]),
    ),
    "XML, cut in a mark": (
        XML_CALLS,
        XML[: XML.index("<parameter=d")][:-4],
        ("", [("get_weather", WEATHER[1].partition('", "d')[0])]),
    ),
    "XML, cut in the second": (
        XML_CALLS,
        f"{as_xml('now', {})}\n{XML_CUT}",
        ("", [NOW, CUT]),
    ),
    "XML, cut in the name": (XML_CALLS, "Hm.\n" + XML[:24], ("Hm.\n" + XML[:24], [])),
    **{f"{kind}, {name}": (kind, *case) for kind in (JSON_CALLS, XML_CALLS) for name, case in BOTH.items()},
}


@pytest.mark.parametrize(("parser", "answer", "read"), CASES.values(), ids=CASES.keys())
def test_what_is_read_is_the_same_in_any_pieces(parser: str, answer: str, read: Read) -> None:
    assert _read(parser, [answer]) == read
    assert _read(parser, [*answer, ""]) == read
    choose = random.Random(answer)
    for _ in range(10):
        cuts = sorted(choose.choices(range(len(answer) + 1), k=5))
        pieces = [answer[start:end] for start, end in zip([0, *cuts], [*cuts, len(answer)], strict=True)]
        assert _read(parser, pieces) == read


def _read(parser: str, pieces: list[str]) -> Any:
    reader, text, calls = CallReader(parser, PROPERTIES), "", []
    for i, piece in enumerate(pieces):
        for kind, part in reader.read(piece, last=i == len(pieces) - 1):
            if kind == "text":
                text += part
            elif kind == "name":
                calls.append((part, ""))
            else:
                calls[-1] = calls[-1][0], calls[-1][1] + part
    return text, calls


@pytest.mark.parametrize(("parser", "start"), [(JSON_CALLS, JSON_CUT), (XML_CALLS, XML_CUT)])
def test_arguments_go_out_while_they_come(parser: str, start: str) -> None:
    reader = CallReader(parser, PROPERTIES)
    assert [kind for kind, _ in reader.read(start, last=False)][:2] == ["name", "arguments"]
    assert reader.read("上海", last=False) == [("arguments", "上海")]
