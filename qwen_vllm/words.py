"""All words that people read, in English and Chinese.

`words.json` has those of the page, by key; the terminals share some. The programs' other texts stand in English where
they are said, and `chinese.json` has their Chinese.
"""

import argparse
import json
import os
from collections.abc import Sequence
from importlib.resources import files

from qwen_vllm.protocol import Sampling

Words = dict[str, str]
"""What is said in one language, by key."""

CHINESE: Words = json.loads(files("qwen_vllm").joinpath("chinese.json").read_bytes())
"""By the English."""
WORDS: dict[str, Words] = json.loads(files("qwen_vllm").joinpath("words.json").read_bytes())
"""The page's words, by language."""
INFO = {f"{name}_info": field.description or "" for name, field in Sampling.model_fields.items()}
"""What the page says of each sampling parameter, unless it has words of its own."""
WORDS["en"] = INFO | WORDS["en"]
WORDS["zh"] = {key: CHINESE[text] for key, text in INFO.items()} | WORDS["zh"]
SAID = {"en": WORDS["en"], "zh": WORDS["zh"] | CHINESE}
"""All that `say` knows, by language."""

LOCALE = ("LC_ALL", "LC_MESSAGES", "LANG")
"""The variables of the locale; the first that is not empty counts."""


def words_for(language: str | None) -> dict[str, Words]:
    """Return the page's words by the browser's language; with a fixed `language`, the same words for all."""
    return {browser: WORDS[language or browser] for browser in WORDS}


def choose_language(flags: Sequence[str] | None = None) -> None:
    """Let `say` speak the language of --lang, else of $QWEN_LANG or the locale, also in programs started from here.

    So does argparse. A program calls this; libraries alone speak English. None: the flags of the command line.
    """
    argparse._ = say  # type: ignore[attr-defined]  # its gettext, which would read binary files of words
    languages = [os.environ.get(name, "") for name in ("QWEN_LANG", *LOCALE)]
    os.environ["QWEN_LANG"] = "zh" if next(filter(None, languages), "").startswith("zh") else "en"
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--lang", choices=tuple(WORDS), default=os.environ["QWEN_LANG"])
    os.environ["QWEN_LANG"] = parser.parse_known_args(flags)[0].lang


def say(text: str, /, **values: object) -> str:
    """Return one of the page's texts, by its key, or another, by its English, in the terminal's language.

    The values are put in for the names in braces.
    """
    text = SAID["zh" if os.environ.get("QWEN_LANG") == "zh" else "en"].get(text, text)
    return text.format(**values) if values else text


class SaidError(Exception):
    """Says in the terminal's language why a program cannot do what it is asked."""

    def __init__(self, text: str, /, **values: object) -> None:
        super().__init__(say(text, **values))
