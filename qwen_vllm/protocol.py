"""What a chat request holds, what an answer is, and how a request fails.

The server, its clients and the offline engine all speak in these types. This module knows nothing
of HTTP, terminals or vLLM, and imports nothing of the project.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

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

Turn = tuple[str, str]
"""One finished exchange: what the user said, what the assistant answered."""
RequestTurn = Annotated[tuple[StrictStr, StrictStr], Strict(False)]
"""The same in a request, where it may be a list, as JSON has it."""

StopWord = Annotated[str, StringConstraints(min_length=1, max_length=256)]
INT32_MAX, INT64_MAX = 2**31 - 1, 2**63 - 1
RETRIES = 6
"""How often a busy server is asked again, within about a minute."""


class ChatError(Exception):
    """Why a request got no answer, or no whole one. `message` is for the user; `status` is the HTTP status;
    `retry_after`: the seconds after which a busy server wants to be asked again.

    type                status
    invalid_request     400, 404, 408, 413, 415   the request must change; `param` names the field
    unauthorized        401                       the key is missing or wrong
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
        """The wire form, `{"error": {"type", "message", "param"}}`."""
        return {"error": {"type": self.type, "message": self.message, "param": self.param}}


class Sampling(BaseModel):
    """How to pick the tokens of an answer. What is None is left to the server's and the model's defaults."""

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

    def sampling(self) -> dict[str, Any]:
        """The sampling parameters that are not None, by name."""
        return self.model_dump(include=set(Sampling.model_fields), exclude_none=True)


class ChatRequest(Sampling):
    """The body of `POST /chat`. Unknown fields and wrong types are refused, nothing is coerced."""

    query: str
    """what the user says now"""
    history: Annotated[list[RequestTurn], FailFast(), Strict(False)] = []
    """earlier turns, oldest first: [[user, assistant], …]"""
    system: str = DEFAULT_SYSTEM
    """how the model should behave"""
    stream: bool = False
    """answer piece by piece, as newline-delimited JSON"""

    @field_validator("query")
    @classmethod
    def _not_blank(cls, query: str) -> str:
        if not query.strip():
            raise ValueError("must not be blank")
        return query


@dataclass(frozen=True)
class Reasoning:
    """A piece of what a model thinks before it answers; no string, so that it is never taken for a piece of text."""

    text: str


@dataclass(frozen=True)
class ChatResult:
    """A finished answer. `history` ends with this turn, ready for the next request; thoughts are not in it.

    `finish_reason` is "stop" or "length"; `stop_reason` the stop word that matched, None where the
    model ended by itself; `dropped_turns` how many of the oldest turns did not fit the context. `reasoning` is what the
    model thought first, `reasoning_tokens` how many of the `completion_tokens` that took.
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

    @property
    def usage(self) -> dict[str, int]:
        """The counts of tokens, as the server sends them."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "reasoning_tokens": self.reasoning_tokens,
        }


Part = Reasoning | str | ChatResult
"""What an answer comes in: pieces of what the model thinks, if it does; pieces of text; at last one result."""


class Question(str):
    """What a user asks, with the images that go along, each as a data URL."""

    images: Sequence[str]

    def __new__(cls, text: str, images: Sequence[str] = ()) -> "Question":
        """The text is the string itself."""
        question = super().__new__(cls, text)
        question.images = images
        return question


AskedTurn = tuple[Question, str]
"""A turn whose question may have images."""


@dataclass(frozen=True)
class ServerInfo:
    """What a server tells of itself: the names of its model and its LoRA adapters, the model's context in tokens,
    whether it takes images, what a request that says nothing of sampling gets, and the largest request in bytes."""

    models: list[str]
    context: int = 0
    images: bool = False
    defaults: dict[str, Any] = field(default_factory=dict)
    max_body_size: int = 0


def retry_delay(error: ChatError, attempt: int) -> float | None:
    """Seconds to wait before asking again after the `attempt`-th refusal (from 1) of a busy server; None: give up.

    Twice as long each time, at least what the server asked for, and a little by chance, so that not all come at once.
    """
    if error.retry_after is None or attempt > RETRIES:
        return None
    return max(error.retry_after, min(2 ** (attempt - 1), 16)) * random.uniform(1, 1.25)


def validated(model: type[BaseModel], data: bytes | Mapping[str, Any]) -> Any:
    """An instance of `model` from JSON bytes or a mapping; a ChatError that names the first bad field otherwise."""
    try:
        return model.model_validate_json(data) if isinstance(data, bytes) else model.model_validate(data)
    except ValidationError as failure:
        param, message = _first_error(failure)
        raise ChatError(f"{param}: {message[:300]}" if param else message[:300], param=param) from None


def reason_of(error: Exception) -> str:
    """What an exception of a library says, in one line; of pydantic's, what is wrong with the first field."""
    text = _first_error(error)[1] if isinstance(error, ValidationError) else str(error).strip() or type(error).__name__
    return text.splitlines()[0][:300]


def _first_error(failure: ValidationError) -> tuple[str | None, str]:
    """(the field, what is wrong with it)"""
    error = failure.errors(include_input=False, include_url=False, include_context=False)[0]
    return ".".join(str(part)[:64] for part in error["loc"]) or None, error["msg"].removeprefix("Value error, ")
