"""What people read, in both languages: nothing is missing, nothing is left over, the same values are put in."""

import argparse
import ast
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from string import Formatter

import pytest
from wcwidth import wcswidth

import gradio_webui
import vllm_client
import vllm_offline
import vllm_server
from qwen_vllm import console, with_server
from qwen_vllm.models.checks import ModelUnavailable
from qwen_vllm.offline import batch
from qwen_vllm.protocol import ChatError, ChatRequest
from qwen_vllm.words import CHINESE, WORDS, Words, choose_language, say
from tests.support import ROOT

CONSTANTS = {
    node.value
    for source in (*ROOT.glob("*.py"), *ROOT.glob("qwen_vllm/**/*.py"), Path(argparse.__file__))
    for node in ast.walk(ast.parse(source.read_text()))
    if isinstance(node, ast.Constant) and isinstance(node.value, str)
}
"""All texts that stand in the programs, and in argparse."""


def said() -> Iterator[str]:
    """The texts that are said in the terminal's language, but those of --help and of the page."""
    for source in (*ROOT.glob("*.py"), *ROOT.glob("qwen_vllm/**/*.py")):
        for node in ast.walk(ast.parse(source.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in SAID_BY:
                parts = [part.value for part in ast.walk(node.args[0]) if isinstance(part, ast.Constant)]
                formatted = isinstance(node.args[0], ast.JoinedStr) and re.search(r"\w ", "".join(parts))
                assert not formatted, f"{source}:{node.lineno}: the values of a text are given by name"
                if not isinstance(node.args[0], ast.JoinedStr):
                    yield from filter(None, parts)
    yield from (*console.COMMANDS.values(), with_server.USAGE, batch.BAR, batch.BAR_OF_PIPE)
    yield from (stage for _, stage in with_server.STAGES)
    yield from (text for *_, text in vllm_server.LIMITS)
    yield from (field.description for field in ChatRequest.model_fields.values())


SAID_BY = ("say", "ModelUnavailable", "BatchError", "ServerFailed", "KeyFileError")
"""The functions and errors whose first argument is said."""


def filled_in(text: str) -> set[str | None]:
    """The names of the values that a text takes, in braces or as argparse has them."""
    return {name for _, name, _, _ in Formatter().parse(text)} - {None} | {*re.findall(r"%\(\w+\)\w", text)}


def test_all_that_the_programs_say_has_its_chinese() -> None:
    assert sorted({*said()} - {*CHINESE, *WORDS["en"]}) == []


def test_no_chinese_is_left_over() -> None:
    assert sorted({*CHINESE} - CONSTANTS) == []


def test_the_page_says_the_same_things_in_both_languages() -> None:
    assert set(WORDS["en"]) == set(WORDS["zh"])


@pytest.mark.parametrize("words", [CHINESE, {text: WORDS["zh"][key] for key, text in WORDS["en"].items()}])
def test_both_languages_fill_in_the_same_values(words: Words) -> None:
    assert {text: filled_in(text) for text in words} == {text: filled_in(chinese) for text, chinese in words.items()}


@pytest.mark.parametrize("main", [vllm_client.main, vllm_offline.main, gradio_webui.main])
def test_help_is_chinese_and_fits_the_terminal(
    main: Callable[[list[str]], int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit, match=r"^0$"):
        main(["--help", "--lang", "zh"])
    usage, _, shown = capsys.readouterr().out.partition("\n\n")
    first, second, *_ = usage.splitlines()
    assert first.startswith("用法：")
    assert second.index("[") == wcswidth(first[: first.index("[")])
    assert "\n选项:\n" in shown
    assert max(map(wcswidth, shown.splitlines())) <= 80
    in_quotes = r"'[^']*'"
    assert re.findall("[a-z]+ [a-z]+ [a-z]+", re.sub(in_quotes, "", " ".join(shown.split()))) == []


WRONG = {
    "--nonsense": "无法识别的参数：--nonsense",
    "--history-max": "参数 --history-max：后面要写一个值",
    "--history-max=-1": "参数 --history-max：必须是不小于 0 的整数",
    "--h": "参数 --h 不明确，可能是 --help, --history-max",
    "--enable-thinking=1": "参数 --enable-thinking/--no-enable-thinking：后面不能写值，这里写了 '1'",
}


@pytest.mark.parametrize(("flag", "told"), WRONG.items())
def test_a_wrong_flag_is_told_in_chinese(flag: str, told: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit, match=r"^2$"):
        vllm_client.main(["--lang", "zh", flag])
    assert capsys.readouterr().err.splitlines()[-1] == f"vllm_client.py：错误：{told}"


LOCALES = {
    "none": ({}, "en"),
    "LANG": ({"LANG": "zh_CN.UTF-8"}, "zh"),
    "Traditional": ({"LANG": "zh_TW.UTF-8"}, "zh"),
    "another": ({"LANG": "de_DE.UTF-8"}, "en"),
    "LC_MESSAGES before LANG": ({"LC_MESSAGES": "en_US.UTF-8", "LANG": "zh_CN.UTF-8"}, "en"),
    "LC_ALL before both": ({"LC_ALL": "zh_CN.UTF-8", "LC_MESSAGES": "C", "LANG": "C"}, "zh"),
    "C counts": ({"LC_ALL": "C", "LANG": "zh_CN.UTF-8"}, "en"),
    "an empty one does not": ({"LC_ALL": "", "LC_MESSAGES": "", "LANG": "zh_CN"}, "zh"),
    "only for characters": ({"LC_CTYPE": "zh_CN.UTF-8"}, "en"),
    "QWEN_LANG before all": ({"QWEN_LANG": "zh", "LC_ALL": "en_US.UTF-8"}, "zh"),
}


@pytest.mark.parametrize(("environment", "language"), LOCALES.values(), ids=LOCALES.keys())
@pytest.mark.parametrize("flag", [None, "en", "zh"])
def test_the_language_is_that_of_the_flag_or_the_locale(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], language: str, flag: str | None
) -> None:
    for name in ("QWEN_LANG", "LC_ALL", "LC_MESSAGES", "LC_CTYPE", "LANG"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    choose_language(["--temperature", "0", *(["--lang", flag] if flag else []), "-1", "x y"])
    stopped = {"en": "stopped", "zh": "已停止"}
    assert say("stopped") == stopped[flag or language]
    # A program that is started from here speaks the same.
    assert os.environ["QWEN_LANG"] == (flag or language)


def test_a_language_that_there_is_not_is_told(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit, match=r"^2$"):
        choose_language(["--lang", "fr"])
    assert "argument --lang: invalid choice: 'fr' (choose from 'en', 'zh')" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "told"), [(["--lang", "fr"], "不能是 'fr'（可选：'en', 'zh'）"), (["--lang"], "后面要写一个值")]
)
def test_a_language_that_there_is_not_is_told_in_the_one_of_the_locale(
    flags: list[str], told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.delenv("QWEN_LANG")
    monkeypatch.setenv("LC_ALL", "zh_CN.UTF-8")
    monkeypatch.setattr(sys, "argv", ["vllm_client.py"])
    with pytest.raises(SystemExit, match=r"^2$"):
        vllm_client.main(flags)
    assert capsys.readouterr().err.splitlines()[-1] == f"vllm_client.py：错误：参数 --lang：{told}"


def test_a_library_speaks_english_whatever_the_locale_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QWEN_LANG")
    monkeypatch.setenv("LC_ALL", "zh_CN.UTF-8")
    with pytest.raises(ChatError, match=r"^no server answers at http://127\.0\.0\.1:1: is it running"):
        vllm_client.server_info("http://127.0.0.1:1")


def test_the_errors_that_a_program_ends_with_are_chinese(chinese: None) -> None:
    assert str(ModelUnavailable("{file} describes no model", file="{x}")) == "{x} 描述的不是模型"
