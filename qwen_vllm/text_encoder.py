"""Texts → token ids, for one tokenizer: those of the tokenizers library, in a fraction of its time.

fastokens gives the same ids ten to seventy times as fast, but takes seconds to read a vocabulary. So it is made in the
background, where there is a GPU. Until it is ready, and where its ids would differ, the tokenizers library encodes.
"""

import json
import os
import re
from collections.abc import Iterable
from logging import getLogger
from threading import Thread
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from tokenizers import Tokenizer

if TYPE_CHECKING:
    import fastokens
    from transformers import PreTrainedTokenizerBase

LOG = getLogger("vllm.qwen_vllm")
Part = tuple[str, bool]
"""A text, and whether it is a control token that counts as such."""
SAMPLE = (
    "It's 3 < 4, isn't IT? You'd say 1234567 x 89 = 110,111,110,963.\n\n\tdef f(a_b: int) -> 'str':\r\n        pass  \n"
    "请问，今天天气怎么样？（２０２６年）「日本語のテキスト」 한국어 Привет, мир! Ελλάδα שלום عربى हिन्दी ภาษาไทย"
    "\u3000\u00a0\u2028e\u0301 \u1e9b\u0323 ﬁ ½ ² 🎉👩\u200d👧\ufeff\U0010ffff \x00\x1b [](){}<>|\\/@#$%^&*~\"'  end "
)
"""Texts in which tokenizers that differ would be seen to."""


class TextEncoder:
    """Encodes for one tokenizer; safe to call from several threads. Made by `text_encoder`.

    Attributes:
        is_fast: whether fastokens encodes.
        adds_nothing: whether a whole prompt gets no further tokens, such as one for its beginning.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self._whole: Tokenizer = tokenizer.backend_tokenizer
        self._texts = text_tokenizer(self._whole)
        self._ids = {token.content: number for number, token in self._whole.get_added_tokens_decoder().items()}
        self._fast: fastokens.Tokenizer | None = None
        self._reader: Thread | None = None
        self.adds_nothing = self._whole.num_special_tokens_to_add(is_pair=False) == 0

    @property
    def is_fast(self) -> bool:
        return self._fast is not None

    def text(self, text: str) -> list[int]:
        """Encode a text in which no control token counts."""
        if self._fast:
            return self._fast.encode_ordinary(text).ids
        return _slowly(self._texts, text)

    def parts(self, parts: list[Part]) -> list[int]:
        """Encode texts one by one. What counts as a control token must be one."""
        token_ids: list[int] = []
        for text, is_token in parts:
            token_ids += [self._ids[text]] if is_token else self.text(text)
        return token_ids

    def whole(self, text: str) -> list[int]:
        """Encode as the tokenizer itself does: all its tokens count."""
        if self._fast:
            return self._fast.encode(text).ids
        return _slowly(self._whole, text)

    def hasten(self) -> Thread:
        """Make fastokens ready in the background; return what does."""
        if not self._reader:
            # No daemon: the interpreter cannot end it inside the library.
            self._reader = Thread(target=self._read, name="fastokens")
            self._reader.start()
        return self._reader

    def _read(self) -> None:
        added = self._whole.get_added_tokens_decoder().values()
        if any(token.single_word or token.normalized for token in added):
            LOG.info("fastokens looks for this model's control tokens in another order: the tokenizers library encodes")
            return
        import fastokens  # 10 MB, which a CPU never needs

        os.environ.setdefault("FASTOKENS_BPE_THREADS", "1")  # each has a cache of its own, and gains little
        sample = "".join([SAMPLE, *(token.content + SAMPLE[:9] for token in added)])
        try:
            fast = fastokens.Tokenizer.from_json_str(self._whole.to_str())
            cut = (self._whole.truncation or {}).get("max_length")  # as vLLM asked last, for one text
            fast.no_truncation()
            fast.no_padding()
            same = (
                fast.encode_ordinary(sample).ids == _slowly(self._texts, sample)
                and fast.encode(sample).ids[:cut] == _slowly(self._whole, sample)
                and all(fast.encode(token.content).ids == _slowly(self._whole, token.content) for token in added)
            )
        except Exception as error:  # it does not know all kinds of tokenizers
            LOG.info("fastokens cannot encode for this model, the tokenizers library does: %s", error)
            return
        if same:
            self._fast = fast
        else:
            LOG.info("fastokens gives other token ids for this model: the tokenizers library encodes")


_MADE: "WeakKeyDictionary[PreTrainedTokenizerBase, TextEncoder]" = WeakKeyDictionary()


def text_encoder(tokenizer: "PreTrainedTokenizerBase") -> TextEncoder:
    """Return the one encoder of a fast Hugging Face tokenizer."""
    if tokenizer not in _MADE:
        _MADE[tokenizer] = TextEncoder(tokenizer)
    return _MADE[tokenizer]


def is_known(tokenizer: Any) -> bool:
    """Tell whether a tokenizer is one of the tokenizers library, whatever it says of itself."""
    return isinstance(getattr(tokenizer, "backend_tokenizer", None), Tokenizer)


def any_of(contents: Iterable[str]) -> "re.Pattern[str]":
    """Make a pattern that finds one of these texts, the longest first; nothing, if there is none."""
    return re.compile("|".join(map(re.escape, sorted(contents, key=len, reverse=True))) or "(?!)")


def split(text: str, tokens: "re.Pattern[str]") -> list[Part]:
    """Take a text apart at the control tokens that count in it."""
    parts, end = [], 0
    for found in tokens.finditer(text):
        parts += [(text[end : found.start()], False), (found[0], True)]
        end = found.end()
    return [*parts, (text[end:], False)]


def text_tokenizer(tokenizer: Tokenizer) -> Tokenizer:
    """Make a tokenizer for which no text is a control token. The vocabulary is not copied."""
    parts = {name: getattr(tokenizer, name) for name in ("normalizer", "pre_tokenizer", "decoder")}
    # An empty sequence of normalizers is no None, but false.
    states = {name: None if part is None else json.loads(part.__getstate__()) for name, part in parts.items()}
    empty = {"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": {}, "merges": []}}
    # A text follows a control token, so the space that some tokenizers put before a whole prompt is not its.
    state = json.dumps({**empty, **states}).replace('"prepend_scheme": "first"', '"prepend_scheme": "never"')
    made = Tokenizer.from_str(state)
    made.model = tokenizer.model
    return made


def _slowly(tokenizer: Tokenizer, text: str) -> list[int]:
    (encoding,) = tokenizer.encode_batch_fast([text], add_special_tokens=False)
    return encoding.ids
