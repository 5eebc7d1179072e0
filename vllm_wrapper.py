"""`ChatModel`: chat with a model in this process, on vLLM's synchronous engine, without any server."""

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
from qwen_vllm.generation import RequestBuilder, RunningAnswer, hasten, sampling_defaults
from qwen_vllm.hardware import engine_defaults, set_environment, values
from qwen_vllm.models.checks import ModelUnavailable
from qwen_vllm.models.prepare import prepare, read_chat_template
from qwen_vllm.models.resolve import resolve_model, resolve_parts
from qwen_vllm.offline.tools import Calls, ToolRequests
from qwen_vllm.protocol import (
    DEFAULT_SYSTEM,
    PROMPT_FIELDS,
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
from qwen_vllm.reasoning import ReasoningSplitter
from qwen_vllm.vllm_plugin import plugin

if TYPE_CHECKING:
    from vllm import RequestOutput, SamplingParams

Row = Mapping[str, Any]
"""The fields of a `ChatRequest`, by name, or `messages` and more as `ToolRequests.build` takes them.

Sampling parameters may stand apart in `sampling`.
"""


class ChatModel:
    """A loaded model.

    Args:
        model: a local folder or a hub id; None: the demo model.
        hub: "modelscope" or "huggingface", where an id is fetched from: of the model, of `tokenizer`, and of the
            model in `speculative_config`.
        adapters: folders of LoRA adapters by the names under which a row's `model` chooses them.
        chat_template: a file with the Jinja template to take in place of the model's own, or its text.
        chat_template_options: what the template is given beside the messages, such as `{"preserve_thinking": True}`.
        engine_args: any of `vllm.EngineArgs`, over our defaults for this hardware.

    Attributes:
        llm: vLLM's own `LLM`.
        adapters: the LoRA adapters by their names.

    Raises:
        ModelUnavailable: the model cannot be had.
    """

    def __init__(
        self,
        model: str | None = None,
        hub: str = "modelscope",
        adapters: Mapping[str, str] | None = None,
        chat_template: str | None = None,
        chat_template_options: Mapping[str, Any] | None = None,
        **engine_args: Any,
    ) -> None:
        adapters, options = adapters or {}, chat_template_options or {}
        folder = resolve_model(model, hub, engine_args.get("revision"), engine_args.get("download_dir"))
        resolve_parts(engine_args, hub)
        set_environment()
        from vllm import LLM, EngineArgs, envs
        from vllm.lora.request import LoRARequest

        if envs.VLLM_ENABLE_V1_MULTIPROCESSING and not plugin.is_installed():
            raise ModelUnavailable("qwen-vllm is not installed here yet: pip install --no-deps -e .")
        plugin.begin_ours()
        # As in the server: the one that bounds its work, and for which our grammars are written.
        grammars = {"structured_outputs_config": {"backend": "guidance"}}
        engine_args = {**values(engine_defaults()), **grammars, **engine_args, "model": folder}
        engine_args |= {"enable_lora": True} if adapters else {}
        args = EngineArgs(**engine_args)
        template = prepare(args, adapters, chat_template, options)
        prepared = ("tokenizer", "dtype", "language_model_only", "max_cudagraph_capture_size", "reasoning_parser")
        engine_args |= {name: getattr(args, name) for name in (*prepared, "override_generation_config")}
        with _children_without_interrupts():
            self.llm = LLM(**engine_args)
        self.adapters = {name: LoRARequest(name, i, path) for i, (name, path) in enumerate(adapters.items(), start=1)}
        self._engine = self.llm.llm_engine
        self._requests: RequestBuilder | ChatError
        self._tool_requests: ToolRequests | None = None
        try:
            self._requests = RequestBuilder(
                self.llm.model_config, self.llm.get_tokenizer(), template, options, args.reasoning_parser
            )
            own_template = read_chat_template(chat_template)
            self._tool_requests = ToolRequests(self._requests, self._engine.renderer, own_template, options)
        except ChatError as reason:
            self._requests = reason
        hasten(self.llm.get_tokenizer())
        # Queue twice `max_num_seqs`, so that the engine always has a request ready.
        self._window = 2 * self._engine.vllm_config.scheduler_config.max_num_seqs
        self._ids = map(str, count())
        self._outputs: dict[str, deque[RequestOutput]] = {}
        self._death: ChatError | None = None

    @property
    def no_chat(self) -> ChatError | None:
        """Why the model has only `complete_batch`: the prompt builder cannot follow its chat template. Else None."""
        return self._requests if isinstance(self._requests, ChatError) else None

    @property
    def reasoning_efforts(self) -> list[str]:
        """The levels of `reasoning_effort` that the chat template knows, from the least."""
        return [] if isinstance(self._requests, ChatError) else list(self._requests.prompts.efforts)

    def chat(
        self,
        query: str,
        history: Sequence[Turn] | None = None,
        system: str | None = DEFAULT_SYSTEM,
        sampling: Sampling | None = None,
    ) -> ChatResult:
        """The whole answer to `query`. The caller's `history` is not changed; the result holds the new one.

        Raises:
            ChatError: the request is not valid, or longer than the context.
        """
        *_, result = self.stream_chat(query, history, system, sampling)
        assert isinstance(result, ChatResult)
        return result

    def stream_chat(
        self,
        query: str,
        history: Sequence[Turn] | None = None,
        system: str | None = DEFAULT_SYSTEM,
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
            rows: each `{"query", "history"?, "system"?, "sampling"?}`; `sampling` is a `Sampling` or a mapping. Or each
                `{"messages", "tools"?, "tool_choice"?, "response_format"?, …}`, in OpenAI's form.
            sampling: for all rows; a row's own goes before it.

        Raises:
            ChatError: a row, which the message names, is not valid; then none is computed.
        """
        running = [self._prepare(i, row, sampling, stream=False) for i, row in enumerate(rows)]
        self._finish(running)
        return [row.result() for row in running if isinstance(row, _RunningRow)]

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
        prepared = (self._prepare(i, row, sampling, stream=deltas) for i, row in enumerate(rows))
        for row, reasoning, text in self._run(prepared):
            if deltas and reasoning:
                yield row.number, Reasoning(reasoning)
            if deltas and text:
                yield row.number, text
            if row.error:
                yield row.number, row.error
            elif isinstance(row, _RunningRow) and row.answer.finish_reason:
                yield row.number, row.result()

    def complete_batch(self, prompts: Iterable[str], sampling: Sampling | None = None) -> list[str]:
        """What the model writes on after each raw text, computed together, in order; for base models.

        There are no roles and no template here: a text may spell control tokens, and they count.

        Raises:
            ChatError: a prompt, which the message names, leaves no room in the context; then none is computed.
        """
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        config, tokenizer = self.llm.model_config, self.llm.get_tokenizer()
        wanted = sampling_defaults(config.max_model_len, config.get_diff_sampling_param())
        wanted |= sampling.sampling(exclude=PROMPT_FIELDS | {"thinking_budget"}) if sampling else {}
        params = SamplingParams(**wanted, output_kind=RequestOutputKind.FINAL_ONLY)
        running = []
        for i, text in enumerate(prompts):
            prompt = Prompt(tokenizer.encode(text), 0)
            row = _RunningRow(i, params, RunningAnswer(prompt, ReasoningSplitter(None, ""), False))
            if len(prompt.token_ids) >= config.max_model_len:
                row.error = ChatError(
                    f"prompt takes {len(prompt.token_ids)} tokens, the context is {config.max_model_len}"
                )
            running.append(row)
        self._finish(running)
        return [row.text for row in running]

    def _prepare(self, number: int, row: Row, sampling: Sampling | None, stream: bool) -> "_RunningRow | _BadRow":
        """Make ready what the engine takes for a row; or its error, where the row is not valid."""
        try:
            if isinstance(self._requests, ChatError):
                raise self._requests
            fields, calls = _fields(row, sampling), None
            request: Sampling
            if "messages" in fields:
                assert self._tool_requests
                request, prompt, params, calls = self._tool_requests.build(fields, stream)
            else:
                request = validated(ChatRequest, fields)
                prompt, params = self._requests.build(request, stream)
            if request.model and request.model not in self.adapters:
                names = ", ".join(self.adapters) or "none is loaded"
                raise ChatError(f"model: there is no such LoRA adapter ({names})", param="model")
            return _RunningRow(number, params, self._requests.answer(prompt, request), request, calls)
        except ChatError as error:
            return _BadRow(number, error)

    def _finish(self, rows: Sequence["_RunningRow | _BadRow"]) -> None:
        """Have all rows answered; none if one has an error already.

        Raises:
            ChatError: the first error; the message names the row.
        """
        for row in chain(rows, (row for row, *_ in self._run(rows))):
            if row.error:
                error = row.error
                raise ChatError(f"row {row.number}: {error.message}", error.type, error.param, error.status)

    def _run(self, rows: Iterable["_RunningRow | _BadRow"]) -> Iterator[tuple["_RunningRow | _BadRow", str, str]]:
        """Drive the engine until all rows have finished.

        Yields each row whose answer has grown, with its new reasoning and its new text, and at once each that has an
        error. What the engine yields for others is kept for them.
        """
        source = iter(rows)
        running: dict[str, _RunningRow] = {}
        mine: deque[RequestOutput] = deque()
        try:
            while True:
                while len(running) < self._window and (new := next(source, None)):
                    if isinstance(new, _RunningRow) and not new.error:
                        self._add(new, running, mine)
                    if new.error:
                        yield new, "", ""
                if not running:
                    return
                while not mine:
                    self._step()
                while mine:
                    output = mine.popleft()
                    row = running.get(output.request_id)
                    if not row:
                        continue  # a stop word has ended it
                    parts = row.add(output)
                    if row.answer.stopped:
                        self._engine.abort_request([output.request_id])
                    if output.finished or row.answer.stopped:
                        del running[output.request_id], self._outputs[output.request_id]
                    yield row, *parts
        finally:
            if running and not self._death:
                self._engine.abort_request(list(running))
            for request_id in running:
                del self._outputs[request_id]

    def _add(self, row: "_RunningRow", running: dict[str, "_RunningRow"], outputs: deque["RequestOutput"]) -> None:
        """Hand a row to the engine; its outputs will go to `outputs`."""
        from vllm.exceptions import VLLMClientError

        with _uninterrupted(), self._engine_errors():
            request_id = next(self._ids)
            try:
                prompt = {"prompt_token_ids": row.answer.prompt.token_ids}
                adapter = self.adapters.get(row.request.model or "") if row.request else None
                self._engine.add_request(request_id, prompt, row.params, lora_request=adapter)
            except (ValueError, VLLMClientError) as error:
                held = row.params.structured_outputs
                field = None if held is None else "tools" if held.grammar else "response_format"
                row.error = ChatError(f"{field}: {error}"[:300] if field else str(error)[:300], param=field)
            else:
                running[request_id], self._outputs[request_id] = row, outputs

    def _step(self) -> None:
        """Let the engine compute one step, and hand what came to those who wait for it."""
        with _uninterrupted(), self._engine_errors():
            for output in self._engine.step():
                self._outputs[output.request_id].append(output)

    @contextmanager
    def _engine_errors(self) -> Iterator[None]:
        """Never use the engine again after an exception: nobody knows what state it is in."""
        if self._death:
            raise self._death
        try:
            yield
        except Exception as error:
            message = f"the engine has died ({reason_of(error)}): leave, and start again"
            self._death = ChatError(message, "engine_error", status=500)
            raise self._death from error


@dataclass
class _BadRow:
    """A row that is no valid request."""

    number: int
    error: ChatError


@dataclass
class _RunningRow:
    """A row while it is answered. `request` is None for a raw text; with an `error` it has failed for good.

    `calls` are there for a row in OpenAI's form.
    """

    number: int
    params: "SamplingParams"
    answer: RunningAnswer
    request: Sampling | None = None
    calls: Calls | None = None
    error: ChatError | None = None
    text: str = ""
    reasoning: str = ""

    def add(self, output: "RequestOutput") -> tuple[str, str]:
        """Take in the engine's next output; return (new reasoning, new text)."""
        try:
            reasoning, text = self.answer.add(output.outputs[0])
        except ChatError as error:
            self.error = error
            return "", ""
        if self.calls:
            text = self.calls.take(text, self.answer.finish_reason is not None)
        self.reasoning += reasoning
        self.text += text
        return reasoning, text

    def result(self) -> ChatResult:
        """Return the finished answer to a chat request."""
        if self.calls:
            return self.calls.result(self.answer.result(self.text, self.reasoning))
        assert isinstance(self.request, ChatRequest)
        return self.answer.result(self.text, self.reasoning, self.request.query, self.request.history)


def _fields(row: Row, sampling: Sampling | None) -> dict[str, Any]:
    """Merge a row and its own sampling over the sampling for all rows."""
    fields = {**(sampling.sampling() if sampling else {}), **row}
    own = fields.pop("sampling", None)
    if not isinstance(own, Sampling | Mapping | None):
        raise ChatError("sampling: must be an object", param="sampling")
    return fields | (own.sampling() if isinstance(own, Sampling) else dict(own or {}))


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Hold Ctrl-C back until the block has ended: one inside an engine step would leave the scheduler half updated."""
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
    """Start engine processes in the block that never see Ctrl-C, which is meant for the answer."""
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
