"""Chat requests become prompts and sampling parameters; what the engine gives becomes an answer."""

from types import SimpleNamespace
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from qwen_vllm.generation import RequestBuilder, sampling_defaults
from qwen_vllm.protocol import DEFAULT_SYSTEM, ChatError, ChatRequest
from tests.support.tiny_families import FAMILIES, QWEN38, REFUSED
from tests.support.tokenizers import byte_tokenizer

MODEL_CONFIG = SimpleNamespace(max_model_len=400, get_diff_sampling_param=lambda: {"temperature": 0.2})


@pytest.mark.parametrize(
    ("context", "configured", "max_tokens"),
    [
        (2048, {}, 512),
        (131072, {}, 8192),
        (2048, {"max_tokens": 100}, 100),
        (2048, {"max_tokens": 2048}, 1024),
        (4, {}, 1),
        (1, {}, 1),
        (3, {}, 1),
    ],
)
def test_the_default_length_of_an_answer(context: int, configured: dict, max_tokens: int) -> None:
    assert sampling_defaults(context, configured)["max_tokens"] == max_tokens


def test_the_configured_goes_over_our_defaults() -> None:
    configured = {"temperature": 0.2, "top_k": 20, "repetition_penalty": 1.05}
    defaults = sampling_defaults(2048, configured)
    assert defaults == {"temperature": 0.2, "top_p": 0.8, "max_tokens": 512, "top_k": 20, "repetition_penalty": 1.05}
    assert "max_tokens" not in configured


@pytest.fixture
def builder(qwen3_tokenizer: PreTrainedTokenizerBase) -> RequestBuilder:
    return RequestBuilder(MODEL_CONFIG, qwen3_tokenizer)


@pytest.mark.parametrize(("stream", "kind"), [(True, "DELTA"), (False, "FINAL_ONLY")])
def test_a_request_for_the_engine(builder: RequestBuilder, stream: bool, kind: str) -> None:
    request = ChatRequest(query="q", seed=7, stop=["END"], model="poet", enable_thinking=False)
    prompt, params = builder.build(request, stream)
    assert builder.prompts.render(request.system, [], "q", False).endswith("</think>\n\n")
    assert (params.temperature, params.top_p, params.max_tokens, params.seed) == (0.2, 0.8, 100, 7)
    assert (params.stop, params.output_kind.name) == (["END"], kind)
    assert params.stop_token_ids == [builder.prompts.stop_token_id]
    assert prompt.dropped_turns == 0


def test_room_for_the_answer_comes_before_the_history(builder: RequestBuilder) -> None:
    history = [("u" * 40, "a" * 40)] * 4
    short, _ = builder.build(ChatRequest(query="q", history=history, max_tokens=1), False)
    long, _ = builder.build(ChatRequest(query="q", history=history, max_tokens=300), False)
    assert short.dropped_turns < long.dropped_turns == 4
    assert len(long.token_ids) + 300 <= 400


def test_effort_and_budget_reach_the_template_and_the_engine() -> None:
    builder = RequestBuilder(MODEL_CONFIG, FAMILIES["Qwen3.8"].tokenizer(small=True))
    prompt, params = builder.build(ChatRequest(query="q", reasoning_effort="low", thinking_budget=7), False)
    assert prompt == builder.prompts.build(DEFAULT_SYSTEM, [], "q", 300, reasoning_effort="low")
    assert params.thinking_token_budget == 7
    usual, params = builder.build(ChatRequest(query="q"), False)
    assert len(usual.token_ids) != len(prompt.token_ids)
    assert params.thinking_token_budget is None


@pytest.mark.parametrize(
    ("family", "fields", "param", "message"),
    [
        ("Qwen3.8", {"reasoning_effort": "high"}, "reasoning_effort", "one of low, medium, xhigh"),
        ("Qwen3", {"reasoning_effort": "low"}, "reasoning_effort", "no levels of it: leave it out"),
        ("Qwen3", {"thinking_budget": 101}, "thinking_budget", "not be over max_tokens, 100"),
        ("Qwen3", {"thinking_budget": 9, "max_tokens": 8}, "thinking_budget", "not be over max_tokens, 8"),
        ("Qwen2.5", {"thinking_budget": 9}, "thinking_budget", "does not think: leave it out"),
    ],
)
def test_a_depth_that_the_model_does_not_have_is_refused(
    family: str, fields: dict[str, Any], param: str, message: str
) -> None:
    builder = RequestBuilder(MODEL_CONFIG, FAMILIES[family].tokenizer(small=True))
    with pytest.raises(ChatError, match=f"{param}: .*{message}") as refused:
        builder.build(ChatRequest(query="q", **fields), False)
    assert refused.value.param == param


