"""fastokens gives the tokenizers library's token ids, or does not encode."""

import asyncio
import json
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, processors
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from vllm.renderers.base import BaseRenderer
from vllm.renderers.params import TokenizeParams

from qwen_vllm import generation
from qwen_vllm.generation import hasten
from qwen_vllm.text_encoder import TextEncoder, any_of, split, text_encoder
from qwen_vllm.vllm_plugin.rendering import encodes_fast
from tests.support.chat_app import chat_app
from tests.support.scripted_engine import ScriptedEngine
from tests.support.tiny_families import FAMILIES
from tests.support.tokenizers import qwen36_tokenizer, qwen_tokenizer

REAL = {"Qwen2.5": qwen_tokenizer, "Qwen3.6": qwen36_tokenizer}
TEXT = "Is 3 < 4? `<b>` isn't; 请问，今天 2026…\n\n\t<|im_end|> e\u0301 🎉 <tool_call>{}</tool_call>\u2028 the end  "


@pytest.fixture(scope="module", params=REAL)
def pair(request: pytest.FixtureRequest) -> tuple[TextEncoder, TextEncoder, PreTrainedTokenizerBase]:
    """Two encoders of one real vocabulary, of which the first is fast; and its tokenizer."""
    tokenizer = REAL[request.param]()
    fast = TextEncoder(tokenizer)
    fast.hasten().join()
    return fast, TextEncoder(tokenizer), tokenizer


@pytest.fixture
def small() -> PreTrainedTokenizerBase:
    """A tokenizer with Qwen's control tokens."""
    return FAMILIES["Qwen2.5"].tokenizer(small=True)


TOKENS = ["<|im_end|>", "<|im_start|>", "<think>", "</tool_call>", "<|im_", "<", "'re", " \n", "\r\n\r\n", "   ", "007"]


@settings(max_examples=300, deadline=None)
@given(text=st.lists(st.one_of(st.sampled_from(TOKENS), st.text(max_size=12)), max_size=30).map("".join))
def test_all_texts_have_the_same_token_ids(pair: tuple, text: str) -> None:
    fast, slow, tokenizer = pair
    own = any_of(token.content for token in tokenizer.added_tokens_decoder.values() if not token.special)
    assert fast.is_fast and not slow.is_fast
    assert fast.text(text) == slow.text(text)
    assert fast.whole(text) == slow.whole(text)
    assert fast.parts(split(text, own)) == slow.parts(split(text, own))


def _changed(tokenizer: PreTrainedTokenizerBase, **state: Any) -> PreTrainedTokenizerBase:
    """The same, but for parts of its tokenizer.json."""
    written = json.loads(tokenizer.backend_tokenizer.to_str()) | state
    changed = Tokenizer.from_str(json.dumps(written))
    return PreTrainedTokenizerFast(tokenizer_object=changed, chat_template=tokenizer.chat_template)


@pytest.mark.parametrize("flag", ["single_word", "normalized"])
def test_tokens_that_fastokens_finds_otherwise_stay_with_the_tokenizers_library(small: Any, flag: str) -> None:
    added = json.loads(small.backend_tokenizer.to_str())["added_tokens"]
    tokenizer = _changed(small, added_tokens=[*added[:-1], added[-1] | {flag: True}])
    encoder = TextEncoder(tokenizer)
    encoder.hasten().join()
    assert not encoder.is_fast


def test_padding_in_a_tokenizer_json_is_not_put_between_the_parts(small: Any) -> None:
    padding = {"strategy": {"Fixed": 8}, "direction": "Right", "pad_to_multiple_of": None}
    padded = _changed(small, padding=padding | {"pad_id": 0, "pad_type_id": 0, "pad_token": "!"})
    parts = [("<|im_start|>", True), ("user\nA", False), ("<|im_end|>", True)]
    assert padded.decode(TextEncoder(padded).parts(parts)) == "<|im_start|>user\nA<|im_end|>"


class _Foreign:
    """As vLLM's tokenizers for Mistral's format: fast by its own word, with nothing of the tokenizers library."""

    is_fast, chat_template, eos_token_id = True, None, 2

    def __call__(self, text: str, **_options: Any) -> dict[str, list[int]]:
        return {"input_ids": [1, 2, 3]}


def test_a_tokenizer_of_another_library_that_says_it_is_fast_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "on_cpu", lambda: False)
    app = asyncio.run(chat_app(ScriptedEngine(_Foreign())))
    assert "tokenizers library" in str(app.state.chat._requests)
    ours = encodes_fast(BaseRenderer._tokenize_prompt)
    got = ours(_Renderer(_Foreign()), {"prompt": "A"}, TokenizeParams(max_total_tokens=4096))
    assert got["prompt_token_ids"] == [1, 2, 3]


