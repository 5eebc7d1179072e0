"""What a model thinks, told from what it says: wherever the answer is cut, by the same rules for all."""

from functools import partial
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.parser import ParserManager
from vllm.reasoning import ReasoningParserManager

from qwen_vllm.reasoning import (
    ALWAYS_PARSER,
    PARSER,
    ReasoningSplitter,
    ThinkTags,
    parser_for,
    register,
    think_tags,
)
from qwen_vllm.tool_calls import JSON_CALLS, tool_parser_for
from tests.support.tokenizers import QWEN3_TEMPLATE
from tests.support.tool_templates import JSON_TOOLS

START, END = "<think>", "</think>"
MARKS = ThinkTags(START, END, ord("S"), ord("E"), lambda ids: "".join(map(text_of, ids)))


def text_of(token: int) -> str:
    """The text of a token: S and E are the marks, any other character is a token of its own."""
    return {"S": START, "E": END}.get(chr(token), chr(token))


OPENS = "<|im_end|>\n<|im_start|>assistant\n<think>\n"
ALWAYS_THINKS = "{% set enable_thinking = true %}" + QWEN3_TEMPLATE.replace(
    "assistant\\n' }}", "assistant\\n<think>\\n' }}"
)
THINKS_UNLESS_TOLD = QWEN3_TEMPLATE.replace("endif %}\n{%- endif %}", "else %}<think>{%- endif %}\n{%- endif %}")
DROPS_THOUGHTS = QWEN3_TEMPLATE.replace("enable_thinking is defined", "false")


def split(answer: str, cuts: list[int], opening: str = "assistant\n", marks: ThinkTags | None = MARKS) -> Any:
    """Thought, text and the thought's tokens of an answer, a token a character, that comes in pieces cut at `cuts`."""
    splitter, thought, text = ReasoningSplitter(marks, opening), "", ""
    for start, end in pairwise([0, *cuts, len(answer)]):
        ids = [ord(c) for c in answer[start:end]]
        new = splitter.split("".join(map(text_of, ids)), ids, end == len(answer))
        thought, text = thought + new[0], text + new[1]
    return thought, text, splitter.tokens


def lagging(answer: str, lag: int, opening: str) -> Any:
    """The same, a token a piece, where each text comes `lag` characters late."""
    splitter, thought, text = ReasoningSplitter(MARKS, opening), "", ""
    whole = "".join(text_of(ord(c)) for c in answer)
    sent = come = 0
    for n, c in enumerate(answer, start=1):
        come += len(text_of(ord(c)))
        upto = come if n == len(answer) else max(sent, come - lag)
        new = splitter.split(whole[sent:upto], [ord(c)], n == len(answer))
        thought, text, sent = thought + new[0], text + new[1], upto
    return thought, text, splitter.tokens


CLOSED = "<think>\n\n</think>\n\n"
ANSWERS = {
    "a thought": ("", "S\nHm, 你.\nE\n\nHello\n", "Hm, 你.", "Hello\n", 8),
    "a thought that the prompt begins": (OPENS, "Hm.\nE\n\nHello", "Hm.", "Hello", 4),
    "begun twice": (OPENS, "SHm.EHello", "<think>Hm.", "Hello", 4),
    "no thought": ("", "\n Hello", "", "\n Hello", 0),
    "an empty thought": ("", "S\n\nE\n\nHello", "", "Hello", 2),
    "thinking turned off": (CLOSED, "\nHello", "", "\nHello", 0),
    "thinking turned off, and a mark": (CLOSED, "SHmEHello", "", "<think>Hm</think>Hello", 0),
    "thinking turned off, and a mark in letters": (CLOSED, "<think> is a tag", "", "<think> is a tag", 0),
    "cut in the thought": ("", "S\nHm\n", "Hm", "", 4),
    "the end mark in letters": ("", "SHm</think>moE.", "Hm</think>mo", ".", 12),
    "the end mark in letters, and cut": (OPENS, "Hm</think>mo", "Hm</think>mo", "", 12),
    "the end mark in letters, cut": ("", "SHm\n</thi", "Hm\n</thi", "", 8),
    "the end mark in letters at the end": ("", "S</think>E</think>", "</think>", "</think>", 8),
    "half of it before the mark": ("", "S</thi</think></E.", "</thi</think></", ".", 15),
    "the start mark in letters": ("", "<think>HmE.", "", "<think>Hm</think>.", 0),
    "the start mark in letters, then a token": ("", "<think>SHm", "", "<think><think>Hm", 0),
    "cut in the start mark": ("", "<thi", "", "<thi", 0),
    "cut behind the thought": ("", "SHmE\n\n", "Hm", "", 2),
    "white space first": ("", " \nSHmEHello", "Hm", "Hello", 4),
    "white space alone": ("", " \n", "", " \n", 0),
    "marks in the text": ("", "SaEbESc", "a", "b</think><think>c", 1),
    "a mark later": ("", "Write S firstE", "", "Write <think> first</think>", 0),
    "an end alone": ("", "aEc", "", "a</think>c", 0),
    "near marks": ("", "Sa </thin> < </ \n\n b\nEc", "a </thin> < </ \n\n b", "c", 20),
    "nothing": ("", "", "", "", 0),
    "nothing after all": (OPENS, "", "", "", 0),
}


