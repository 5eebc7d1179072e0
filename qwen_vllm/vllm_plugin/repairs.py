"""Repairs of vLLM that are too short for a module of their own, and the probes that show a fault.

`patches.py` lists and applies them, and says why.
"""

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def slot_minus_one_computes() -> bool:
    """Tell whether a token without an adapter (slot -1) gets the product with the last adapter."""
    import torch
    from vllm.lora.ops.torch_ops import lora_ops

    outputs = torch.zeros(1, 1)
    lora_ops.bgmv_shrink(torch.ones(1, 2), torch.ones(2, 1, 2), outputs, torch.tensor([-1]))
    return bool(outputs.any())


def shrink_own_slots(shrink: Callable[..., None]) -> Callable[..., None]:
    """Leave a token without an adapter as it is."""

    def shrink_own(
        inputs: "torch.Tensor",
        weights: "torch.Tensor",
        outputs: "torch.Tensor",
        slots: "torch.Tensor",
        scaling: float = 1.0,
    ) -> None:
        shrink(inputs, weights, outputs, slots, scaling)
        outputs[slots < 0] = 0

    return shrink_own


def keeps_budget_of_the_gone() -> bool:
    """Tell whether a request that moves into a slot gets the thinking budget of the one that was there."""
    import torch
    from vllm.v1.sample import thinking_budget_state
    from vllm.v1.sample.logits_processor.interface import BatchUpdate, MoveDirectionality

    tags = SimpleNamespace(reasoning_start_token_ids=[1], reasoning_end_token_ids=[2])
    holder = thinking_budget_state.ThinkingBudgetStateHolder(tags, 2, 0, torch.device("cpu"), False)
    params = SimpleNamespace(thinking_token_budget=1)
    holder.sync_batch(BatchUpdate(2, removed=[], added=[(0, params, [], [])], moved=[]))
    holder.sync_batch(BatchUpdate(1, removed=[], added=[], moved=[(1, 0, MoveDirectionality.UNIDIRECTIONAL)]))
    return holder.has_tracked_requests()


def forget_budget_of_the_gone(holder: Any) -> Any:
    """Give a slot's budget up where a request without one moves into it."""
    from vllm.v1.sample.logits_processor.interface import BatchUpdate, MoveDirectionality

    class ForgettingHolder(holder):
        def sync_batch(self, batch_update: BatchUpdate | None) -> None:
            for _, slot, direction in batch_update.moved if batch_update else ():
                if direction is MoveDirectionality.UNIDIRECTIONAL:
                    self._state.pop(slot, None)
            super().sync_batch(batch_update)

    return ForgettingHolder


def tells_of_the_limit(generate: Callable[..., Any]) -> Callable[..., Any]:
    """Say `length` of each answer that the token limit cut, also where it has calls."""

    async def chat_completion_full_generator(self: Any, request: Any, outputs: Any, *args: Any, **kwargs: Any) -> Any:
        cut: set[int] = set()

        async def watched() -> Any:
            async for output in outputs:
                cut.update(answer.index for answer in output.outputs if answer.finish_reason == "length")
                yield output

        response = await generate(self, request, watched(), *args, **kwargs)
        for choice in getattr(response, "choices", ()):
            if choice.index in cut:
                choice.finish_reason = "length"
        return response

    return chat_completion_full_generator


def hands_token_ids_on(parse: Callable[..., Any]) -> Callable[..., Any]:
    """Give the reasoning parser the answer's token ids."""

    def parse_by_token_ids(
        self: Any, text: str, request: Any, enable_auto_tools: bool = False, model_output_token_ids: Sequence[int] = ()
    ) -> Any:
        if engine := getattr(self._reasoning_parser, "_parser_engine", None):
            engine.answer_ids = [*model_output_token_ids]  # `reasoning_parsers.ByTokenIds` reads them
        return parse(self, text, request, enable_auto_tools, model_output_token_ids)

    return parse_by_token_ids
