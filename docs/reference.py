"""Tables that the pages quote from the programs, as Markdown; cog calls these functions (see CONTRIBUTING.md).

They have the words of the programs, in the language that is asked for, whatever the locale is.
"""

import os
import sys
from argparse import ArgumentParser
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from fractions import Fraction
from importlib import import_module
from typing import Any, NamedTuple
from unittest.mock import MagicMock, patch

from docs.memory import HYBRID_MODELS, MODELS, table
from qwen_vllm import console, hardware
from qwen_vllm.cache import CACHE
from qwen_vllm.flags import Help, add_arguments
from qwen_vllm.protocol import INT32_MAX, ChatRequest, Sampling
from qwen_vllm.words import say

for variable in ("QWEN_URL", "QWEN_API_KEY"):
    os.environ.pop(variable, None)
# Gradio takes 4 s to import, and the page's flags do not need it.
sys.modules |= dict.fromkeys(("gradio", "gradio.utils"), MagicMock())

TYPES = {"string": "字符串", "integer": "整数", "number": "数", "boolean": "布尔值", "array": "列表"}


class Flag(NamedTuple):
    """A flag of a program: its name, how it is written, its help, and its default."""

    name: str
    usage: str
    text: str
    default: Any


def flags(program: str, language: str = "en") -> None:
    """Print the flags of a program's own, without those that both terminals share."""
    with _spoken(language):
        own, shared = _flags_of(_parser_of(import_module(program).main)), _shared_flags()
        _print_flags([flag for flag in own if flag not in shared], language)


def shared_flags(language: str = "en") -> None:
    """Print the flags that both terminals share, without those of the sampling fields."""
    fields = {f"--{name.replace('_', '-')}" for name in Sampling.model_fields}
    with _spoken(language):
        _print_flags([flag for flag in _shared_flags() if flag.name not in fields], language)


def limits(language: str = "en") -> None:
    """Print the server's limits, which are flags of ours beside vLLM's."""
    from vllm_server import LIMITS

    with _spoken(language):
        rows = [Flag(name, f"{name} N", say(text), default and f"{default:.10g}") for name, _, default, text in LIMITS]
        _print_flags(rows, language)


def fields(language: str = "en") -> None:
    """Print the fields of `POST /chat`: its own first, then those of sampling."""
    schema = ChatRequest.model_json_schema()["properties"]
    names = sorted(ChatRequest.model_fields, key=lambda name: name in Sampling.model_fields)
    types, head = (None, ("field", "value", "meaning")) if language == "en" else (TYPES, ("字段", "取值", "含义"))
    with _spoken(language):
        lines = [(f"`{name}`", _values(schema[name], types), say(schema[name]["description"])) for name in names]
        _print_table(head, lines)


def commands(language: str = "en") -> None:
    """Print what /help says of the chat in the terminal."""
    with _spoken(language):
        print(f"```\n{console.help_text()}\n```")


def front_ends(sentence: str) -> None:
    """Print how many front ends a server has: `sentence` with the numbers put in."""
    share, of_several = Fraction(hardware.FRONT_ENDS_PER_CORE), Fraction(hardware.WITH_SEVERAL_ENGINES)
    machines = {"of_8": (8, 1), "of_16": (16, 1), "two_of_16": (16, 2)}
    numbers = {name: hardware.front_ends(*machine) for name, machine in machines.items()}
    print(sentence.format(share=share, of_several=of_several, most=hardware.FRONT_ENDS_PER_ENGINE, **numbers))


def memory(*heads: str, hybrid: bool = False) -> None:
    """Print a table of docs/memory.py, with other heads for its first columns."""
    head, *lines = table(HYBRID_MODELS if hybrid else MODELS).splitlines()
    cells = head.strip("| ").split(" | ")
    print("\n".join([f"| {' | '.join([*heads, *cells[len(heads) :]])} |", *lines]))


@contextmanager
def _spoken(language: str) -> Iterator[None]:
    with patch.dict(os.environ, QWEN_LANG=language):
        yield


def _parser_of(main: Callable[[list[str]], Any]) -> ArgumentParser:
    """The parser that a program builds."""
    built: list[ArgumentParser] = []
    with patch.object(ArgumentParser, "print_help", lambda parser: built.append(parser)), suppress(SystemExit):
        main(["--help"])
    return built[0]


def _shared_flags() -> list[Flag]:
    parser = ArgumentParser(formatter_class=Help)
    add_arguments(parser)
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


def _print_flags(flags: Sequence[Flag], language: str) -> None:
    head = ("flag", "meaning") if language == "en" else ("参数", "含义")
    _print_table(head, [(f"`{flag.usage}`", _with_default(flag, language)) for flag in flags])


def _with_default(flag: Flag, language: str) -> str:
    word, form = ("default", " (default: {})") if language == "en" else ("默认", "（默认 {}）")
    return flag.text + form.format(flag.default) if flag.default and word not in flag.text else flag.text


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
