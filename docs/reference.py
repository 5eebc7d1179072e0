"""Tables that the pages quote from the programs, as Markdown; cog calls these functions (see CONTRIBUTING.md).

In a Chinese page the flags, ranges and defaults are the programs' own, and the words are those of `docs/chinese.py`.
A flag without Chinese words fails, and so do words for a flag that is gone.
"""

import os
import re
import sys
from argparse import ArgumentParser
from collections.abc import Callable, Iterable, Mapping, Sequence
from fractions import Fraction
from importlib import import_module
from typing import Any, NamedTuple
from unittest.mock import MagicMock, patch

from docs import chinese
from docs.memory import HYBRID_MODELS, MODELS, table
from qwen_vllm import console, hardware
from qwen_vllm.cache import CACHE
from qwen_vllm.protocol import INT32_MAX, ChatRequest, Sampling

for variable in ("QWEN_URL", "QWEN_API_KEY"):
    os.environ.pop(variable, None)
# Gradio takes 4 s to import, and the page's flags do not need it.
sys.modules |= dict.fromkeys(("gradio", "gradio.utils"), MagicMock())


class Flag(NamedTuple):
    """A flag of a program: its name, how it is written, its help, and its default."""

    name: str
    usage: str
    text: str
    default: Any


def flags(program: str, language: str = "en") -> None:
    """Print the flags of a program's own, without those that both terminals share."""
    module = import_module(program)
    own = _flags_of(_parser_of(getattr(module, "parse_args", module.main)))
    _print_flags([flag for flag in own if flag not in _shared_flags()], language, getattr(chinese, program.upper()))


def shared_flags(language: str = "en") -> None:
    """Print the flags that both terminals share, without those of the sampling fields."""
    fields = {f"--{name.replace('_', '-')}" for name in Sampling.model_fields}
    _print_flags([flag for flag in _shared_flags() if flag.name not in fields], language, chinese.CONSOLE)


def limits(language: str = "en") -> None:
    """Print the server's limits, which are flags of ours beside vLLM's."""
    from vllm_server import LIMITS

    rows = [Flag(name, f"{name} N", text, default and f"{default:.10g}") for name, _, default, text in LIMITS]
    _print_flags(rows, language, chinese.LIMITS)


def fields(language: str = "en") -> None:
    """Print the fields of `POST /chat`: its own first, then those of sampling."""
    schema = ChatRequest.model_json_schema()["properties"]
    names = sorted(ChatRequest.model_fields, key=lambda name: name in Sampling.model_fields)
    if language == "en":
        lines = [(f"`{name}`", _values(schema[name]), schema[name]["description"]) for name in names]
        _print_table(("field", "value", "meaning"), lines)
    else:
        _check_words(chinese.FIELDS, names)
        lines = [(f"`{name}`", _values(schema[name], chinese.TYPES), chinese.FIELDS[name]) for name in names]
        _print_table(("字段", "取值", "含义"), lines)


def commands(language: str = "en") -> None:
    """Print the commands of the chat in the terminal: the text of /help, or a Chinese table."""
    if language == "en":
        print(f"```\n{console.HELP}\n```")
    else:
        names = [re.split(r"  +", line)[0] for line in console.HELP.splitlines() if line.startswith("/")]
        _check_words(chinese.COMMANDS, names)
        _print_table(("命令", "作用"), [(f"`{name}`", chinese.COMMANDS[name]) for name in names])


def front_ends(sentence: str) -> None:
    """Print how many front ends a server has: `sentence` with the numbers put in."""
    share, most = Fraction(hardware.FRONT_ENDS_PER_CORE), hardware.FRONT_ENDS_PER_ENGINE
    print(sentence.format(share=share, most=most, of_8=int(8 * share), of_16=min(most, int(16 * share))))


def memory(*heads: str, hybrid: bool = False) -> None:
    """Print a table of docs/memory.py, with other heads for its first columns."""
    head, *lines = table(HYBRID_MODELS if hybrid else MODELS).splitlines()
    cells = head.strip("| ").split(" | ")
    print("\n".join([f"| {' | '.join([*heads, *cells[len(heads) :]])} |", *lines]))


class _Built(Exception):
    """A program has built its parser."""


def _parser_of(parse: Callable[[list[str]], Any]) -> ArgumentParser:
    """The parser that a program builds before it parses."""

    def stop(parser: ArgumentParser, *_: Any) -> None:
        raise _Built(parser)

    with patch.object(ArgumentParser, "parse_known_args", stop):
        try:
            parse([])
        except _Built as built:
            return built.args[0]
    raise AssertionError(f"{parse} builds no parser")


def _shared_flags() -> list[Flag]:
    parser = ArgumentParser()
    console.add_arguments(parser)
    return _flags_of(parser)


def _flags_of(parser: ArgumentParser) -> list[Flag]:
    formatter, flags = parser._get_formatter(), []
    for action in parser._actions:
        if action.dest == "help":
            continue
        usage = ", ".join(action.option_strings)
        if action.metavar or action.choices:
            usage += f" {formatter._format_args(action, formatter._get_default_metavar_for_optional(action))}"
        text = formatter._expand_help(action).replace(str(CACHE), "~/.cache/qwen-vllm")
        flags.append(Flag(action.option_strings[0], usage, text, action.default))
    return flags


def _print_flags(flags: Sequence[Flag], language: str, words: Mapping[str, str]) -> None:
    if language == "en":
        _print_table(("flag", "meaning"), [(f"`{flag.usage}`", _with_default(flag)) for flag in flags])
        return
    _check_words(words, [flag.name for flag in flags])
    for flag in flags:
        if flag.default and "{default}" not in words[flag.name]:
            raise AssertionError(f"docs/chinese.py: the words for {flag.name} do not show its default, {flag.default}")
    lines = [(f"`{flag.usage}`", words[flag.name].format(default=flag.default)) for flag in flags]
    _print_table(("参数", "含义"), lines)


def _with_default(flag: Flag) -> str:
    return f"{flag.text} (default: {flag.default})" if flag.default and "default" not in flag.text else flag.text


def _check_words(words: Mapping[str, str], names: Iterable[str]) -> None:
    if wrong := set(words) ^ set(names):
        raise AssertionError(f"docs/chinese.py and the programs differ in: {', '.join(sorted(wrong))}")


def _values(schema: Mapping[str, Any], types: Mapping[str, str] | None = None) -> str:
    """The values that a field takes, such as "number, ≥ 0, ≤ 2"; the largest integers are no bound to speak of."""
    kind = next((part for part in schema.get("anyOf", []) if part["type"] != "null"), schema)
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤"}
    bounds = [f"{sign} {kind[name]:g}" for name, sign in signs.items() if kind.get(name, INT32_MAX) < INT32_MAX]
    return ", ".join([types[kind["type"]] if types else kind["type"], *bounds])


def _print_table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> None:
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for cells in lines:
        print(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
