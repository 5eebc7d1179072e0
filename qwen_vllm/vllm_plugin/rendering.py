"""What users, tools and documents write to vLLM's own routes stays text, whatever control tokens it spells.

vLLM renders a conversation to one text and encodes that: by then nothing tells a control token of the template's from
one that somebody wrote.
"""

import json
import os
import re
from collections.abc import Callable
from functools import cache, wraps
from typing import Any

from qwen_vllm.text_encoder import any_of, is_known, split, text_encoder

ALLOW = "QWEN_VLLM_ALLOW_CONTROL_TOKENS"
"""The environment variable by which --allow-control-tokens reaches every process."""
MARK = "\ufdd0"
"""Stands behind the first character of what could be a control token. It is no character: no text has it."""
OWN_TEXTS = {
    (role, key)
    for role in ("system", "developer", "assistant")
    for key in ("content", "reasoning", "reasoning_content")
}
"""Texts of the operator and of the model. They may spell what the model itself writes, such as `<tool_call>`."""


class TextKeeper:
    """Encodes conversations so that only the chat template writes control tokens.

    Args:
        tokenizer: a Hugging Face tokenizer.

    Raises:
        ValueError: this cannot be done with it; says why.
    """

    def __init__(self, tokenizer: Any) -> None:
        if not is_known(tokenizer):
            raise ValueError("its tokenizer is not one of the tokenizers library")
        added = tokenizer.added_tokens_decoder
        if any(token.lstrip or token.rstrip or token.single_word for token in added.values()):
            raise ValueError("its control tokens take in what is around them")
        contents = {token.content for token in added.values()}
        self._encoder, self._control = text_encoder(tokenizer), any_of(contents)
        self._starts = {content[0] for content in contents}
        start = f"[{re.escape(''.join(self._starts))}]"
        control = self._control.pattern
        own = any_of(token.content for token in added.values() if not token.special).pattern
        # In JSON: a control token, or what may be the first part of one at the end of a text.
        self._risk = re.compile(f'{control}|{start}[^"]{{0,{max(map(len, contents), default=0)}}}"')
        self._all, self._not_own = re.compile(f"({start})"), re.compile(f"{own}|({start})")

    def is_needed(self, *values: Any) -> bool:
        """Tell whether a text in `values`, at any depth, may spell a control token."""
        return self._risk.search(json.dumps(values, ensure_ascii=False, default=str)) is not None

    def marked(self, value: Any, pattern: "re.Pattern[str] | None" = None) -> Any:
        """Return `value` with marks in all its texts. Messages may hold what their role may write."""
        match value:
            case str():
                return (pattern or self._all).sub(lambda found: found[0] + MARK if found[1] else found[0], value)
            case {"role": str(role)} if pattern is None:
                own = {key: self._not_own if (role, key) in OWN_TEXTS else self._all for key in value}
                return {key: item if key == "role" else self.marked(item, own[key]) for key, item in value.items()}
            case dict():
                return {
                    self.marked(key, self._all): self.marked(item, pattern or self._all) for key, item in value.items()
                }
            case list() | tuple():
                return [self.marked(item, pattern) for item in value]
        return value

    def encode(self, text: str) -> list[int]:
        """Encode what a template made of marked texts."""
        return self._encoder.parts([(self._unmarked(part), is_token) for part, is_token in split(text, self._control)])

    def _unmarked(self, text: str) -> str:
        for start in self._starts:
            text = text.replace(start + MARK, start)
        return text


@cache
def keeper(tokenizer: Any) -> TextKeeper:
    """Return the keeper for the tokenizer of this process."""
    return TextKeeper(tokenizer)


@cache
def why_not_kept(tokenizer: Any) -> str:
    """Say why control tokens in messages are taken as such; empty: they are not."""
    if ALLOW in os.environ:
        return "as --allow-control-tokens says"
    try:
        keeper(tokenizer)
    except ValueError as reason:
        return str(reason)
    return ""


def texts_stay_text(render: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap vLLM's function that renders a conversation: it then returns token ids where a text may spell a token."""

    @wraps(render)
    def rendered(
        model_config: Any, tokenizer: Any, conversation: Any, *, tools: Any = None, tokenize: bool = True, **kwargs: Any
    ) -> Any:
        # With images in a template for plain text, vLLM has put control tokens into the texts before.
        mixed = model_config.is_multimodal_model and any(isinstance(turn.get("content"), str) for turn in conversation)
        options = {name: value for name, value in kwargs.items() if name != "chat_template"}
        if (
            tokenize
            or mixed
            or why_not_kept(tokenizer)
            or not keeper(tokenizer).is_needed(conversation, tools, options)
        ):
            return render(model_config, tokenizer, conversation, tools=tools, tokenize=tokenize, **kwargs)
        marked = keeper(tokenizer).marked
        text = render(
            model_config,
            tokenizer,
            marked(conversation),
            tools=marked(tools),
            tokenize=False,
            **{**kwargs, **{name: marked(value) for name, value in options.items()}},
        )
        return keeper(tokenizer).encode(text)

    return rendered


def encodes_fast(tokenize: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap vLLM's function that encodes a text: fastokens does it, where it gives all that is asked for."""

    @wraps(tokenize)
    def tokenized(renderer: Any, prompt: Any, params: Any) -> Any:
        tokenizer = renderer.get_tokenizer()
        encoder = text_encoder(tokenizer) if is_known(tokenizer) else None
        if encoder and encoder.is_fast and not params.return_token_offsets:
            asked = params.get_encode_kwargs()
            if encoder.adds_nothing or not asked["add_special_tokens"]:
                token_ids = encoder.whole(prompt["prompt"])
                if not asked["truncation"] or len(token_ids) <= asked["max_length"]:
                    return renderer._build_tokens_prompt(token_ids, prompt)
        return tokenize(renderer, prompt, params)

    return tokenized
