"""A scripted stand-in for vLLM's engine."""

import asyncio
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

from transformers import PreTrainedTokenizerBase


class ScriptedEngine:
    """Stands in for vLLM's AsyncLLM and records its calls.

    Each call of `generate` plays the next script: a string is a piece of the answer (one token), an exception is
    raised, an event is waited for, `...` waits for ever. A script that ends finishes the answer with `finish`: finish
    and stop reason.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *scripts: list[Any],
        finish: tuple[str, str | int | None] = ("stop", None),
        context: int = 2048,
        configured: dict[str, Any] | None = None,
        engines: int = 1,
    ) -> None:
        self._tokenizer, self._scripts, self._finish = tokenizer, list(scripts), finish
        self.model_config = SimpleNamespace(
            max_model_len=context,
            multimodal_config=None,
            get_diff_sampling_param=lambda: dict(configured or {}),
        )
        self.vllm_config = SimpleNamespace(
            parallel_config=SimpleNamespace(data_parallel_size=engines, local_engines_only=False),
            scheduler_config=SimpleNamespace(max_num_seqs=2),
        )
        self.output_processor, self.engine_core = SimpleNamespace(request_states={}), SimpleNamespace(client_count=1)
        self.calls: list[SimpleNamespace] = []

    def get_tokenizer(self) -> PreTrainedTokenizerBase:
        return self._tokenizer

    async def generate(
        self,
        prompt: dict[str, Any],
        params: Any,
        request_id: str,
        *,
        lora_request: Any = None,
        data_parallel_rank: int | None = None,
    ) -> AsyncIterator[SimpleNamespace]:
        call = SimpleNamespace(
            prompt=self._tokenizer.decode(prompt["prompt_token_ids"]),
            token_ids=prompt["prompt_token_ids"],
            params=params,
            request_id=request_id,
            lora_request=lora_request,
            engine=data_parallel_rank,
            aborted=False,
        )
        self.calls.append(call)
        pieces = []
        try:
            for step in self._scripts.pop(0):
                if isinstance(step, Exception):
                    raise step
                if step is ...:
                    await asyncio.Event().wait()
                if isinstance(step, asyncio.Event):
                    await step.wait()
                    continue
                pieces.append(step)
                if params.output_kind.name == "DELTA":
                    yield self._output([step])
        except (asyncio.CancelledError, GeneratorExit):
            call.aborted = True
            raise
        yield self._output([""] if params.output_kind.name == "DELTA" else [*pieces, ""], self._finish)

    def _output(self, pieces: list[str], finish: tuple[str | None, str | int | None] = (None, None)) -> SimpleNamespace:
        token_ids = [self._tokenizer.get_vocab().get(piece, 0) for piece in pieces]
        completion = SimpleNamespace(
            text="".join(pieces), token_ids=token_ids, finish_reason=finish[0], stop_reason=finish[1]
        )
        return SimpleNamespace(outputs=[completion], finished=finish[0] is not None)
