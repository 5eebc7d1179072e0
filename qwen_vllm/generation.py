"""From a chat request to what the engine takes, and from what the engine gives to an answer."""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import product
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from prompt_utils import Prompt, PromptBuilder, PromptTooLong
from qwen_vllm.chat_template import NoChatTemplate, UnsupportedTemplate, UnsupportedTokenizer
from qwen_vllm.hardware import on_cpu
from qwen_vllm.protocol import PROMPT_FIELDS, ChatError, ChatRequest, ChatResult, Sampling, Turn, turn
from qwen_vllm.reasoning import ReasoningSplitter, overlap, parser_for, think_tags
from qwen_vllm.text_encoder import is_known, text_encoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
    from vllm import CompletionOutput, SamplingParams
    from vllm.config import ModelConfig

LEAST_ANSWER = 256
"""How many tokens are kept for an answer, at least, where the request does not say `max_tokens`."""

ADVICE: Mapping[type[UnsupportedTemplate], str] = {
    UnsupportedTokenizer: "use /v1/chat/completions, or start with --tokenizer-mode hf where the model has a "
    "tokenizer.json",
    NoChatTemplate: "use /v1/completions (in Python complete_batch), or name one with --chat-template",
    UnsupportedTemplate: "no /chat; use /v1/chat/completions, or name another template with --chat-template",
}


