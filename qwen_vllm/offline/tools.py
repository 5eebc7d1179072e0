"""Rows with tools or a response format: what `/v1/chat/completions` makes of them, without a server.

vLLM's own request validates them and renders the prompt. Our parsers hold the model to calls and read its answer.
"""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from prompt_utils import Prompt
from qwen_vllm.generation import RequestBuilder
from qwen_vllm.offline.rows import TOOL_FIELDS
from qwen_vllm.protocol import ChatError, ChatResult, Sampling, reason_of, validated
from qwen_vllm.server.guard import check_json
from qwen_vllm.tool_calls import CallReader, tool_parser_for

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest


class ToolRequests:
    """Turns rows in OpenAI's form into what the engine takes, for one loaded model.

    Args:
        requests: the model's; they know the sampling parameters.
        renderer: vLLM's.
        chat_template: Jinja text that replaces the tokenizer's own.
        options: what the template is given beside the messages.
    """

    def __init__(
        self, requests: RequestBuilder, renderer: Any, chat_template: str | None, options: Mapping[str, Any]
    ) -> None:
        self._requests, self._renderer, self._template, self._options = requests, renderer, chat_template, options
        self._parser = tool_parser_for(renderer.get_tokenizer(), chat_template, options)

    def build(self, row: Mapping[str, Any], stream: bool) -> tuple[Sampling, Prompt, "SamplingParams", "Calls"]:
        """Make what the engine takes of a row, and what reads the calls in its answer.

        Args:
            row: `messages`, any of TOOL_FIELDS, the fields of `Sampling`, and `system` for messages without one.
            stream: deltas, not the whole answer at the end.

        Raises:
            ChatError: the row is not valid, or longer than the context.
        """
        ours = {
            name: value for name, value in row.items() if name not in {*TOOL_FIELDS, "messages", "system", "stream"}
        }
        sampling = validated(Sampling, ours)
        wanted = self._requests.wanted(sampling)
        request = _request({name: row[name] for name in row.keys() - ours.keys()}, sampling)
        with _refusals():
            calls, token_ids = self._calls(request), self._token_ids(request)
        room = self._requests.context - len(token_ids)
        if room <= 0:
            message = f"messages: take {len(token_ids)} tokens, the context is {self._requests.context}: shorten them"
            raise ChatError(message, param="messages")
        wanted["structured_outputs"] = request.extract_structured_outputs()
        wanted["skip_special_tokens"] = request.skip_special_tokens
        opening = self._requests.prompts.opening(sampling.enable_thinking, sampling.reasoning_effort)
        prompt = Prompt(token_ids, 0, opening)
        return sampling, prompt, self._requests.params(wanted, prompt, stream), calls

    def _calls(self, request: "ChatCompletionRequest") -> "Calls":
        """Hold the model to calls where the request does."""
        from vllm.tool_parsers import ToolParserManager

        if not request.tools or request.tool_choice == "none":
            return Calls(request, None)
        if not self._parser:
            message = "the chat template knows none, or writes calls in a form that is not read here"
            raise ChatError(f"tools: {message}", param="tools")
        parser: Any = ToolParserManager.get_tool_parser(self._parser)(self._renderer.get_tokenizer(), request.tools)
        parser.adjust_request(request)
        return Calls(request, parser.reader)

    def _token_ids(self, request: "ChatCompletionRequest") -> list[int]:
        """Render the prompt as `/v1` does."""
        tools = [tool.model_dump() for tool in request.tools] if request.tools else None
        params = request.build_chat_params(self._template, "auto")
        params = params.with_defaults({**self._options, "tools": tools, "tokenize": False})
        _, (prompt,) = self._renderer.render_chat([request.messages], params)
        token_ids: list[int] = prompt["prompt_token_ids"]
        return token_ids


class Calls:
    """The calls in one answer, as they come.

    Args:
        request: what is answered.
        reader: finds them in the text; None: there are none to be found.
    """

    def __init__(self, request: "ChatCompletionRequest", reader: CallReader | None) -> None:
        self._request, self._reader = request, reader
        self._calls: list[dict[str, Any]] = []

    def take(self, text: str, last: bool) -> str:
        """Take the calls out of the next piece of text; return what is left of it."""
        from vllm.renderers.chat_utils import make_tool_call_id

        if not self._reader:
            return text
        left = ""
        for kind, piece in self._reader.read(text, last):
            if kind == "text":
                left += piece
            elif kind == "name":
                function = {"name": piece, "arguments": ""}
                self._calls.append({"id": make_tool_call_id(), "type": "function", "function": function})
            else:
                self._calls[-1]["function"]["arguments"] += piece
        return left

    def result(self, result: ChatResult) -> ChatResult:
        """Add the calls to a finished answer; there is no history, for these rows have messages."""
        calls = self._calls[:1] if self._request.parallel_tool_calls is False else self._calls
        # As OpenAI's: where the request names the tool, an answer ends with "stop".
        ended = calls and result.finish_reason == "stop" and isinstance(self._request.tool_choice, str)
        reason = "tool_calls" if ended else result.finish_reason
        return replace(result, history=[], tool_calls=calls, finish_reason=reason)


def _request(fields: dict[str, Any], sampling: Sampling) -> "ChatCompletionRequest":
    """Validate the fields of OpenAI's, within the bounds of the server's guard."""
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

    try:
        body = json.dumps(fields).encode()
    except (TypeError, ValueError) as error:
        raise ChatError(f"the row is no JSON: {error}") from None
    check_json(body)
    fields = json.loads(body)  # a copy: vLLM changes what it is given
    messages, system = fields["messages"], fields.pop("system", None)
    if isinstance(messages, list):
        parts = [part for message in messages for part in _parts(message)]
        if any(not isinstance(part, dict) or part.get("type") != "text" for part in parts):
            raise ChatError("messages: of parts only those of text can be answered here", param="messages")
        if system is not None and not any(message.get("role") in ("system", "developer") for message in messages[:1]):
            messages.insert(0, {"role": "system", "content": system})
    fields["reasoning_effort"] = sampling.reasoning_effort
    if sampling.enable_thinking is not None:
        fields["chat_template_kwargs"] = {"enable_thinking": sampling.enable_thinking}
    try:
        with _refusals():
            return validated(ChatCompletionRequest, fields)
    except ChatError as error:
        # vLLM's types stand in the path of a field: messages.0.ChatCompletionUserMessageParam.content
        field = ".".join(part for part in (error.param or "").split(".") if re.fullmatch("[a-z_]+|[0-9]+", part))
        message = error.message.removeprefix(f"{error.param}: ")
        raise ChatError(f"{field}: {message}" if field else message, param=field or None) from None


def _parts(message: Any) -> list[Any]:
    content = message.get("content") if isinstance(message, dict) else None
    return content if isinstance(content, list) else []


@contextmanager
def _refusals() -> Iterator[None]:
    """Make what vLLM or the chat template refuse in the block an error of the row."""
    from jinja2 import TemplateError
    from vllm.exceptions import VLLMClientError

    try:
        yield
    except (VLLMClientError, TemplateError, ValueError, TypeError) as error:
        field = getattr(error, "parameter", None) or "messages"
        reason = error.args[0] if isinstance(error, VLLMClientError) else reason_of(error)
        raise ChatError(f"{field}: {str(reason)[:300].removeprefix(f'{field}: ')}", param=field) from error
