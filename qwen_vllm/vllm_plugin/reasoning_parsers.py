"""Two variants of vLLM's Qwen3 reasoning parser: for models that may or may not think, and that always think."""

from dataclasses import replace
from functools import cache
from typing import Any

from vllm.parser.engine.adapters import make_adapters
from vllm.parser.engine.events import EventType
from vllm.parser.engine.parser_engine_config import ParserEngineConfig, ParserState, Transition
from vllm.parser.qwen3 import CHATML_TURN_BOUNDARIES, Qwen3Parser, qwen3_config

from qwen_vllm.reasoning import PARSER


class QwenParser(Qwen3Parser):
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


class AlwaysParser(Qwen3Parser):
    """Starts in the reasoning, which the prompt has begun, whatever the request says of thinking."""

    def __init__(self, tokenizer: Any, tools: Any = None, **kwargs: Any) -> None:
        super().__init__(tokenizer, tools, **{**kwargs, "chat_template_kwargs": {}})


QwenReasoningParser, _ = make_adapters(QwenParser)
AlwaysReasoningParser, _ = make_adapters(AlwaysParser)
