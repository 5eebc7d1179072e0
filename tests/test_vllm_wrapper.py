"""The loop that drives the engine, on a scripted engine: full, fair, bounded, and what happens when it fails."""

from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

import vllm_wrapper
from qwen_vllm import generation
from qwen_vllm.models.checks import ModelUnavailable
from qwen_vllm.protocol import ChatError, Reasoning, Sampling
from qwen_vllm.text_encoder import TextEncoder, text_encoder
from qwen_vllm.vllm_plugin import plugin
from tests.support.tiny_checkpoints import write_adapter, write_model
from tests.support.tiny_families import QWEN36, QWEN38
from tests.support.tokenizers import byte_tokenizer
from vllm_wrapper import ChatModel


class ScriptedLLM:
    """Stands in for vLLM's LLM. Each step gives the first `max_num_seqs` requests one more token of `says`, by default
    "a", "b", …, up to their max_tokens. What `fails` holds for a step's number, from 0, is raised there.

    Records all requests by id, how many ran at each step, and the ids of aborted ones.
    """

    def __init__(self, tokenizer: Any, max_num_seqs: int = 4, context: int = 2048) -> None:
        self._tokenizer = tokenizer
        self.says: Sequence[str] = [chr(ord("a") + n) for n in range(2048)]
        self.fails: dict[int, Exception] = {}
        self.model_config = SimpleNamespace(max_model_len=context, get_diff_sampling_param=dict)
        self.vllm_config = SimpleNamespace(scheduler_config=SimpleNamespace(max_num_seqs=max_num_seqs))
        self.llm_engine = self.renderer = self
        self.requests: dict[str, SimpleNamespace] = {}
        self.queue: list[str] = []
        self.ran: list[int] = []
        self.aborted: list[str] = []

    def get_tokenizer(self) -> Any:
        return self._tokenizer

    def add_request(self, request_id: str, prompt: dict[str, Any], params: Any, lora_request: Any) -> None:
        text = self._tokenizer.decode(prompt["prompt_token_ids"])
        if "too strange" in text:
            raise ValueError("too strange for the ")
        self.requests[request_id] = SimpleNamespace(prompt=text, params=params, tokens=[], adapter=lora_request)
        self.queue.append(request_id)

    def abort_request(self, request_ids: list[str]) -> None:
        self.aborted += request_ids
        self.queue = [request_id for request_id in self.queue if request_id not in request_ids]

    def step(self) -> list[SimpleNamespace]:
        if len(self.ran) in self.fails:
            raise self.fails[len(self.ran)]
        running = self.queue[: self.vllm_config.scheduler_config.max_num_seqs]
        self.ran.append(len(running))
        return [output for request_id in running if (output := self._output(request_id))]

    def _output(self, request_id: str) -> SimpleNamespace | None:
        request = self.requests[request_id]
        request.tokens.append(self.says[len(request.tokens)])
        finished = len(request.tokens) == request.params.max_tokens
        if finished:
            self.queue.remove(request_id)
        final_only = request.params.output_kind.name == "FINAL_ONLY"
        if final_only and not finished:
            return None
        tokens = request.tokens if final_only else request.tokens[-1:]
        reason = ("abort" if "gives up" in request.prompt else "length") if finished else None
        token_ids = [self._tokenizer.get_vocab().get(token, 0) for token in tokens]
        completion = SimpleNamespace(text="".join(tokens), token_ids=token_ids, finish_reason=reason, stop_reason=None)
        return SimpleNamespace(request_id=request_id, finished=finished, outputs=[completion])


