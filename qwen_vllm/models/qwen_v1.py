"""First-generation Qwen (`QWenLMHeadModel`, such as Qwen-7B-Chat), which vLLM and transformers do not know.

Up to its trained length its network is Qwen2's under other names. A small folder describes the checkpoint anew: Qwen2's
config, a tokenizer made from its `qwen.tiktoken`, and links to the weights, which `qwen_v1_model.py` renames
as vLLM loads them. The Python files that a checkpoint brings are neither linked nor named there, so none can run.
"""

import base64
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_vllm import cache
from qwen_vllm.protocol import DEFAULT_SYSTEM

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

ARCHITECTURE = "QWenLMHeadModel"
VLLM_ARCHITECTURE = "QwenV1ForCausalLM"
VOCABULARY = "qwen.tiktoken"
LINKED = ("*.safetensors", "*.bin", "*.index.json", "quantize_config.json")
SAMPLING = ("do_sample", "temperature", "top_k", "top_p", "repetition_penalty", "max_new_tokens")

# What follows is published with the models: their tokenizer, their chat format (ChatML), what ends an answer.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PLAIN_TOKENS = 151643
END_OF_TEXT, START, END = SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
UNUSED_TOKENS = [f"<|extra_{i}|>" for i in range(205)]
CHAT_TEMPLATE = (
    """\
{%- if messages[0]['role'] != 'system' %}
    {{- '<|im_start|>system\\n"""
    + DEFAULT_SYSTEM
    + """<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
)


def register() -> None:
    """Tell vLLM of the model, in each process that may load or inspect it."""
    from vllm import ModelRegistry

    ModelRegistry.register_model(VLLM_ARCHITECTURE, f"qwen_vllm.vllm_plugin.qwen_v1_model:{VLLM_ARCHITECTURE}")


def qwen2_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Describe a first-generation `config.json` as the config of a Qwen2 with the same network.

    Its context is `seq_length`, the length it was trained on. Beyond it the original would scale the rotary base
    (`use_dynamic_ntk`) and the queries (`use_logn_attn`), which is not done here; up to it neither changes anything.

    Raises:
        ValueError: the config is of another network; the message goes on after the folder's name.
    """
    if {"visual", "audio"} & config.keys():
        raise ValueError("takes images or sound (Qwen-VL, Qwen-Audio), which is not served: take Qwen2-VL or later")
    try:
        hidden, heads = config["hidden_size"], config["num_attention_heads"]
        described = {
            "architectures": [VLLM_ARCHITECTURE],
            "model_type": "qwen2",
            "vocab_size": config["vocab_size"],
            "hidden_size": hidden,
            "intermediate_size": config["intermediate_size"] // 2,
            "num_hidden_layers": config["num_hidden_layers"],
            "num_attention_heads": heads,
            "num_key_value_heads": heads,
            "max_position_embeddings": config["seq_length"],
            "rms_norm_eps": config["layer_norm_epsilon"],
            "rope_parameters": {"rope_type": "default", "rope_theta": config.get("rotary_emb_base", 10000)},
            "tie_word_embeddings": config.get("tie_word_embeddings", False),
        }
    except KeyError as missing:
        raise ValueError(f"does not say {missing} in its config.json: fetch the model again") from None
    fixed = {"kv_channels": hidden // heads, "rotary_pct": 1.0, "no_bias": True, "scale_attn_weights": True}
    for name, value in fixed.items():
        if config.get(name, value) != value:
            raise ValueError(f"has {name}={config[name]} in its config.json, no Qwen that was published has that")
    flags = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
    # Without any of these vLLM looks at the weights.
    dtype = config.get("torch_dtype") or next((name for flag, name in flags.items() if config.get(flag)), None)
    kept = {"dtype": dtype, "quantization_config": config.get("quantization_config")}
    return described | {name: value for name, value in kept.items() if value}


def describe(source: Path, config: Mapping[str, Any], target: Path) -> None:
    """Fill the empty folder `target` with what vLLM needs to serve the checkpoint `source` with this config.

    Raises:
        ValueError: as in `qwen2_config`; or the tokenizer's file is missing or damaged.
    """
    from transformers import __version__

    # Where no version is named, transformers warns that the tokenizer may be one of Mistral's that were wrong.
    wanted = qwen2_config(config) | {"transformers_version": __version__}
    generation = _json(source / "generation_config.json")
    chats = generation.get("chat_format", "chatml") == "chatml"
    tokenizer = build_tokenizer(source / VOCABULARY, chats)
    tokenizer.save_pretrained(target)
    ends = (END, END_OF_TEXT, START) if chats else (END_OF_TEXT,)
    sampling = {name: generation[name] for name in SAMPLING if name in generation}
    sampling["eos_token_id"] = tokenizer.convert_tokens_to_ids(list(ends))
    (target / "generation_config.json").write_text(json.dumps(sampling, indent=2))
    (target / "config.json").write_text(json.dumps(wanted, indent=2))
    for file in _linked(source):
        (target / file.name).symlink_to(file.resolve())


def build_tokenizer(file: Path, chats: bool) -> "PreTrainedTokenizerFast":
    """Build the tokenizer of a `qwen.tiktoken` file; with the chat template if the model `chats`.

    Raises:
        ValueError: the file is missing or damaged.
    """
    from tokenizers import normalizers
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import TikTokenConverter

    class Converter(TikTokenConverter):
        # tiktoken's own reader would keep a copy under the file's name in a folder that all users can write to.
        load_tiktoken_bpe = staticmethod(_read_vocabulary)

    vocabulary = Converter(file, PATTERN, extra_special_tokens=[*SPECIAL_TOKENS, *UNUSED_TOKENS]).converted()
    vocabulary.normalizer = normalizers.NFC()
    vocabulary.model.ignore_merges = False  # as Qwen2's; all its tokens come by merges
    return PreTrainedTokenizerFast(
        tokenizer_object=vocabulary,
        eos_token=END if chats else END_OF_TEXT,
        pad_token=END_OF_TEXT,
        chat_template=CHAT_TEMPLATE if chats else None,
        clean_up_tokenization_spaces=False,
    )


def fingerprint(source: Path) -> str:
    """Hash the state of the files that `describe` reads, and this module."""
    files = (source / name for name in ("config.json", "generation_config.json", VOCABULARY))
    return cache.fingerprint(Path(__file__), *files, *_linked(source))


def _linked(source: Path) -> list[Path]:
    return sorted({file for pattern in LINKED for file in source.glob(pattern)})


def _read_vocabulary(file: Path) -> dict[bytes, int]:
    """Read each token's bytes and its id, from lines of base64 and a number."""
    try:
        pairs = [line.split() for line in file.read_bytes().splitlines()]
        ids = {base64.b64decode(token, validate=True): int(number) for token, number in pairs}
    except FileNotFoundError:
        raise ValueError(f"lacks {file.name}, its tokenizer: fetch the model again") from None
    except ValueError:
        ids = {}
    if set(ids.values()) != set(range(PLAIN_TOKENS)):
        raise ValueError(f"has a damaged {file.name}, its tokenizer: fetch the model again")
    return ids


def _json(file: Path) -> dict[str, Any]:
    """Read a JSON file; {} where it is missing."""
    try:
        return json.loads(file.read_bytes()) if file.is_file() else {}
    except ValueError:
        raise ValueError(f"has a damaged {file.name}: fetch the model again") from None