@pytest.mark.parametrize(("opening", "answer", "thought", "text", "tokens"), ANSWERS.values(), ids=ANSWERS.keys())
def test_an_answer_is_split_the_same_wherever_it_is_cut(
    opening: str, answer: str, thought: str, text: str, tokens: int
) -> None:
    for first in range(len(answer) + 1):
        for second in range(first, len(answer) + 1):
            assert split(answer, [first, second], opening) == (thought, text, tokens), (first, second)
    for lag in range(12):
        assert lagging(answer, lag, opening) == (thought, text, tokens), lag


@given(st.text("SE</think> \na", max_size=30), st.sampled_from(["", OPENS, CLOSED]), st.integers(0, 12))
def test_a_streamed_answer_is_split_as_the_whole_one(answer: str, opening: str, lag: int) -> None:
    whole = thought, text, _ = split(answer, [], opening)
    assert split(answer, [*range(1, len(answer))], opening) == lagging(answer, lag, opening) == whole
    assert thought.strip("\n") == thought
    assert len(thought) + len(text) <= len(MARKS.decode([ord(c) for c in answer]))


def test_nothing_waits_that_cannot_be_a_mark() -> None:
    splitter = ReasoningSplitter(MARKS, "")
    script = [("S", "", ""), ("\n", "", ""), ("H", "H", ""), ("<", "", ""), ("b", "<b", ""), ("\n", "", "")]
    script += [("c", "\nc", ""), ("E", "", ""), ("\n", "", ""), ("H", "", "H")]
    for token, thought, text in script:
        assert not splitter.ended
        assert splitter.split(text_of(ord(token)), [ord(token)], False) == (thought, text)
    assert splitter.ended
    assert ReasoningSplitter(MARKS, "").split("<", [ord("<")], False) == ("", "<")


def test_an_answer_of_a_model_that_does_not_think_is_left_alone() -> None:
    assert split("SaE\n", [1], marks=None) == ("", "<think>a</think>\n", 0)


CHOICES = {
    "writes the mark": (QWEN3_TEMPLATE, {}, PARSER),
    "writes the mark, off by default": (QWEN3_TEMPLATE, {"enable_thinking": False}, PARSER),
    "the prompt begins the thought": (THINKS_UNLESS_TOLD, {}, "qwen3"),
    "the prompt always begins it": (ALWAYS_THINKS, {"enable_thinking": False}, ALWAYS_PARSER),
    "only drops thoughts": (DROPS_THOUGHTS, {}, PARSER),
    "knows no thoughts": ("{{ '<|im_start|>' + messages[0].content }}", {}, ""),
}


@pytest.mark.parametrize(("template", "options", "parser"), CHOICES.values(), ids=CHOICES.keys())
def test_the_parser_is_chosen_by_the_chat_template(
    qwen3_tokenizer: PreTrainedTokenizerBase, template: str, options: dict, parser: str
) -> None:
    assert parser_for(qwen3_tokenizer, template, options) == parser


