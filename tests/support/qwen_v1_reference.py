"""A tiny first-generation Qwen: a checkpoint as they were published, and its network in plain torch.

The network is written from its description: pre-norm blocks, RMSNorm, rotary halves, one biased matrix for queries,
keys and values, SwiGLU; beyond the trained length dynamic NTK and logn attention.
"""

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.nn.functional import silu

from tests.support.tokenizers import QWEN_VOCABULARIES

QWEN_TIKTOKEN = QWEN_VOCABULARIES / "qwen.tiktoken"
CODE = ("configuration_qwen.py", "modeling_qwen.py", "tokenization_qwen.py", "qwen_generation_utils.py")
CONFIG = {
    "architectures": ["QWenLMHeadModel"],
    "auto_map": {
        "AutoConfig": "configuration_qwen.QWenConfig",
        "AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel",
    },
    "attn_dropout_prob": 0.0,
    "bf16": False,
    "emb_dropout_prob": 0.0,
    "fp16": False,
    "fp32": False,
    "hidden_size": 64,
    "initializer_range": 0.02,
    "intermediate_size": 192,
    "kv_channels": 32,
    "layer_norm_epsilon": 1e-06,
    "max_position_embeddings": 512,
    "model_type": "qwen",
    "no_bias": True,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "onnx_safe": None,
    "rotary_emb_base": 10000,
    "rotary_pct": 1.0,
    "scale_attn_weights": True,
    "seq_length": 128,
    "tie_word_embeddings": False,
    "tokenizer_class": "QWenTokenizer",
    "use_cache": True,
    "use_dynamic_ntk": True,
    "use_flash_attn": "auto",
    "use_logn_attn": True,
    "vocab_size": 151936,
}
GENERATION = {
    "chat_format": "chatml",
    "do_sample": True,
    "eos_token_id": 151643,
    "max_new_tokens": 64,
    "max_window_size": 6144,
    "pad_token_id": 151643,
    "repetition_penalty": 1.1,
    "top_k": 0,
    "top_p": 0.8,
}


def random_weights(config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Tensors as a checkpoint holds them, in bfloat16, large enough that every part shows in the logits."""
    random = torch.Generator().manual_seed(1)
    hidden, inner, vocabulary = config["hidden_size"], config["intermediate_size"] // 2, config["vocab_size"]

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=random) * 2 / math.sqrt(columns)

    def vector(size: int, middle: float = 0.0) -> torch.Tensor:
        return middle + torch.randn(size, generator=random) / 4

    weights = {"transformer.wte.weight": matrix(vocabulary, hidden) * 4}
    for i in range(config["num_hidden_layers"]):
        block = f"transformer.h.{i}"
        weights |= {
            f"{block}.ln_1.weight": vector(hidden, 1.0),
            f"{block}.attn.c_attn.weight": matrix(3 * hidden, hidden),
            f"{block}.attn.c_attn.bias": vector(3 * hidden),
            f"{block}.attn.c_proj.weight": matrix(hidden, hidden),
            f"{block}.ln_2.weight": vector(hidden, 1.0),
            f"{block}.mlp.w1.weight": matrix(inner, hidden),
            f"{block}.mlp.w2.weight": matrix(inner, hidden),
            f"{block}.mlp.c_proj.weight": matrix(hidden, inner),
        }
    weights |= {"transformer.ln_f.weight": vector(hidden, 1.0), "lm_head.weight": matrix(vocabulary, hidden)}
    return {name: tensor.bfloat16() for name, tensor in weights.items()}


def write_checkpoint(folder: Path, weights: dict[str, torch.Tensor], kind: str = "safetensors", **config: Any) -> Path:
    """A checkpoint of two files of weights, with its own code, which leaves a file named `ran` beside it if it runs.

    Args:
        kind: "safetensors" or "bin".
        config: goes over CONFIG.
    """
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | config))
    (folder / "generation_config.json").write_text(json.dumps(GENERATION))
    tokenizer = {"auto_map": {"AutoTokenizer": ["tokenization_qwen.QWenTokenizer", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer | {"tokenizer_class": "QWenTokenizer"}))
    (folder / "qwen.tiktoken").write_bytes(QWEN_TIKTOKEN.read_bytes())
    for name in CODE:
        (folder / name).write_text(f"open({str(folder / 'ran')!r}, 'w').close()\nraise SystemExit('ran')\n")
    stem = "model" if kind == "safetensors" else "pytorch_model"
    names, index = list(weights), {}
    for i, part in enumerate((names[: len(names) // 2], names[len(names) // 2 :]), start=1):
        file = f"{stem}-{i:05}-of-00002.{kind}"
        save = save_file if kind == "safetensors" else torch.save
        save({name: weights[name] for name in part}, folder / file)
        index |= dict.fromkeys(part, file)
    (folder / f"{stem}.{kind}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return folder


def logits(weights: dict[str, torch.Tensor], config: dict[str, Any], token_ids: list[int]) -> torch.Tensor:
    """The scores of each next token, [tokens, vocabulary], in float32."""
    w = {name: tensor.float() for name, tensor in weights.items()}
    n, heads, size, trained = (
        len(token_ids),
        config["num_attention_heads"],
        config["kv_channels"],
        config["seq_length"],
    )

    def normed(x: torch.Tensor, name: str) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + config["layer_norm_epsilon"]) * w[f"{name}.weight"]

    base = float(config["rotary_emb_base"])
    if config["use_dynamic_ntk"]:
        stretch = max(1, 2 ** math.ceil(math.log2(n / trained) + 1) - 1)
        base *= stretch ** (size / (size - 2))
    angles = torch.arange(n)[:, None] / base ** (torch.arange(0, size, 2) / size)
    cos, sin = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)

    def rotated(x: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat([-second, first], -1) * sin

    growth = torch.ones(n, 1)
    if config["use_logn_attn"]:
        growth = (torch.arange(1, n + 1).log() / math.log(trained)).clamp(min=1.0)[:, None]
    future = torch.full((n, n), -torch.inf).triu(1)

    x = w["transformer.wte.weight"][torch.tensor(token_ids)]
    for i in range(config["num_hidden_layers"]):
        block = f"transformer.h.{i}"
        qkv = normed(x, f"{block}.ln_1") @ w[f"{block}.attn.c_attn.weight"].T + w[f"{block}.attn.c_attn.bias"]
        q, k, v = (part.view(n, heads, size).transpose(0, 1) for part in qkv.chunk(3, -1))
        scores = rotated(q) * growth @ rotated(k).transpose(1, 2) / math.sqrt(size) + future
        mixed = (scores.softmax(-1) @ v).transpose(0, 1).reshape(n, heads * size)
        x = x + mixed @ w[f"{block}.attn.c_proj.weight"].T
        inner = normed(x, f"{block}.ln_2")
        gated = (inner @ w[f"{block}.mlp.w1.weight"].T) * silu(inner @ w[f"{block}.mlp.w2.weight"].T)
        x = x + gated @ w[f"{block}.mlp.c_proj.weight"].T
    return normed(x, "transformer.ln_f") @ w["lm_head.weight"].T
