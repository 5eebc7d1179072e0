"""Defines a chat request, its answer and its errors.

The server, its clients and the offline engine share these types. Of HTTP this module knows only the status code of an
error. It knows nothing of terminals or vLLM and imports nothing of the project.
"""

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Annotated, Any, TypeVar

from pydantic import (
    AliasChoices,
    BaseModel,
    ConfigDict,
    FailFast,
    Field,
    Strict,
    StrictStr,
    StringConstraints,
    ValidationError,
    field_validator,
)

DEFAULT_SYSTEM = "You are a helpful assistant."

Turn = tuple[str, ...]
"""One finished exchange: (user, assistant) or (user, assistant, reasoning)."""
RequestTurn = Annotated[tuple[StrictStr, ...], Field(min_length=2, max_length=3), Strict(False)]
"""The same in a request, where it may be a list, as JSON has it."""

PROMPT_FIELDS = frozenset({"model", "enable_thinking", "reasoning_effort"})
"""The fields of `Sampling` that choose the model and its prompt; the others are for the engine's sampler."""
StopWord = Annotated[str, StringConstraints(min_length=1, max_length=256)]
INT32_MAX, INT64_MAX = 2**31 - 1, 2**63 - 1


class ChatError(Exception):
    """Says why a request got no answer, or only a part of one.

    `message` is for the user. `status` is the HTTP status. `retry_after`: seconds until a busy server can be asked.

    type                status
    invalid_request     400, 404, 408, 413,       the request must change; `param` names the field
                        415, 431
    unauthorized        401, 403                  the key is missing or wrong, or not for this
    limited             429                       a limit of the key is reached; `param` names it
    overloaded          503                       the queue is full or the server stops: try again in a moment
    engine_error        500, 503                  the engine failed or is shutting down
    unreachable         –                         client only: no server answered
    incomplete          –                         client only: the answer broke off
    """

    def __init__(
        self,
        message: str,
        type: str = "invalid_request",
        param: str | None = None,
        status: int = 400,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.message, self.type, self.param, self.status, self.retry_after = message, type, param, status, retry_after

    def as_dict(self) -> dict[str, Any]:
        """Return the wire form, `{"error": {"type", "message", "param"}}`."""
        return {"error": {"type": self.type, "message": self.message, "param": self.param}}


class Sampling(BaseModel):
    """Holds the sampling parameters; None: the default of the server or the model."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    max_tokens: int | None = Field(None, ge=1, le=INT32_MAX)
    """most tokens in the answer"""
    temperature: float | None = Field(None, ge=0, le=2)
    """0 always picks the likeliest token"""
    top_p: float | None = Field(None, gt=0, le=1)
    """sample from the likeliest tokens that reach this probability together"""
    top_k: int | None = Field(None, ge=-1, le=INT32_MAX)
    """sample from this many likeliest tokens; 0 or -1: from all"""
    min_p: float | None = Field(None, ge=0, le=1)
    """least probability of a token, relative to the likeliest"""
    repetition_penalty: float | None = Field(None, ge=0.1, le=10)
    """above 1 discourages tokens of the prompt and the answer"""
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    """above 0 discourages tokens already in the answer"""
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    """the same, growing with each repetition"""
    seed: int | None = Field(None, ge=0, le=INT64_MAX)
    """makes sampling repeatable"""
    stop: list[StopWord] | None = Field(None, max_length=32, validation_alias=AliasChoices("stop", "user_stop_words"))
    """words that end the answer and are not part of it"""
    model: str | None = Field(None, min_length=1, max_length=256)
    """name of the model or of a LoRA adapter"""
    enable_thinking: bool | None = None
    """let a model that can think (Qwen3) do so, or not"""
    reasoning_effort: str | None = Field(None, min_length=1, max_length=32)
    """how much a model thinks that has levels for it (Qwen3.8: low, medium, xhigh)"""
    thinking_budget: int | None = Field(None, ge=1, le=INT32_MAX)
    """most tokens of reasoning, included in max_tokens; then the answer comes"""

    def sampling(self, exclude: Set[str] = frozenset()) -> dict[str, Any]:
        """Return the sampling parameters that are not None, by name."""
        return self.model_dump(include=Sampling.model_fields.keys() - exclude, exclude_none=True)


class ChatRequest(Sampling):
    """Holds the body of `POST /chat`. Unknown fields and wrong types are refused."""

    query: str
    """what the user says now"""
    history: Annotated[list[RequestTurn], FailFast(), Strict(False)] = []
    """earlier turns, oldest first: [[user, assistant], …], or [user, assistant, reasoning] for a model that reads it"""
    system: str | None = DEFAULT_SYSTEM
    """how the model should behave; null: no system message"""
    stream: bool = False
    """answer piece by piece, as newline-delimited JSON"""
    keep_alive: bool = False
    """in a stream, a line each 15 s until the first token: the place in the queue"""

    @field_validator("query")
    @classmethod
    def _not_blank(cls, query: str) -> str:
        if not query.strip():
            raise ValueError("must not be blank")
        return query


@dataclass(frozen=True)
class Reasoning:
    """Holds a piece of the reasoning; not a str, or it would be taken for the answer."""

    text: str


@dataclass(frozen=True)
class ChatResult:
    """Holds a finished answer.

    `history` ends with this turn, ready for the next request; the turn has its reasoning where the chat template keeps
    that. `finish_reason` is "stop" or "length". `stop_reason` is the stop word that matched, or None. `dropped_turns`
    counts the oldest turns, which were left out to fit the context; `dropped_reasoning` counts those of the others
    whose reasoning was. `reasoning_tokens` are included in `completion_tokens`. `tool_calls` are in OpenAI's form; a
    call that the token limit has cut has its arguments as far as they came.
    """

    text: str
    history: list[Turn]
    finish_reason: str
    stop_reason: str | None
    prompt_tokens: int
    completion_tokens: int
    dropped_turns: int
    reasoning: str = ""
    reasoning_tokens: int = 0
    dropped_reasoning: int = 0
    tool_calls: list[dict[str, Any]] = field(default_factory=list)

    @property
    def kept_reasoning(self) -> str:
        """The reasoning to send along with this turn; an answer without history leaves that to the server."""
        return "".join(self.history[-1][2:]) if self.history else self.reasoning

    @property
    def ended_in_reasoning(self) -> bool:
        """Whether the token limit came before the answer began."""
        return self.finish_reason == "length" and bool(self.reasoning) and not self.text.strip()

    @property
    def usage(self) -> dict[str, int]:
        """Return the token counts in their wire form."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "reasoning_tokens": self.reasoning_tokens,
        }


