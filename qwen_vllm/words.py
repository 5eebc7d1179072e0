"""All the words of the page, in two languages, from `words.json`."""

import json
from pathlib import Path

from qwen_vllm.protocol import Sampling

Words = dict[str, str]
"""What the page says in one language, by key."""

WORDS: dict[str, Words] = json.loads(Path(__file__).with_name("words.json").read_bytes())
"""By language. The English descriptions of the sampling parameters come from the protocol."""
WORDS["en"] = {f"{name}_info": field.description or "" for name, field in Sampling.model_fields.items()} | WORDS["en"]


def words_for(language: str | None) -> dict[str, Words]:
    """Return the words by the browser's language; with a fixed `language`, the same words for all."""
    return {browser: WORDS[language or browser] for browser in WORDS}