@pytest.mark.parametrize("name", FAMILIES)
def test_no_family_gets_other_token_ids(name: str) -> None:
    tokenizer = FAMILIES[name].tokenizer(small=True)
    fast, slow = TextEncoder(tokenizer), TextEncoder(tokenizer)
    fast.hasten().join()
    assert fast.is_fast or "Qwen" not in name
    assert fast.text(TEXT) == slow.text(TEXT)
    assert fast.whole(TEXT) == slow.whole(TEXT)


def test_what_was_asked_of_the_tokenizer_for_one_text_does_not_cut_others(small: Any) -> None:
    small("A B C D", truncation=True, max_length=2)
    encoder = TextEncoder(small)
    encoder.hasten().join()
    assert encoder.is_fast and small.decode(encoder.whole("A B C D")) == "A B C D"


def test_a_tokenizer_that_fastokens_does_otherwise_stays_with_the_tokenizers_library(
    small: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Otherwise:
        def __getattr__(self, name: str) -> Any:
            return lambda *_: SimpleNamespace(ids=[1, 2, 3])

    caplog.set_level("INFO", "vllm.qwen_vllm")
    monkeypatch.setattr("fastokens.Tokenizer", SimpleNamespace(from_json_str=lambda _: Otherwise()))
    encoder = TextEncoder(small)
    encoder.hasten().join()
    assert encoder.text("hi") == small.encode("hi")
    assert "other token ids" in caplog.text


@pytest.mark.parametrize("on_cpu", [False, True])
def test_a_server_has_it_where_a_gpu_waits_for_prompts(monkeypatch: pytest.MonkeyPatch, on_cpu: bool) -> None:
    hastened: list[Any] = []
    monkeypatch.setattr(generation, "on_cpu", lambda: on_cpu)
    monkeypatch.setattr(TextEncoder, "hasten", lambda encoder: hastened.append(encoder))
    tokenizer = FAMILIES["Qwen2.5"].tokenizer(small=True)
    asyncio.run(chat_app(ScriptedEngine(tokenizer)))
    assert hastened == ([] if on_cpu else [text_encoder(tokenizer)])


def test_what_a_server_asks_for_changes_no_other_librarys_tokenizer(
    small: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generation, "on_cpu", lambda: False)
    hasten(SimpleNamespace(encode=str))
    hasten(small)
    text_encoder(small).hasten().join()
    assert text_encoder(small).is_fast


class _Renderer:
    """vLLM's, as far as it encodes."""

    _build_tokens_prompt = staticmethod(BaseRenderer._build_tokens_prompt)
    _wants_offsets = BaseRenderer._wants_offsets

    def __init__(self, tokenizer: Any) -> None:
        self.get_tokenizer = lambda: tokenizer
        self._can_produce_offsets = lambda: True


@pytest.mark.parametrize(
    "params",
    [
        TokenizeParams(max_total_tokens=None),
        TokenizeParams(max_total_tokens=4096, add_special_tokens=True),
        TokenizeParams(max_total_tokens=4096, add_special_tokens=False),
        TokenizeParams(max_total_tokens=4),
        TokenizeParams(max_total_tokens=4096, truncate_prompt_tokens=3),
        TokenizeParams(max_total_tokens=4096, truncate_prompt_tokens=3, truncation_side="left"),
        TokenizeParams(max_total_tokens=4096, return_token_offsets=True),
    ],
    ids=["no limit", "context", "no special", "too long", "cut", "cut on the left", "offsets"],
)
def test_vllms_own_routes_get_what_vllm_gives_them(small: Any, params: TokenizeParams) -> None:
    text_encoder(small).hasten().join()
    renderer, prompt = _Renderer(small), {"type": "text", "prompt": TEXT}
    ours = encodes_fast(BaseRenderer._tokenize_prompt)(renderer, prompt, params)
    assert ours == BaseRenderer._tokenize_prompt(renderer, prompt, params)


def test_vllms_own_routes_are_encoded_by_fastokens(small: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    text_encoder(small).hasten().join()
    monkeypatch.setattr(type(small), "__call__", None)
    ours = encodes_fast(BaseRenderer._tokenize_prompt)
    got = ours(_Renderer(small), {"prompt": "A B C"}, TokenizeParams(max_total_tokens=4096))
    assert small.decode(got["prompt_token_ids"]) == "A B C"


def test_a_token_for_the_beginning_of_a_prompt_is_vllms_to_add(small: Any) -> None:
    begins = processors.TemplateProcessing("<|im_start|> $A", None, [("<|im_start|>", 1001)])
    small.backend_tokenizer.post_processor = begins
    text_encoder(small).hasten().join()
    renderer, params = _Renderer(small), TokenizeParams(max_total_tokens=4096, add_special_tokens=True)
    ours = encodes_fast(BaseRenderer._tokenize_prompt)(renderer, {"prompt": "A"}, params)
    assert text_encoder(small).is_fast and ours["prompt_token_ids"][0] == 1001