Part = Reasoning | str | ChatResult
"""What a stream yields: `Reasoning` and str pieces, then one `ChatResult`."""


@dataclass(frozen=True)
class Question:
    """Holds what a user asks, with its images as data URLs."""

    text: str
    images: tuple[str, ...] = ()


AskedTurn = tuple[Question, str, str]
"""A turn whose question may have images: (question, answer, reasoning or "")."""


def text_turns(history: Sequence[AskedTurn]) -> list[Turn]:
    """Return the turns without their images."""
    return [turn(question.text, answer, reasoning) for question, answer, reasoning in history]


def turn(user: str, assistant: str, reasoning: str) -> Turn:
    """Make a turn, without reasoning where that is empty."""
    return (user, assistant, reasoning) if reasoning else (user, assistant)


def turns_to_drop(least: int, most: int) -> int:
    """Choose how many of the oldest turns to drop: the number from `least` to `most` with the highest power of two.

    Both grow with the conversation, but this number stays the same for many turns. So the prompts of these turns begin
    alike, and the engine's prefix cache holds what they share.
    """
    while most > least and most & (most - 1) >= least:
        most &= most - 1
    return most


@dataclass(frozen=True)
class ServerInfo:
    """Describes a server.

    `models` names the model, then its LoRA adapters. `context` is in tokens, `max_body_size` in bytes. `defaults` are
    the sampling parameters of a request that sets none. `reasoning_efforts` are the levels of `reasoning_effort`, from
    the least.
    """

    models: list[str]
    context: int = 0
    images: bool = False
    defaults: dict[str, Any] = field(default_factory=dict)
    max_body_size: int = 0
    reasoning_efforts: list[str] = field(default_factory=list)


Model = TypeVar("Model", bound=BaseModel)


def validated(model: type[Model], data: bytes | Mapping[str, Any]) -> Model:
    """Build a `model` from JSON bytes or a mapping.

    Raises:
        ChatError: the data is no JSON or a field is wrong; it names the first such field.
    """
    try:
        return model.model_validate_json(data) if isinstance(data, bytes) else model.model_validate(data)
    except ValidationError as failure:
        param, message = _first_error(failure)
        raise ChatError(f"{param}: {message[:300]}" if param else message[:300], param=param) from None


def one_line(text: bytes) -> bytes:
    """Escape in JSON the characters at which some readers of lines break it: U+0085, U+2028 and U+2029."""
    return (
        text.replace(b"\xc2\x85", b"\\u0085").replace(b"\xe2\x80\xa8", b"\\u2028").replace(b"\xe2\x80\xa9", b"\\u2029")
    )


def reason_of(error: Exception) -> str:
    """Return a library's error message as one line; of pydantic's errors, the first."""
    text = _first_error(error)[1] if isinstance(error, ValidationError) else str(error).strip() or type(error).__name__
    return text.splitlines()[0][:300]


def _first_error(failure: ValidationError) -> tuple[str | None, str]:
    """Return (the field, what is wrong with it)."""
    error = failure.errors(include_input=False, include_url=False, include_context=False)[0]
    return ".".join(str(part)[:64] for part in error["loc"]) or None, error["msg"].removeprefix("Value error, ")
