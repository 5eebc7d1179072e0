"""Two variants of vLLM's Qwen3 reasoning parser: for models that may or may not think, and that always think."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

from tokenizers import decoders
from vllm.parser.engine.adapters import make_adapters
from vllm.parser.engine.events import EventType, SemanticEvent
from vllm.parser.engine.parser_engine_config import ParserEngineConfig, ParserState, Transition
from vllm.parser.qwen3 import CHATML_TURN_BOUNDARIES, Qwen3Parser, qwen3_config

from qwen_vllm.reasoning import END, PARSER, START


class ByTokenIds(Qwen3Parser):
    """Reads a whole answer that spells the reasoning's marks in plain letters token by token, as a streamed one.

    Attributes:
        answer_ids: the token ids of the whole answer that comes next.
    """

    answer_ids: Sequence[int] = ()

    def _feed(self, delta_text: str, delta_token_ids: Sequence[int]) -> list[SemanticEvent]:
        marks = sum(self.answer_ids.count(self.vocab.get(mark)) for mark in (START, END))
        if delta_token_ids or delta_text.count(START) + delta_text.count(END) == marks or not self.answer_ids:
            return super()._feed(delta_text, delta_token_ids)
        return [event for piece in self._pieces(len(delta_text)) for event in super(ByTokenIds, self)._feed(*piece)]

    def _pieces(self, size: int) -> Iterator[tuple[str, list[int]]]:
        """Yield (text, token ids) piece by piece, up to so many characters: a stop word may have cut the text."""
        stream = decoders.DecodeStream(skip_special_tokens=False)
        for token_id in self.answer_ids:
            piece = (stream.step(self.model_tokenizer._tokenizer, token_id) or "")[:size]
            size -= len(piece)
            yield piece, [token_id]


class QwenParser(ByTokenIds):
    """Starts outside the reasoning, which only its tag begins; where the request turns thinking off, nothing does."""

    def __init__(self, tokenizer: Any, tools: Any = None, **kwargs: Any) -> None:
        if (kwargs.get("chat_template_kwargs") or {}).get("enable_thinking", True):
            kwargs["parser_engine_config"] = _config()
        super().__init__(tokenizer, tools, **kwargs)


@cache
def _config() -> ParserEngineConfig:
    theirs = qwen3_config(thinking=False, name=PARSER, turn_boundary_tokens=CHATML_TURN_BOUNDARIES)
    begins = Transition(ParserState.REASONING, (EventType.REASONING_START,))
    transitions = theirs.transitions | {(ParserState.CONTENT, "THINK_START"): begins}
    return replace(theirs, wait_for_reasoning=True, transitions=transitions)


class AlwaysParser(ByTokenIds):
    """Starts in the reasoning, which the prompt has begun, whatever the request says of thinking."""

    def __init__(self, tokenizer: Any, tools: Any = None, **kwargs: Any) -> None:
        super().__init__(tokenizer, tools, **{**kwargs, "chat_template_kwargs": {}})


QwenReasoningParser, _ = make_adapters(QwenParser)
AlwaysReasoningParser, _ = make_adapters(AlwaysParser)