class RequestBuilder:
    """Turns chat requests into what the engine takes, for one loaded model.

    Args:
        model_config: the engine's; its context, and what the model and the command line say of sampling.
        tokenizer: the model's.
        chat_template: Jinja text that replaces the tokenizer's own.
        template_options: what the template is given beside the messages; a request's `enable_thinking` goes over it.
        reasoning_parser: the name of one of vLLM's; without one, that which suits the chat template.

    Raises:
        ChatError: the model has no chat template that the prompt builder can follow.
    """

    def __init__(
        self,
        model_config: "ModelConfig",
        tokenizer: "PreTrainedTokenizerBase",
        chat_template: str | None = None,
        template_options: Mapping[str, Any] = MappingProxyType({}),
        reasoning_parser: str = "",
    ) -> None:
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        try:
            self.prompts = PromptBuilder(tokenizer, chat_template, template_options)
        except UnsupportedTemplate as reason:
            helping = helping_options(tokenizer, chat_template, template_options)
            advice = f"start with --default-chat-template-kwargs '{json.dumps(helping)}', or " if helping else ""
            raise ChatError(f"{reason}: {advice}{ADVICE[type(reason)]}") from reason
        parser = reasoning_parser or parser_for(tokenizer, chat_template, template_options)
        self._tags = think_tags(parser, tokenizer)
        self._sampling_params, self._kinds = SamplingParams, RequestOutputKind
        self.context = model_config.max_model_len
        self.defaults = sampling_defaults(self.context, model_config.get_diff_sampling_param())

    @property
    def told_defaults(self) -> dict[str, Any]:
        """The defaults, with `enable_thinking` where a request may choose it."""
        on = self.prompts.opening(True)
        is_choice = self._tags and on != self.prompts.opening(False)
        return self.defaults | ({"enable_thinking": self.prompts.opening() == on} if is_choice else {})

    def build(self, request: ChatRequest, stream: bool) -> tuple[Prompt, "SamplingParams"]:
        """Make the prompt and the sampling parameters: deltas if `stream`, else the whole answer at the end.

        Room for the answer, `max_tokens`, is reserved before the history is fitted in. Where nobody has asked for that
        much, it gives way to the query and to the newest turn, down to LEAST_ANSWER.

        Raises:
            ChatError: system, query and answer together are longer than the context.
        """
        wanted = self.wanted(request)
        prompt = self._prompt(request, wanted["max_tokens"])
        return prompt, self.params(wanted, prompt, stream)

    def wanted(self, request: Sampling) -> dict[str, Any]:
        """Return what a request wants of the sampling, by vLLM's names.

        Raises:
            ChatError: it wants more than the model can do.
        """
        wanted = self.defaults | request.sampling(exclude=PROMPT_FIELDS)
        self._check_effort(request.reasoning_effort)
        if wanted["max_tokens"] >= self.context:
            raise ChatError(f"max_tokens: must be less than the context of {self.context}", param="max_tokens")
        if "thinking_budget" in wanted:
            wanted["thinking_token_budget"] = self._checked_budget(wanted.pop("thinking_budget"), wanted["max_tokens"])
        return wanted

    def params(self, wanted: dict[str, Any], prompt: Prompt, stream: bool) -> "SamplingParams":
        """Make the sampling parameters of what is `wanted`; the answer has the room that the prompt leaves."""
        wanted["max_tokens"] = min(wanted["max_tokens"], self.context - len(prompt.token_ids))
        if wanted.get("stop") and not self._splitter(prompt).ended:
            del wanted["stop"]  # the engine would find them in the reasoning too: `RunningAnswer` looks for them
            stream = True
        kind = self._kinds.DELTA if stream else self._kinds.FINAL_ONLY
        stop_token_ids = [self.prompts.stop_token_id]
        return self._sampling_params(**wanted, stop_token_ids=stop_token_ids, output_kind=kind, skip_clone=True)

    def _prompt(self, request: ChatRequest, reserved: int) -> Prompt:
        """Build the prompt with `reserved` tokens of room for the answer, or with less where that may give way."""
        mode = request.enable_thinking, request.reasoning_effort
        asked = request.max_tokens or max(LEAST_ANSWER, request.thinking_budget or 0)
        least, newest = min(reserved, asked), request.history[-1:]
        with suppress(PromptTooLong):
            prompt = self.prompts.build(request.system, request.history, request.query, self.context - reserved, *mode)
            if least == reserved or prompt.dropped_turns < len(request.history) or not newest:
                return prompt
        try:
            prompt = self.prompts.build(request.system, newest, request.query, self.context - least, *mode)
        except PromptTooLong as error:
            raise ChatError(f"{error}: shorten them or ask for fewer max_tokens", param="query") from error
        return replace(prompt, dropped_turns=prompt.dropped_turns + len(request.history) - len(newest))

    def answer(self, prompt: Prompt, request: Sampling) -> "RunningAnswer":
        """Begin the answer to a request, whose prompt was built."""
        splitter = self._splitter(prompt)
        stop = [] if splitter.ended else request.stop or []
        return RunningAnswer(prompt, splitter, self.prompts.keeps_reasoning, stop)

    def _splitter(self, prompt: Prompt) -> ReasoningSplitter:
        return ReasoningSplitter(self._tags, prompt.opening)

    def _check_effort(self, effort: str | None) -> None:
        levels = self.prompts.efforts
        if effort is None or effort in levels:
            return
        known = f"must be one of {', '.join(levels)}" if levels else "this model has no levels of it: leave it out"
        raise ChatError(f"reasoning_effort: {known}", param="reasoning_effort")

    def _checked_budget(self, budget: int, max_tokens: int) -> int:
        if not self._tags:
            message = "this model does not think: leave it out"
        elif budget > max_tokens:
            message = f"must not be over max_tokens, {max_tokens}"
        else:
            return budget
        raise ChatError(f"thinking_budget: {message}", param="thinking_budget")


def hasten(tokenizer: "PreTrainedTokenizerBase") -> None:
    """Have texts encoded by fastokens soon, where it can and a GPU waits for them: a CPU computes far longer."""
    if not on_cpu() and is_known(tokenizer):
        text_encoder(tokenizer).hasten()


def helping_options(
    tokenizer: "PreTrainedTokenizerBase", chat_template: str | None, options: Mapping[str, Any]
) -> dict[str, Any]:
    """Find one more option with which the prompt builder can follow a chat template; {}: there is none."""
    template = str(chat_template or tokenizer.chat_template)
    known = [name for name in ("preserve_thinking", "enable_thinking") if name in template]
    for name, value in product(known, (False, True)):
        with suppress(UnsupportedTemplate):
            PromptBuilder(tokenizer, chat_template, {**options, name: value})
            return {**options, name: value}
    return {}


