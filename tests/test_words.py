"""The words of the page."""

from string import Formatter

from qwen_vllm.protocol import Sampling
from qwen_vllm.words import WORDS, Words


def test_both_languages_say_the_same_things() -> None:
    untranslated = {f"{name}_info" for name in Sampling.model_fields} - set(WORDS["zh"])
    assert set(WORDS["en"]) == set(WORDS["zh"]) | untranslated
    assert untranslated == set()


def test_both_languages_fill_in_the_same_values() -> None:
    assert filled_in(WORDS["en"]) == filled_in(WORDS["zh"])


def filled_in(words: Words) -> dict[str, set[str | None]]:
    """The names of the values that each phrase takes."""
    return {key: {name for _, name, _, _ in Formatter().parse(phrase)} - {None} for key, phrase in words.items()}
