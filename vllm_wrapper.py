"""`ChatModel`: chat with a model in this process, on vLLM's synchronous engine, without any server."""

import json
import os
import signal
import threading
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from multiprocessing import resource_tracker
from typing import TYPE_CHECKING, Any

from model_utils import RequestBuilder, engine_defaults, resolve_model, set_environment
from protocol import DEFAULT_SYSTEM, ChatError, ChatRequest, ChatResult, Sampling, Turn, validated

if TYPE_CHECKING:
    from vllm import RequestOutput


class ChatModel:
    """A loaded model.

    Args:
        model: a local folder or a hub id; None: the demo model.
        hub: "modelscope" or "huggingface", where an id is fetched from.
        engine_args: any of `vllm.EngineArgs`, over our defaults for this hardware.

    Raises:
        ModelUnavailable: the model cannot be had.
        ChatError: it has no chat template that the prompt builder can follow.
    """

    def __init__(self, model: str | None = None, hub: str = "modelscope", **engine_args: Any) -> None:
        folder = resolve_model(model, hub)
        set_environment()
        from vllm import LLM

        with _children_without_interrupts():
            self._llm = LLM(**{**engine_defaults(), **engine_args, "model": folder})
        self._engine = self._llm.llm_engine
        self._requests = RequestBuilder(self._llm.model_config, self._llm.get_tokenizer())
        self._ids = map(str, count())
        self._outputs: defaultdict[str, deque[RequestOutput]] = defaultdict(deque)

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
    ) -> Iterator[str | ChatResult]:
        """Yields the answer to `query`: pieces of text as they come, then one `ChatResult`.

        Closing the generator stops the answer. Several may run at a time, in one thread.

        Raises:
            ChatError: as in `chat`.
        """
        fields = {"query": query, "history": list(history or ()), "system": system}
        fields |= sampling.sampling() if sampling else {}
        prompt, params = self._requests.build(validated(ChatRequest, json.dumps(fields).encode()), stream=True)
        text, completion_tokens = "", 0
        for output in self._generate(prompt.token_ids, params):
            completion = output.outputs[0]
            text += completion.text
            completion_tokens += len(completion.token_ids)
            if completion.text:
                yield completion.text
        yield ChatResult(
            text=text,
            history=[*map(tuple, history or ()), (query, text)],
            finish_reason=completion.finish_reason,
            stop_reason=completion.stop_reason if isinstance(completion.stop_reason, str) else None,
            prompt_tokens=len(prompt.token_ids),
            completion_tokens=completion_tokens,
            dropped_turns=prompt.dropped_turns,
        )

    def _generate(self, token_ids: list[int], params: Any) -> Iterator["RequestOutput"]:
        """Drives the engine until this request has finished; what it yields for others is kept for them."""
        from vllm.v1.engine.exceptions import EngineDeadError

        request_id, finished = next(self._ids), False
        mine = self._outputs[request_id]
        try:
            with _uninterrupted():
                self._engine.add_request(request_id, {"prompt_token_ids": token_ids}, params)
            while not finished:
                while not mine:
                    with _uninterrupted():
                        for output in self._engine.step():
                            self._outputs[output.request_id].append(output)
                output = mine.popleft()
                finished = output.finished
                yield output
        except EngineDeadError as error:
            finished = True
            raise ChatError("the engine has died: leave, and start again", "engine_error", status=500) from error
        finally:
            if not finished:
                self._engine.abort_request([request_id])
            del self._outputs[request_id]


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
