"""`ChatModel`: chat with a model in this process, on vLLM's synchronous engine, without any server."""

import json
import os
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, count
from multiprocessing import resource_tracker
from typing import TYPE_CHECKING, Any

from prompt_utils import Prompt
from qwen_vllm.hardware import engine_defaults, graph_defaults, set_environment, values
from qwen_vllm.models.resolve import (
    RequestBuilder,
    check_adapters,
    check_loadable,
    number_format,
    read_chat_template,
    resolve_model,
    sampling_defaults,
)
from qwen_vllm.protocol import (
    DEFAULT_SYSTEM,
    ChatError,
    ChatRequest,
    ChatResult,
    Part,
    Reasoning,
    Sampling,
    Turn,
    reason_of,
    validated,
)
from qwen_vllm.reasoning import ThoughtSplitter

if TYPE_CHECKING:
    from vllm import CompletionOutput, RequestOutput, SamplingParams

Row = Mapping[str, Any]
"""The fields of a `ChatRequest`, by name; sampling parameters may stand apart in `sampling`."""


class ChatModel:
    """A loaded model.

    Args:
        model: a local folder or a hub id; None: the demo model.
        hub: "modelscope" or "huggingface", where an id is fetched from.
        adapters: folders of LoRA adapters by the names under which a row's `model` chooses them.
        chat_template: a file with the Jinja template to take in place of the model's own, or its text.
        engine_args: any of `vllm.EngineArgs`, over our defaults for this hardware.

    Attributes:
        adapters: the LoRA adapters by their names.
        no_chat: why the model has no chat but only `complete_batch`: it has no chat template that the prompt builder
            can follow. None where it has; else every chat raises it.

    Raises:
        ModelUnavailable: the model cannot be had.
    """

    def __init__(
        self,
        model: str | None = None,
        hub: str = "modelscope",
        adapters: Mapping[str, str] | None = None,
        chat_template: str | None = None,
        **engine_args: Any,
    ) -> None:
        adapters = adapters or {}
        folder = resolve_model(model, hub)
        set_environment()
        from vllm import LLM, EngineArgs
        from vllm.lora.request import LoRARequest

        engine_args = {**values(engine_defaults()), **engine_args, "model": folder}
        engine_args |= {"enable_lora": True} if adapters else {}
        args = EngineArgs(**engine_args)
        check_loadable(args)
        check_adapters(adapters, args)
        self.adapters = {name: LoRARequest(name, i, path) for i, (name, path) in enumerate(adapters.items(), start=1)}
        engine_args["dtype"] = number_format(args)
        template = read_chat_template(chat_template)
        engine_args |= values(graph_defaults(args))
        with _children_without_interrupts():
            self._llm = LLM(**engine_args)
        self._engine = self._llm.llm_engine
        self.no_chat: ChatError | None = None
        try:
            self._requests = RequestBuilder(
                self._llm.model_config,
                self._llm.get_tokenizer(),
                template,
                reasoning_parser=args.reasoning_parser,
            )
        except ChatError as reason:
            self.no_chat = reason
        # As many again as run at once wait in the engine, so that none of its places is empty while a row is prepared.
        self._window = 2 * self._engine.vllm_config.scheduler_config.max_num_seqs
        self._ids = map(str, count())
        self._outputs: dict[str, deque[RequestOutput]] = {}
        self._death: ChatError | None = None

    def chat(
        self,
        query: str,
        history: Sequence[Turn] | None = None,
        system: str = DEFAULT_SYSTEM,
        sampling: Sampling | None = None,
    ) -> ChatResult:
        """The whole answer to `query`. The caller's `history` is not changed; the result holds the new one.

        Raises:
            ChatError: the request is not valid, or longer than the context.
        """
        *_, result = self.stream_chat(query, history, system, sampling)
        return result

    def stream_chat(
        self,
        query: str,
        history: Sequence[Turn] | None = None,
        system: str = DEFAULT_SYSTEM,
        sampling: Sampling | None = None,
    ) -> Iterator[Part]:
        """Yields the answer to `query`: pieces of what the model thinks and of the text, as they come, then one
        `ChatResult`.

        Closing the generator stops the answer. Several may run at a time, in one thread.

        Raises:
            ChatError: as in `chat`.
        """
        row = {"query": query, "history": list(history or ()), "system": system}
        for _, part in self.stream_batch([row], sampling):
            if isinstance(part, ChatError):
                raise part
            yield part

    def chat_batch(self, rows: Iterable[Row], sampling: Sampling | None = None) -> list[ChatResult]:
        """The answers to all `rows`, computed together, in the order of the rows. The caller's objects are not changed.

        Args:
            rows: each `{"query", "history"?, "system"?, "sampling"?}`; `sampling` is a `Sampling` or a mapping.
            sampling: for all rows; a row's own goes before it.

        Raises:
            ChatError: a row, which the message names, is not valid; then none is computed.
        """
        answers = [self._answer(i, row, sampling, stream=False) for i, row in enumerate(rows)]
        self._finish(answers)
        return [answer.result() for answer in answers]

    def stream_batch(
        self, rows: Iterable[Row], sampling: Sampling | None = None, deltas: bool = True
    ) -> Generator[tuple[int, Part | ChatError], None, None]:
        """Answers `rows` together and yields what comes, with the number of its row, from 0: pieces of thoughts and of
        text if `deltas`, and at the end of each row its `ChatResult`, or the `ChatError` that says why it has none.

        Rows are drawn while others are computed, so that the engine is busy and memory bounded: there may be millions.
        Closing the generator stops all answers.

        Raises:
            ChatError: the engine has failed.
        """
        answers = (self._answer(i, row, sampling, stream=deltas) for i, row in enumerate(rows))
        for answer, reasoning, text in self._run(answers):
            if deltas and reasoning:
                yield answer.row, Reasoning(reasoning)
            if deltas and text:
                yield answer.row, text
            if answer.error:
                yield answer.row, answer.error
            elif answer.finish_reason:
                yield answer.row, answer.result()

    def complete_batch(self, prompts: Iterable[str], sampling: Sampling | None = None) -> list[str]:
        """What the model writes on after each raw text, computed together, in order; for base models.

        There are no roles and no template here: a text may spell control tokens, and they count.

        Raises:
            ChatError: a prompt, which the message names, leaves no room in the context; then none is computed.
        """
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        config, tokenizer = self._llm.model_config, self._llm.get_tokenizer()
        wanted = sampling_defaults(config.max_model_len, config.get_diff_sampling_param())
        wanted |= sampling.model_dump(exclude={"model", "enable_thinking"}, exclude_none=True) if sampling else {}
        params = SamplingParams(**wanted, output_kind=RequestOutputKind.FINAL_ONLY)
        answers = [
            Answer(i, Prompt(tokenizer.encode(text), 0), params, splitter=ThoughtSplitter(None, ""))
            for i, text in enumerate(prompts)
        ]
        for answer in answers:
            if len(answer.prompt.token_ids) >= config.max_model_len:
                answer.error = ChatError(
                    f"prompt takes {len(answer.prompt.token_ids)} tokens, the context is {config.max_model_len}"
                )
        self._finish(answers)
        return [answer.text for answer in answers]

    def _answer(self, i: int, row: Row, sampling: Sampling | None, stream: bool) -> "Answer":
        """The answer to a row, still to come; with its error where the row is not valid."""
        try:
            if self.no_chat:
                raise self.no_chat
            request = validated(ChatRequest, _request_body(row, sampling))
            if request.model and request.model not in self.adapters:
                names = ", ".join(self.adapters) or "none is loaded"
                raise ChatError(f"model: there is no such LoRA adapter ({names})", param="model")
            prompt, params = self._requests.build(request, stream)
            return Answer(i, prompt, params, request, self._requests.splitter(prompt))
        except ChatError as error:
            return Answer(i, error=error)

    def _finish(self, answers: list["Answer"]) -> None:
        """Has all answers computed; none if one has an error already.

        Raises:
            ChatError: the first error; the message names the row.
        """
        for answer in chain(answers, (answer for answer, *_ in self._run(answers))):
            if answer.error:
                error = answer.error
                raise ChatError(f"row {answer.row}: {error.message}", error.type, error.param, error.status)

    def _run(self, answers: Iterable["Answer"]) -> Iterator[tuple["Answer", str, str]]:
        """Drives the engine until all answers have finished; yields each that has grown, with what is new of what
        it thinks and says, and at once each that has an error. What the engine yields for others is kept for them.
        """
        source, running = iter(answers), {}
        mine: deque[RequestOutput] = deque()
        try:
            while True:
                while len(running) < self._window and (answer := next(source, None)):
                    if not answer.error:
                        self._add(answer, running, mine)
                    if answer.error:
                        yield answer, "", ""
                if not running:
                    return
                while not mine:
                    self._step()
                while mine:
                    output = mine.popleft()
                    answer = running[output.request_id]
                    if output.finished:
                        del running[output.request_id], self._outputs[output.request_id]
                    yield answer, *answer.add(output.outputs[0])
        finally:
            if running and not self._death:
                self._engine.abort_request(list(running))
            for request_id in running:
                del self._outputs[request_id]

    def _add(self, answer: "Answer", running: dict[str, "Answer"], outputs: deque["RequestOutput"]) -> None:
        """Hands an answer to the engine; its outputs will go to `outputs`."""
        with _uninterrupted(), self._engine_errors():
            request_id = next(self._ids)
            try:
                prompt = {"prompt_token_ids": answer.prompt.token_ids}
                adapter = self.adapters.get(answer.request.model) if answer.request else None
                self._engine.add_request(request_id, prompt, answer.params, lora_request=adapter)
            except ValueError as error:
                answer.error = ChatError(str(error)[:300])
            else:
                running[request_id], self._outputs[request_id] = answer, outputs

    def _step(self) -> None:
        """Lets the engine compute one step, and hands what came to those who wait for it."""
        with _uninterrupted(), self._engine_errors():
            for output in self._engine.step():
                self._outputs[output.request_id].append(output)

    @contextmanager
    def _engine_errors(self) -> Iterator[None]:
        """After an exception nobody knows what state the engine is in: it is not used again."""
        if self._death:
            raise self._death
        try:
            yield
        except Exception as error:
            message = f"the engine has died ({reason_of(error)}): leave, and start again"
            self._death = ChatError(message, "engine_error", status=500)
            raise self._death from error