def sampling_defaults(context: int, configured: Mapping[str, Any]) -> dict[str, Any]:
    """Choose what a request that says nothing gets: ours, then what is `configured`.

    An answer may take up to a quarter of the context, at most 8,192 tokens; one that is configured longer, up to half
    of it.

    Args:
        context: the model's, in tokens.
        configured: by the model's `generation_config.json`, or over it by `--override-generation-config`.
    """
    ours = {"temperature": 0.7, "top_p": 0.8, "max_tokens": min(context // 4, 8192)}
    defaults = {**ours, **configured}
    return {**defaults, "max_tokens": max(1, min(defaults["max_tokens"], context // 2))}


class StopWords:
    """Looks for stop words in a text while it comes; `found` is the first that was complete."""

    def __init__(self, words: Sequence[str]) -> None:
        self._words, self._held = words, ""
        self.found: str | None = None

    def before(self, text: str, last: bool) -> str:
        """Return what is new of the text before any stop word, without what may be the start of one."""
        text = self._held + text
        ends = [(text.index(word) + len(word), word) for word in self._words if word in text]
        if ends:
            end, self.found = min(ends, key=lambda found: found[0])
            return text[: end - len(self.found)]
        held = 0 if last else max((overlap(text, word) for word in self._words), default=0)
        cut = len(text) - held
        self._held = text[cut:]
        return text[:cut]


class RunningAnswer:
    """One answer as it grows: splits what the engine gives, in deltas or at once, and counts. It keeps no text.

    Args:
        stop: words that end the text, for which the engine does not look.

    Attributes:
        prompt: what is answered.
        keeps_reasoning: whether the model's chat template reads the reasoning of earlier turns.
        finish_reason: "stop" or "length" when the answer has ended; None before.
        stopped: whether one of `stop` has ended it; the engine is to be told to end too.
    """

    def __init__(
        self, prompt: Prompt, splitter: ReasoningSplitter, keeps_reasoning: bool, stop: Sequence[str] = ()
    ) -> None:
        self.prompt, self.keeps_reasoning = prompt, keeps_reasoning
        self.finish_reason: str | None = None
        self.stopped = False
        self._splitter, self._stop = splitter, StopWords(stop) if stop else None
        self._completion_tokens = 0
        self._stop_reason: str | None = None

    def add(self, completion: "CompletionOutput") -> tuple[str, str]:
        """Take in the engine's next output; return (new reasoning, new text).

        Raises:
            ChatError: the engine gave the request up.
        """
        last = completion.finish_reason is not None
        reasoning, text = self._splitter.split(completion.text, completion.token_ids, last)
        self._completion_tokens += len(completion.token_ids)
        if last:
            if completion.finish_reason not in ("stop", "length"):
                message = "the engine gave this request up, or the server is stopping: send it again"
                raise ChatError(message, "engine_error", status=503)
            self.finish_reason = completion.finish_reason
            self._stop_reason = completion.stop_reason if isinstance(completion.stop_reason, str) else None
        if self._stop:
            text = self._stop.before(text, last)
            if self._stop.found:
                self.finish_reason, self._stop_reason = "stop", self._stop.found
                self.stopped = not last
        return reasoning, text

    def result(self, text: str, reasoning: str, query: str = "", earlier: Sequence[Turn] = ()) -> ChatResult:
        """Return the finished answer.

        Args:
            text, reasoning: its pieces together.
            query, earlier: what was asked, after which turns.
        """
        return ChatResult(
            text=text,
            history=[*earlier, turn(query, text, reasoning if self.keeps_reasoning else "")],
            finish_reason=self.finish_reason or "",
            stop_reason=self._stop_reason,
            prompt_tokens=len(self.prompt.token_ids),
            completion_tokens=self._completion_tokens,
            dropped_turns=self.prompt.dropped_turns,
            reasoning=reasoning,
            reasoning_tokens=self._splitter.tokens,
            dropped_reasoning=self.prompt.dropped_reasoning,
        )

    def ending(self) -> dict[str, Any]:
        """Return the last line of the stream: the finished answer in wire form, without its text."""
        result = self.result("", "")
        return {
            "finish_reason": result.finish_reason,
            "stop_reason": result.stop_reason,
            "usage": result.usage,
            "dropped_turns": result.dropped_turns,
            "dropped_reasoning": result.dropped_reasoning,
            "keeps_reasoning": self.keeps_reasoning,
        }