@pytest.mark.parametrize("max_tokens", [400, 10_000])
def test_an_answer_as_long_as_the_context_is_refused(builder: RequestBuilder, max_tokens: int) -> None:
    with pytest.raises(ChatError, match="400") as refused:
        builder.build(ChatRequest(query="q", max_tokens=max_tokens), False)
    assert refused.value.param == "max_tokens"


def test_what_does_not_fit_is_refused_with_what_to_do(builder: RequestBuilder) -> None:
    with pytest.raises(ChatError, match=r"take \d+ tokens, but only 300 fit: shorten them or ask for fewer") as refused:
        builder.build(ChatRequest(query="q" * 400, max_tokens=100), False)
    assert refused.value.param == "query"


def long_text(builder: RequestBuilder, tokens: int) -> str:
    """A text with which a prompt without history has so many tokens."""
    prompt, _ = builder.build(ChatRequest(query="q", max_tokens=1), False)
    return "q" * (tokens - len(prompt.token_ids) + 1)


@pytest.fixture
def roomy(qwen3_tokenizer: PreTrainedTokenizerBase) -> RequestBuilder:
    """A model with a context of 8,192, of which an answer gets 2,048."""
    bytewise = byte_tokenizer(qwen3_tokenizer.chat_template)
    return RequestBuilder(SimpleNamespace(max_model_len=8192, get_diff_sampling_param=dict), bytewise)


@pytest.mark.parametrize(("tokens", "left"), [(6144, 2048), (6145, 2047), (7000, 1192), (8192 - 256, 256)])
def test_room_that_nobody_asked_for_gives_way_to_a_long_query(roomy: RequestBuilder, tokens: int, left: int) -> None:
    prompt, params = roomy.build(ChatRequest(query=long_text(roomy, tokens)), False)
    assert (len(prompt.token_ids), params.max_tokens) == (tokens, left)


def test_room_that_nobody_asked_for_gives_way_to_the_newest_turn(roomy: RequestBuilder) -> None:
    document = (long_text(roomy, 7000), "Yes.")
    old = ("Hello", "Hello!")
    prompt, params = roomy.build(ChatRequest(query="And?", history=[old, document]), False)
    assert prompt.dropped_turns == 1
    assert params.max_tokens == 8192 - len(prompt.token_ids) < 1192
    many, params = roomy.build(ChatRequest(query="And?", history=[document, *[old] * 99]), False)
    assert (many.dropped_turns, params.max_tokens) == (1, 2048)  # the newest turns fit


@pytest.mark.parametrize(
    ("tokens", "fields", "fits"),
    [
        (8192 - 255, {}, 7936),
        (6145, {"max_tokens": 2048}, 6144),
        (8192 - 255, {"max_tokens": 256}, 7936),
        (7193, {"thinking_budget": 1000}, 7192),
    ],
)
def test_room_that_was_asked_for_gives_way_to_nothing(
    roomy: RequestBuilder, tokens: int, fields: dict[str, Any], fits: int
) -> None:
    query = long_text(roomy, tokens)
    with pytest.raises(ChatError, match=f"take {tokens} tokens, but only {fits} fit") as refused:
        roomy.build(ChatRequest(query=query, **fields), False)
    assert refused.value.param == "query"
    if fields:
        document = (query, "Yes.")
        prompt, _ = roomy.build(ChatRequest(query="And?", history=[document], **fields), False)
        assert prompt.dropped_turns == 1


def refusal(tokenizer: Any) -> str:
    with pytest.raises(ChatError) as refused:
        RequestBuilder(MODEL_CONFIG, tokenizer)
    return refused.value.message


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_whose_template_cannot_be_followed_has_no_chat(name: str) -> None:
    message = refusal(REFUSED[name].tokenizer(small=True))
    assert message.endswith("no /chat; use /v1/chat/completions, or name another template with --chat-template")


def test_a_tokenizer_of_another_library_has_no_chat() -> None:
    class Tekken:
        is_fast = False
        chat_template = FAMILIES["Mistral 0.3"].template

    assert "--tokenizer-mode hf" in refusal(Tekken())


def test_a_model_without_a_template_has_no_chat(qwen3_tokenizer: PreTrainedTokenizerBase) -> None:
    bare = PreTrainedTokenizerFast(tokenizer_object=qwen3_tokenizer.backend_tokenizer)
    assert "no chat template: use /v1/completions (in Python complete_batch)" in refusal(bare)


def test_a_refusal_names_the_template_option_that_would_help() -> None:
    counted = QWEN38.replace("'<think>", "'<think>' + loop.index|string + '", 1)
    tokenizer = FAMILIES["Qwen3.8"].tokenizer(small=True)
    tokenizer.chat_template = counted
    assert """--default-chat-template-kwargs '{"preserve_thinking": false}'""" in refusal(tokenizer)
    assert RequestBuilder(MODEL_CONFIG, tokenizer, template_options={"preserve_thinking": False})