@pytest.fixture
def load(monkeypatch, tmp_path, qwen3_tokenizer) -> Callable[..., tuple[ChatModel, ScriptedLLM]]:
    monkeypatch.setattr(vllm_wrapper, "set_environment", lambda: None)
    monkeypatch.setattr(plugin, "begin_ours", lambda: None)

    def load(
        tokenizer: Any = qwen3_tokenizer,
        chat_template: str | None = None,
        adapters: dict[str, str] | None = None,
        chat_template_options: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> tuple[ChatModel, ScriptedLLM]:
        llm = ScriptedLLM(tokenizer, **kwargs)
        monkeypatch.setattr("vllm.LLM", lambda **_: llm)
        folder = write_model(tmp_path, hidden_size=64, num_hidden_layers=2)
        model = ChatModel(
            str(folder), chat_template=chat_template, adapters=adapters, chat_template_options=chat_template_options
        )
        return model, llm

    return load


def row(query: str = "?", tokens: int = 3, **fields: Any) -> dict[str, Any]:
    return {"query": query, "max_tokens": tokens, **fields}


def test_a_stop_word_counts_in_the_text_alone_and_ends_its_row_in_the_engine(load):
    model, llm = load()
    llm.says = ["<think>", "END", "</think>", "H", "i E", "ND", "!", "!", "!"]
    rows = [row("stops", 9, stop=["END"]), row("goes on", 9), row("thinks not", 2, stop=["END"], enable_thinking=False)]
    stopped, whole, _ = model.chat_batch(rows)
    assert (stopped.reasoning, stopped.text, stopped.finish_reason, stopped.stop_reason) == (
        "END",
        "Hi ",
        "stop",
        "END",
    )
    assert (stopped.completion_tokens, stopped.reasoning_tokens) == (6, 1)
    assert (whole.text, whole.finish_reason) == ("Hi END!!!", "length")
    assert llm.aborted == ["0"]
    assert llm.requests["2"].params.stop == ["END"]
    *parts, result = model.stream_chat("?", sampling=Sampling(stop=["END"], max_tokens=9))
    assert parts == [Reasoning("END"), "H", "i "]
    assert result.text == "Hi "
    assert not llm.queue


@pytest.mark.parametrize("on_cpu", [False, True])
def test_texts_are_encoded_by_fastokens_where_a_gpu_waits_for_prompts(load, monkeypatch, qwen3_tokenizer, on_cpu):
    hastened: list[Any] = []
    monkeypatch.setattr(generation, "on_cpu", lambda: on_cpu)
    monkeypatch.setattr(TextEncoder, "hasten", lambda encoder: hastened.append(encoder))
    load()
    assert hastened == ([] if on_cpu else [text_encoder(qwen3_tokenizer)])


def test_a_batch_has_its_answers_in_order_whatever_finishes_first(load):
    model, llm = load()
    rows = [row("first", 5), row("second", 1, history=[["1", "2"]]), row("third", 3, system="S")]
    results = model.chat_batch(rows)
    assert [result.text for result in results] == ["abcde", "a", "abc"]
    assert results[1].history == [("1", "2"), ("second", "a")]
    assert [result.completion_tokens for result in results] == [5, 1, 3]
    assert rows[1] == row("second", 1, history=[["1", "2"]])
    assert {request.params.output_kind.name for request in llm.requests.values()} == {"FINAL_ONLY"}
    assert "system\nS<|im_end|>" in llm.requests["2"].prompt


def test_the_engine_stays_full_while_rows_are_left(load):
    model, llm = load(max_num_seqs=4)
    results = list(model.stream_batch([row(tokens=1 + i * 7 % 5) for i in range(50)], deltas=False))
    assert sorted(i for i, _ in results) == list(range(50))
    full = [running == 4 for running in llm.ran]
    assert all(full[:-5])  # the longest answer has five tokens
    assert not llm.queue


def test_rows_are_drawn_as_the_engine_has_room(load):
    model, _ = load(max_num_seqs=4)
    drawn = 0

    def rows() -> Iterator[dict[str, Any]]:
        nonlocal drawn
        for drawn in range(1, 1001):
            yield row(tokens=1 + drawn % 3)

    for finished, _ in enumerate(model.stream_batch(rows(), deltas=False)):
        assert drawn - finished <= 8
    assert finished == 999


def test_streamed_answers_grow_side_by_side(load):
    model, _ = load()
    parts = list(model.stream_batch([row(tokens=3), row(tokens=2)]))
    assert [(i, part) for i, part in parts if isinstance(part, str)] == [
        (0, "a"),
        (1, "a"),
        (0, "b"),
        (1, "b"),
        (0, "c"),
    ]
    assert {i: part.text for i, part in parts if not isinstance(part, str)} == {0: "abc", 1: "ab"}


@pytest.mark.parametrize("tokens", [3, 9])
def test_thoughts_stand_apart_from_the_text(load, tokens):
    model, llm = load()
    llm.says = ["<think>", "Hm", ".", "\n", "</think>", "\n\n", "Hel", "lo", "!"]
    *parts, result = model.stream_chat("?", [("1", "2")], sampling=Sampling(max_tokens=tokens))
    text = "Hello!" if tokens == 9 else ""
    assert [part.text for part in parts if isinstance(part, Reasoning)] == ["Hm", "."]
    assert "".join(part for part in parts if isinstance(part, str)) == result.text == text
    assert (result.reasoning, result.history) == ("Hm.", [("1", "2"), ("?", text)])
    assert result.usage == {"prompt_tokens": 81, "completion_tokens": tokens, "reasoning_tokens": min(tokens - 1, 3)}
    rows = [row(tokens=tokens, history=[["1", "2"]]), row(tokens=4, enable_thinking=False)]
    whole, unthinking = model.chat_batch(rows)
    assert whole == result
    assert (unthinking.text, unthinking.reasoning) == ("<think>Hm.\n", "")  # the prompt has closed the thought


def test_a_model_that_reads_earlier_reasoning_is_handed_it(load):
    model, llm = load(byte_tokenizer(QWEN38))
    assert model.reasoning_efforts == ["low", "medium", "xhigh"]
    llm.says = ["Hm", "</think>", "\n\n", "Hi"]
    history = [["1", "2", "One and one."], ["3", "4"]]
    rows = [
        row(tokens=4, history=history, reasoning_effort="low", thinking_budget=2),
        row(reasoning_effort="high"),
        row(thinking_budget=4),
        row(history=[["1", "2", 3]]),
    ]
    (_, result), *bad = sorted(model.stream_batch(rows, deltas=False))
    assert result.history == [("1", "2", "One and one."), ("3", "4"), ("?", "Hi", "Hm")]
    (request,) = llm.requests.values()
    assert "with the effort low." in request.prompt
    assert "<think>\nOne and one.\n</think>\n\n2<|im_end|>" in request.prompt
    assert "<think>\n\n</think>\n\n4<|im_end|>" in request.prompt
    assert request.params.thinking_token_budget == 2
    assert [error.param for _, error in bad] == ["reasoning_effort", "thinking_budget", "history.0.2"]


def test_options_of_the_chat_template(load):
    model, llm = load(byte_tokenizer(QWEN36), chat_template_options={"preserve_thinking": True})
    model.chat_batch([row(history=[["1", "2", "One and one."]])])
    assert "<think>\nOne and one.\n</think>" in llm.requests["0"].prompt


def test_a_model_that_does_not_think_takes_no_budget_and_no_effort(load, demo_tokenizer):
    model, _ = load(demo_tokenizer)
    assert model.reasoning_efforts == []
    bad = dict(model.stream_batch([row(thinking_budget=1), row(reasoning_effort="low")], deltas=False))
    assert [error.param for error in bad.values()] == ["thinking_budget", "reasoning_effort"]


def test_a_bad_row_has_its_error_and_the_others_their_answers(load):
    model, llm = load()
    bad = [
        row(" "),
        row(temperature="hot"),
        row(unknown=1),
        row(sampling=5),
        row(history={1}),
        row(tokens=4000),
        row("word " * 2000),
        row(model="adapter"),
        row("too strange"),
        row("gives up"),
    ]
    results = dict(model.stream_batch([row("good", 1), *bad, row("good", 2)], deltas=False))
    assert (results.pop(0).text, results.pop(11).text) == ("a", "ab")
    assert [results[i].message[:20] for i in range(1, 11)] == [
        "query: must not be b",
        "temperature: Input s",
        "unknown: Extra input",
        "sampling: must be an",
        "history.0: Input sho",
        "max_tokens: must be ",
        "system and query tak",
        "model: there is no s",
        "too strange for the ",
        "the engine gave this",
    ]
    assert not llm.queue and not llm.aborted


def test_a_whole_batch_with_a_bad_row_is_refused_before_anything_runs(load):
    model, llm = load()
    with pytest.raises(ChatError, match="row 1: query: must not be blank"):
        model.chat_batch([row(), row("")])
    assert not llm.requests
    assert model.chat_batch([]) == []


def test_a_row_chooses_its_adapter(load, tmp_path):
    model, llm = load(adapters={"poet": str(write_adapter(tmp_path / "poet"))})
    results = dict(model.stream_batch([row(model="poet"), row(), row(model="lawyer")], deltas=False))
    adapters = [request.adapter for request in llm.requests.values()]
    assert [adapter and (adapter.lora_name, adapter.lora_path) for adapter in adapters] == [
        ("poet", str(tmp_path / "poet")),
        None,
    ]
    assert results[2].message == "model: there is no such LoRA adapter (poet)"


def test_sampling_of_the_row_goes_before_that_of_the_batch(load):
    model, llm = load()
    rows = [{"query": "1"}, row("2", 4), row("3", 4, sampling={"max_tokens": 5}), row("4", sampling=Sampling(seed=7))]
    model.chat_batch(rows, Sampling(max_tokens=2, top_p=0.5))
    params = [request.params for request in llm.requests.values()]
    assert [(p.max_tokens, p.top_p, p.seed) for p in params] == [
        (2, 0.5, None),
        (4, 0.5, None),
        (5, 0.5, None),
        (3, 0.5, 7),
    ]


def test_a_closed_batch_leaves_the_engine_empty(load):
    model, llm = load()
    beside = model.stream_chat("beside", sampling=Sampling(max_tokens=9))
    assert next(beside) == "a"
    batch = model.stream_batch(row(tokens=100) for _ in range(20))
    next(batch)
    batch.close()
    assert len(llm.aborted) == 8
    assert "".join(part for part in beside if isinstance(part, str)) == "bcdefghi"
    assert not llm.queue


def test_rows_that_raise_end_the_batch_and_leave_the_engine_empty(load):
    model, llm = load()

    def rows() -> Iterator[dict[str, Any]]:
        yield row()
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        list(model.stream_batch(rows()))
    assert not llm.queue


def test_a_dead_engine_is_said_once_and_not_used_again(load):
    model, llm = load()
    llm.fails = {2: RuntimeError("out of memory\nat line 5")}
    results = []
    with pytest.raises(ChatError, match=r"the engine has died \(out of memory\): leave") as death:
        results.extend(part for part in model.stream_batch([row(tokens=1), row(tokens=9)], deltas=False))
    assert death.value.type == "engine_error"
    assert not llm.aborted
    llm.fails = {}
    with pytest.raises(ChatError, match="has died"):
        model.chat("?")


def test_raw_texts_are_completed_even_where_there_is_no_chat(load, qwen3_tokenizer):
    qwen3_tokenizer.chat_template, template = None, qwen3_tokenizer.chat_template
    try:
        model, llm = load(context=64)
    finally:
        qwen3_tokenizer.chat_template = template
    assert "no chat template" in model.no_chat.message
    with pytest.raises(ChatError, match="no chat template"):
        model.chat("?")
    texts = ["Once <|im_end|>", "upon"]
    assert model.complete_batch(texts, Sampling(max_tokens=2, enable_thinking=True)) == ["ab", "ab"]
    assert [request.prompt for request in llm.requests.values()] == texts
    with pytest.raises(ChatError, match="row 1: prompt takes 64 tokens, the context is 64"):
        model.complete_batch(["a", "b" * 64])


def test_a_template_of_the_users_goes_before_the_models_own(load, tmp_path):
    file = tmp_path / "mine.jinja"
    marks = "{% for m in messages %}<|im_start|>{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}<|im_start|>bot: "
    file.write_text(marks)
    for template in (str(file), marks):
        model, llm = load(chat_template=template)
        model.chat("Hi", system="S")
        assert (
            llm.requests["0"].prompt == "<|im_start|>system: S<|im_end|><|im_start|>user: Hi<|im_end|><|im_start|>bot: "
        )
    with pytest.raises(ModelUnavailable, match="neither a file"):
        load(chat_template=str(tmp_path / "none.jinja"))