@dataclass
class Answer:
    """An answer while it comes. `request` is None for a raw text; with an `error` it has failed for good."""

    row: int
    prompt: Prompt | None = None
    params: "SamplingParams | None" = None
    request: ChatRequest | None = None
    splitter: ThoughtSplitter | None = None
    error: ChatError | None = None
    reasoning: str = ""
    text: str = ""
    completion_tokens: int = 0
    finish_reason: str | None = None
    stop_reason: str | None = None

    def add(self, completion: "CompletionOutput") -> tuple[str, str]:
        """Takes in what the engine says is new, and returns what that is of the thought, and of the text."""
        last = completion.finish_reason is not None
        reasoning, text = self.splitter.split(completion.text, completion.token_ids, last)
        self.reasoning += reasoning
        self.text += text
        self.completion_tokens += len(completion.token_ids)
        self.finish_reason = completion.finish_reason
        self.stop_reason = completion.stop_reason if isinstance(completion.stop_reason, str) else None
        if self.finish_reason not in (None, "stop", "length"):
            self.error = ChatError("the engine gave this request up: ask again", "engine_error", status=500)
        return reasoning, text

    def result(self) -> ChatResult:
        """The finished answer to a chat request."""
        return ChatResult(
            text=self.text,
            history=[*self.request.history, (self.request.query, self.text)],
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
            prompt_tokens=len(self.prompt.token_ids),
            completion_tokens=self.completion_tokens,
            dropped_turns=self.prompt.dropped_turns,
            reasoning=self.reasoning,
            reasoning_tokens=self.splitter.tokens,
        )


def _request_body(row: Row, sampling: Sampling | None) -> bytes:
    """A row and the sampling it is to have as JSON, which is validated more strictly than Python's objects can be."""
    fields = {**(sampling.sampling() if sampling else {}), **row}
    own = fields.pop("sampling", None)
    if not isinstance(own, Sampling | Mapping | None):
        raise ChatError("sampling: must be an object", param="sampling")
    fields |= own.sampling() if isinstance(own, Sampling) else own or {}
    try:
        return json.dumps(fields).encode()
    except (TypeError, ValueError) as error:
        raise ChatError(f"not a request: {error}") from error


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Holds Ctrl-C back until the block has ended: one inside an engine step would leave the scheduler half updated."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    pending = []
    handler = signal.signal(signal.SIGINT, lambda *_: pending.append(True))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
    if pending:
        raise KeyboardInterrupt


@contextmanager
def _children_without_interrupts() -> Iterator[None]:
    """Engine processes started in the block never see Ctrl-C, which is meant for the answer and not for them."""
    if os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING") == "0":
        yield
        return
    # Children inherit the blocked signal. The tracker of multiprocessing unblocks it when it starts: start it before.
    resource_tracker.ensure_running()
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
