"""Tokenizers and chat templates, without a download."""

from functools import cache
from importlib.util import find_spec
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter

from qwen_vllm.models.qwen_v1 import PATTERN, SPECIAL_TOKENS

PLAIN_TOKENS = ["<tool_call>", "</tool_call>", "<think>", "</think>"]

# The part of Qwen2.5's own template that deals with plain conversations.
QWEN25_TEMPLATE = """\
{%- if messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
{%- else %}
    {{- '<|im_start|>system\\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role != 'system' or not loop.first %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
# The part of Qwen3's own template that deals with plain conversations.
QWEN3_TEMPLATE = """\
{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- set content = message.content %}
    {%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == 'assistant' %}
        {%- if '</think>' in content %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""


def qwen_tokenizer(chat_template: str = QWEN25_TEMPLATE, *vision_tokens: str) -> PreTrainedTokenizerFast:
    """Qwen2.5's tokenizer: the vocabulary that the package `dashscope` carries, and the plain part of its template."""
    vocabulary = Tokenizer.from_str(_vocabulary())
    vocabulary.add_special_tokens([*SPECIAL_TOKENS, *vision_tokens])
    return with_control_tokens(vocabulary, chat_template)


@cache
def _vocabulary() -> str:
    """The tokenizer without its control tokens, as JSON; it takes seconds to make."""
    package = find_spec("dashscope").submodule_search_locations[0]
    vocabulary = TikTokenConverter(str(Path(package) / "resources" / "qwen.tiktoken"), PATTERN).converted()
    vocabulary.normalizer = normalizers.NFC()
    return vocabulary.to_str()


def with_control_tokens(vocabulary: Tokenizer, chat_template: str) -> PreTrainedTokenizerFast:
    """A tokenizer with Qwen's further tokens, which are not marked as special."""
    vocabulary.add_tokens([AddedToken(token, normalized=False, special=False) for token in PLAIN_TOKENS])
    return PreTrainedTokenizerFast(tokenizer_object=vocabulary, eos_token="<|im_end|>", chat_template=chat_template)


def byte_tokenizer(chat_template: str, *further_tokens: str) -> PreTrainedTokenizerBase:
    """Qwen's control tokens and further ones, on a vocabulary of single bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = Tokenizer(models.BPE({character: n for n, character in enumerate(alphabet)}, []))
    vocabulary.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    vocabulary.decoder = decoders.ByteLevel()
    vocabulary.add_special_tokens([*SPECIAL_TOKENS, *further_tokens])
    return with_control_tokens(vocabulary, chat_template)