def test_of_several_templates_the_parser_is_that_of_the_one_without_tools(
    qwen3_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    qwen3_tokenizer.save_pretrained(tmp_path)
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text(JSON_TOOLS)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert parser_for(tokenizer, None, {}) == PARSER
    assert tool_parser_for(tokenizer, None, {}) == JSON_CALLS


def test_a_model_without_the_marks_gets_no_parser(demo_tokenizer: PreTrainedTokenizerBase) -> None:
    assert parser_for(demo_tokenizer, QWEN3_TEMPLATE, {}) == ""
    assert parser_for(demo_tokenizer, None, {}) == ""


@pytest.mark.parametrize("template", ["{% </think>", "{{ raise_exception('</think>') }}"])
def test_a_broken_template_is_left_to_others(qwen3_tokenizer: PreTrainedTokenizerBase, template: str) -> None:
    assert parser_for(qwen3_tokenizer, template, {}) == ""


@pytest.mark.parametrize("parser", [PARSER, ALWAYS_PARSER, "qwen3", "deepseek_r1"])
def test_the_marks_are_those_of_the_parser(qwen3_tokenizer: PreTrainedTokenizerBase, parser: str) -> None:
    marks = think_tags(parser, qwen3_tokenizer)
    assert marks and (marks.start, marks.end) == (START, END)
    assert [marks.start_id, marks.end_id] == qwen3_tokenizer.convert_tokens_to_ids([START, END])
    assert marks.decode([marks.start_id, *qwen3_tokenizer.encode("Hm"), qwen3_tokenizer.eos_token_id]) == "<think>Hm"


def test_without_a_parser_there_are_no_marks(qwen3_tokenizer: PreTrainedTokenizerBase) -> None:
    assert think_tags("", qwen3_tokenizer) is None


def parsed_by_vllm(name: str, tokenizer: Any, answer: list[str]) -> list[tuple[str, str]]:
    """(reasoning, content) that one of our parsers finds for vLLM in an answer, whole and streamed, where the request
    wants no thoughts."""
    register()
    options = {"chat_template_kwargs": {"enable_thinking": False}} if name == ALWAYS_PARSER else {}
    parser = partial(ReasoningParserManager.get_reasoning_parser(name), **options)
    whole, streaming, streamed = parser(tokenizer).extract_reasoning("".join(answer), None), parser(tokenizer), ["", ""]
    for piece in answer:
        token_ids = [tokenizer.convert_tokens_to_ids(piece)] if piece in tokenizer.get_vocab() else [0]
        if delta := streaming.extract_reasoning_streaming("", "", piece, [], [], token_ids):
            streamed = [streamed[0] + (delta.reasoning or ""), streamed[1] + (delta.content or "")]
    return [(whole[0] or "", whole[1] or ""), tuple(streamed)]


@pytest.mark.parametrize(
    ("parser", "answer", "reasoning", "content"),
    [
        (PARSER, ["<think>", "Hm", ".\n", "</think>", "\n\n", "Hel", "lo"], "Hm.\n", "\n\nHello"),
        (PARSER, ["Hel", "lo"], "", "Hello"),
        (PARSER, ["<think>", "Hm"], "Hm", ""),
        (ALWAYS_PARSER, ["Hm", "</think>", "Hel", "lo"], "Hm", "Hello"),
        (ALWAYS_PARSER, ["Hm"], "Hm", ""),
    ],
)
def test_vllm_takes_for_a_thought_only_what_is_one(
    qwen3_tokenizer: PreTrainedTokenizerBase, parser: str, answer: list[str], reasoning: str, content: str
) -> None:
    assert parsed_by_vllm(parser, qwen3_tokenizer, answer) == [(reasoning, content)] * 2


@pytest.mark.parametrize("parser", [PARSER, "qwen3"])
@pytest.mark.parametrize("answer", [[START, "Hm", END, "Hi"], ["<", "think", ">", "Hm", "</", "think", ">", "Hi"]])
def test_vllm_takes_for_text_what_comes_where_the_prompt_has_closed_the_thought(
    qwen3_tokenizer: PreTrainedTokenizerBase, parser: str, answer: list[str]
) -> None:
    register()
    flags = {"enable_thinking": False}
    messages = [{"role": "user", "content": "?"}]
    request = ChatCompletionRequest(model="m", messages=messages)
    prompt = qwen3_tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False, **flags)
    kind = ParserManager.get_parser(reasoning_parser_name=parser, tokenizer=qwen3_tokenizer)
    ids, last = [qwen3_tokenizer.encode(piece) for piece in answer], len(answer) - 1
    every_id = [*chain.from_iterable(ids)]
    whole = kind(qwen3_tokenizer, None, chat_template_kwargs=flags)
    assert whole.parse("".join(answer), request, model_output_token_ids=every_id)[:2] == (None, "".join(answer))
    assert whole.count_reasoning_tokens(every_id) == 0
    streamed = kind(qwen3_tokenizer, None, chat_template_kwargs=flags)
    deltas = [
        streamed.parse_delta(piece, ids[n], request, prompt_token_ids=prompt, finished=n == last)
        for n, piece in enumerate(answer)
    ]
    assert "".join(delta.content or "" for delta in deltas if delta) == "".join(answer)
    assert not any(delta and delta.reasoning for delta in deltas)


@pytest.mark.parametrize(
    ("thinking", "ended"), [(None, False), (True, False), (False, True)], ids=["default", "on", "off"]
)
def test_vllm_sees_in_the_prompt_whether_there_is_a_thought_to_come(
    qwen3_tokenizer: PreTrainedTokenizerBase, thinking: bool | None, ended: bool
) -> None:
    register()
    flags = {} if thinking is None else {"enable_thinking": thinking}
    messages = [{"role": "user", "content": "?"}]
    prompt = qwen3_tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False, **flags)
    parser = ReasoningParserManager.get_reasoning_parser(PARSER)(qwen3_tokenizer, chat_template_kwargs=flags)
    assert parser.is_reasoning_end(prompt) == ended
