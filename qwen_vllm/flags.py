"""Reads a program's flags. What --help says is in the terminal's language."""

import argparse
import json
import re
from collections.abc import Iterable
from typing import Any

from wcwidth import wcswidth

from qwen_vllm.protocol import DEFAULT_SYSTEM, Sampling, validated
from qwen_vllm.words import WORDS, say

PIECE = re.compile(r"\s+|（?(?:[!-~]+|\S)[，。；：、）]*")
"""What a line is never broken in: a word, or a Chinese character, with the punctuation that belongs to it."""


class Columns(str):
    """A text as long as it is wide in a terminal, where a Chinese character takes two columns."""

    def __len__(self) -> int:
        return wcswidth(self)


class Help(argparse.HelpFormatter):
    """Formats what --help says, in the terminal's language."""

    def add_usage(self, usage: Any, actions: Any, groups: Any, prefix: str | None = None) -> None:
        super().add_usage(usage, actions, groups, prefix or Columns(say("usage: ")))

    def start_section(self, heading: str | None) -> None:
        super().start_section(say(heading or ""))

    def _get_help_string(self, action: argparse.Action) -> str:
        return say(action.help or "")

    def _split_lines(self, text: str, width: int) -> list[str]:
        lines = [""]
        for piece in PIECE.findall(text):
            if wcswidth((lines[-1] + piece).rstrip()) > width:
                lines.append("")
            lines[-1] += piece if lines[-1] else piece.lstrip()
        return [line.rstrip() for line in lines]

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "\n".join(indent + line for line in self._split_lines(say(text), width - len(indent)))


def add_arguments(parser: argparse.ArgumentParser, sampling: Iterable[str] = tuple(Sampling.model_fields)) -> None:
    """Add the flags of a terminal chat; `sampling` names the parameters to offer."""
    parser.add_argument(
        "--history-max",
        type=_count,
        default=5,
        metavar="N",
        help="most earlier turns sent along; 0: none (default: %(default)s)",
    )
    parser.add_argument("--system", default=DEFAULT_SYSTEM, help="system prompt (default: %(default)r)")
    parser.add_argument("--lang", choices=WORDS, help="language (default: $QWEN_LANG or the locale's)")
    group = parser.add_argument_group("sampling (default: the model's)")
    for name in sampling:
        flag, text = f"--{name.replace('_', '-')}", say(Sampling.model_fields[name].description or "")
        if name == "stop":
            group.add_argument(flag, action="append", metavar="WORD", help=say("{text}; repeatable", text=text))
        elif name == "enable_thinking":
            group.add_argument(flag, action=argparse.BooleanOptionalAction, help=text)
        else:
            group.add_argument(flag, metavar="X", help=text)


def given_sampling(args: argparse.Namespace) -> Sampling:
    """Read the sampling parameters from the command line.

    Raises:
        ChatError: a value is wrong; it names the parameter.
    """
    given = {name: getattr(args, name) for name in Sampling.model_fields if getattr(args, name, None) is not None}
    given = {name: typed(name, value) if isinstance(value, str) else value for name, value in given.items()}
    return validated(Sampling, given)


def typed(name: str, value: str) -> object:
    """Return a parameter's value as it was meant: parsed where it is JSON (0.5, true, ["a"]), else as text.

    One stop word is text in any case, without its quotes.
    """
    if name == "model":
        return value
    try:
        parsed = json.loads(value)
    except ValueError:
        parsed = value
    if name == "stop" and not isinstance(parsed, list):
        return [parsed if isinstance(parsed, str) else value]
    return parsed


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(say("must be 0 or more"))
    return int(text)
