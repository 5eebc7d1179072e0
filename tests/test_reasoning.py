"""What a model thinks, told from what it says: wherever the answer is cut, by the same rules for all."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase
from vllm.reasoning import ReasoningParserManager

from qwen_vllm.reasoning import (
    ALWAYS_PARSER,
    PARSER,
    ReasoningSplitter,
    ThinkTags,
    parser_for,
    parser_for_folder,
    register,
    think_tags,
)
from tests.support.tokenizers import QWEN3_TEMPLATE

END_ID = 9
MARKS = ThinkTags("<think>", "</think>", END_ID)
OPENS = "<|im_end|>\n<|im_start|>assistant\n<think>\n"
ALWAYS_THINKS = "{% set enable_thinking = true %}" + QWEN3_TEMPLATE.replace(
    "assistant\\n' }}", "assistant\\n<think>\\n' }}"
)
THINKS_UNLESS_TOLD = QWEN3_TEMPLATE.replace("endif %}\n{%- endif %}", "else %}<think>{%- endif %}\n{%- endif %}")
DROPS_THOUGHTS = QWEN3_TEMPLATE.replace("enable_thinking is defined", "false")


def split(pieces: list[str], opening: str = "assistant\n", marks: ThinkTags | None = MARKS) -> tuple[str, str, int]:
    """Thought, text and the thought's tokens of an answer that comes in these pieces; a mark is a token, and so is any
    other piece."""
    splitter, thought, text = ReasoningSplitter(marks, opening), "", ""
    for n, piece in enumerate(pieces, start=1):
        new = splitter.split(piece, [END_ID if piece == "</think>" else 1], n == len(pieces))
        thought, text = thought + new[0], text + new[1]
    return thought, text, splitter.tokens


ANSWERS = {
    "a thought": ("", "<think>\nHm, 你.\n</think>\n\nHello\n", "Hm, 你.", "Hello\n"),
    "a thought that the prompt begins": (OPENS, "Hm.\n</think>\n\nHello", "Hm.", "Hello"),
    "begun twice": (OPENS, "<think>Hm.</think>Hello", "<think>Hm.", "Hello"),
    "no thought": ("", "\n Hello", "", "\n Hello"),
    "an empty thought": ("", "<think>\n\n</think>\n\nHello", "", "Hello"),
    "thinking turned off": ("<think>\n\n</think>\n\n", "\nHello", "", "\nHello"),
    "cut in the thought": ("", "<think>\nHm\n", "Hm", ""),
    "cut in the end mark": ("", "<think>Hm\n</thi", "Hm\n</thi", ""),
    "cut in the start mark": ("", "<thi", "", "<thi"),
    "cut behind the thought": ("", "<think>Hm</think>\n\n", "Hm", ""),
    "white space first": ("", " \n<think>Hm</think>Hello", "Hm", "Hello"),
    "marks in the text": ("", "<think>a</think>b</think><think>c", "a", "b</think><think>c"),
    "a mark later": ("", "Write <think> first</think>", "", "Write <think> first</think>"),
    "near marks": ("", "<think>a </thin> < </ \n\n b\n</think>c", "a </thin> < </ \n\n b", "c"),
    "nothing": ("", "", "", ""),
    "nothing after all": (OPENS, "", "", ""),
}


@pytest.mark.parametrize(("opening", "answer", "thought", "text"), ANSWERS.values(), ids=ANSWERS.keys())
def test_an_answer_is_split_the_same_wherever_it_is_cut(opening: str, answer: str, thought: str, text: str) -> None:
    for first in range(len(answer) + 1):
        for second in range(first, len(answer) + 1):
            pieces = [answer[:first], answer[first:second], answer[second:]]
            assert split(pieces, opening)[:2] == (thought, text), pieces
    assert split(list(answer), opening)[:2] == (thought, text)


@given(st.lists(st.sampled_from(["<think>", "</think>", "<", "/", "think", ">", "\n", " ", "a"])), st.booleans())
def test_a_streamed_answer_is_split_as_the_whole_one(pieces: list[str], opened: bool) -> None:
    opening = OPENS if opened else ""
    thought, text, _ = split(pieces, opening)
    assert (thought, text) == split(["".join(pieces)], opening)[:2]
    assert thought.strip("\n") == thought
    assert "</think>" not in thought


def test_nothing_waits_that_cannot_be_a_mark() -> None:
    splitter = ReasoningSplitter(MARKS, "")
    script = [
        ("<th", "", ""),
        ("ink>\nHm", "Hm", ""),
        (" <", " ", ""),
        ("b", "<b", ""),
        ("\n", "", ""),
        ("c", "\nc", ""),
    ]
    script += [("</think>", "", ""), ("\n\n", "", ""), ("Hello", "", "Hello")]
    for piece, thought, text in script:
        assert not splitter.ended
        assert splitter.split(piece, [1], False) == (thought, text)
    assert splitter.ended


@pytest.mark.parametrize(
    ("opening", "pieces", "tokens"),
    [
        ("", ["<think>", "a", "b", "</think>", "c", "d"], 2),
        (OPENS, ["a", "b", "</think>", "c"], 2),
        ("", ["<think>", "a", "b"], 2),
        ("", ["a", "</think>", "c"], 0),
        ("", ["<think>", "</think>", "c"], 0),
        ("", ["<", "a"], 0),
    ],
)
def test_the_tokens_of_a_thought_are_counted_without_its_marks(opening: str, pieces: list[str], tokens: int) -> None:
    assert split(pieces, opening)[2] == tokens
    whole = ReasoningSplitter(MARKS, opening)
    whole.split("".join(pieces), [END_ID if piece == "</think>" else 1 for piece in pieces], True)
    assert whole.tokens == tokens


def test_an_answer_of_a_model_that_does_not_think_is_left_alone() -> None:
    assert split(["<think>", "a", "</think>\n"], marks=None) == ("", "<think>a</think>\n", 0)


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
    qwen3_tokenizer: PreTrainedTokenizerBase, tmp_path: Path, template: str, options: dict, parser: str
) -> None:
    assert parser_for(qwen3_tokenizer, template, options) == parser
    qwen3_tokenizer.save_pretrained(tmp_path)
    assert parser_for_folder(tmp_path, template, options, False) == parser


def test_of_several_templates_the_parser_is_that_of_the_one_without_tools(
    qwen3_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    qwen3_tokenizer.save_pretrained(tmp_path)
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("{{ messages }}")
    assert parser_for_folder(tmp_path, None, {}, False) == PARSER


def test_a_model_without_the_marks_gets_no_parser(demo_tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    assert parser_for(demo_tokenizer, QWEN3_TEMPLATE, {}) == ""
    assert parser_for(demo_tokenizer, None, {}) == ""
    assert parser_for_folder(tmp_path, None, {}, False) == ""
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "no thoughts"}))
    assert parser_for_folder(tmp_path, None, {}, False) == ""


@pytest.mark.parametrize("template", ["{% </think>", "{{ raise_exception('</think>') }}"])
def test_a_broken_template_is_left_to_others(
    qwen3_tokenizer: PreTrainedTokenizerBase, tmp_path: Path, template: str
) -> None:
    qwen3_tokenizer.save_pretrained(tmp_path)
    assert parser_for_folder(tmp_path, template, {}, False) == ""


@pytest.mark.parametrize("parser", [PARSER, ALWAYS_PARSER, "qwen3", "deepseek_r1"])
def test_the_marks_are_those_of_the_parser(qwen3_tokenizer: PreTrainedTokenizerBase, parser: str) -> None:
    end_id = qwen3_tokenizer.convert_tokens_to_ids("</think>")
    assert think_tags(parser, qwen3_tokenizer) == ThinkTags("<think>", "</think>", end_id)


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
