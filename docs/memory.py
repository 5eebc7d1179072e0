"""Which card for which model: the memory of the weights, the keys and values, and the state of linear attention.

    python -m docs.memory                  the tables of docs/models.md
    python -m docs.memory --model FOLDER   the same of a model's config.json

Counted are the weights of the language model, the keys and values in 16 bits, and what vLLM wants besides (RESERVED).
vLLM's log says what it found: "Available KV cache memory" and "GPU KV cache size".

A hybrid model (Qwen3-Next, Qwen3.5 to 3.8) has keys and values in its full-attention layers alone. Its other layers,
of gated delta net (GDN), keep a state of fixed size for each request. vLLM 0.32 gives out both in blocks of one size:
as many tokens as make the keys and values of a layer as large as the state of a GDN layer.
"""

import argparse
import json
from collections.abc import Mapping
from math import ceil
from pathlib import Path
from typing import Any

from docs.published import QWEN3_CODER_30B, QWEN3_NEXT_80B, QWEN15_14B, QWEN25, QWEN35, QWEN35_MOE

Config = Mapping[str, Any]

CARDS = (8, 12, 16, 24, 32, 48, 80, 141)
"""Counted as 10^9 bytes a GB: cards have up to 7 % more, some of which the driver and error correction take."""
UTILIZATION = 0.92
"""vLLM's default of --gpu-memory-utilization."""
RESERVED = 1.5e9
"""Bytes for CUDA itself, its graphs and the largest step: a guess, vLLM measures it."""
REQUESTS = 8
"""Requests at once that a hybrid model's row leaves room for."""
STATES = 2
"""States of a GDN layer a request can hold: with the prefix cache (the default), the one before the last block too."""
KERNEL_BLOCK = 16
"""vLLM's attention backends for GPUs take blocks of a multiple of so many tokens."""

MODELS: dict[str, Config] = {
    **{f"Qwen2.5-{size}": config for size, config in QWEN25.items()},
    "Qwen1.5-14B": QWEN15_14B,
    "Qwen3-Coder-30B-A3B": QWEN3_CODER_30B,
}
HYBRID_MODELS: dict[str, Config] = {
    **{f"Qwen3.5-{size}": QWEN35[size] for size in ("0.8B", "2B", "4B", "9B")},
    "Qwen3.5, 3.6, 3.8-27B": QWEN35["27B"],
    "Qwen3.5, 3.6-35B-A3B": QWEN35_MOE["35B-A3B"],
    "Qwen3.5-122B-A10B": QWEN35_MOE["122B-A10B"],
    "Qwen3-Next-80B, Qwen3-Coder-Next": QWEN3_NEXT_80B,
}
BITS = {"BF16": 16.0, "FP8": 8.0, "Int4": 4 + (16 + 4) / 128}
"""A weight of the layers; GPTQ and AWQ have a scale of 16 and a zero point of 4 bits for each 128. The rest has 16."""


def gdn_layers(config: Config) -> int:
    """Count the layers of gated delta net, which have no keys and values."""
    layers = config["num_hidden_layers"]
    return layers - layers // config.get("full_attention_interval", 4) if _is_hybrid(config) else 0


def weight_bytes(config: Config, bits: float) -> float:
    """Compute the bytes of a language model's weights, with `bits` for each one that is quantised.

    In 4 bits a hybrid model has its MLPs or experts alone, as in the checkpoints of its makers.
    """
    experts, projections, rest = _mlps(config), _projections(config), _rest(config)
    if bits < BITS["FP8"] and _is_hybrid(config):
        return experts * bits / 8 + 2 * (projections + rest)
    return (experts + projections) * bits / 8 + 2 * rest


def token_bytes(config: Config) -> int:
    """Compute the bytes of the keys and values of a token, in 16 bits, in all layers that have them."""
    return (config["num_hidden_layers"] - gdn_layers(config)) * _layer_token_bytes(config)


def state_bytes(config: Config) -> int:
    """Compute the bytes of a request's state in one GDN layer: its convolution's last inputs, and its matrix."""
    keys, values = _gdn_widths(config)
    convolution = (config["linear_conv_kernel_dim"] - 1) * (2 * keys + values)
    width = 4 if config.get("mamba_ssm_dtype") == "float32" else 2
    return 2 * convolution + width * values * config["linear_key_head_dim"]


def block_tokens(config: Config) -> int:
    """Count the tokens of a block of the KV cache: of a hybrid model as vLLM makes them, of others 1."""
    if not _is_hybrid(config):
        return 1
    return KERNEL_BLOCK * ceil(state_bytes(config) / (KERNEL_BLOCK * _layer_token_bytes(config)))


def request_bytes(config: Config) -> int:
    """Compute the bytes that a running request takes beside its keys and values, however long it is."""
    return STATES * gdn_layers(config) * block_tokens(config) * _layer_token_bytes(config)


def tokens_that_fit(config: Config, bits: float, card: float) -> int:
    """Count the tokens of all conversations together that fit beside the weights on a card of so many GB.

    The state of REQUESTS requests is set aside first.
    """
    room = card * 1e9 * UTILIZATION - RESERVED - weight_bytes(config, bits) - REQUESTS * request_bytes(config)
    block = block_tokens(config)
    return max(0, int(room // (block * token_bytes(config))) * block)


def table(models: Mapping[str, Config]) -> str:
    """Make Markdown: a line for each model and number format; hybrid models have FP8 too, and a column of the state."""
    hybrid = any(map(_is_hybrid, models.values()))
    heads = ["model", "weights", "1,000 tokens", *["a request"] * hybrid, *(f"{card} GB" for card in CARDS)]
    lines = [heads, ["---"] * len(heads)]
    for name, config in models.items():
        for number in BITS if hybrid else ("BF16", "Int4"):
            weights = f"{weight_bytes(config, BITS[number]) / 1e9:.1f} GB"
            token, state = (f"{count / 1e6:.0f} MB" for count in (1000 * token_bytes(config), request_bytes(config)))
            room = (_thousands(tokens_that_fit(config, BITS[number], card)) for card in CARDS)
            lines.append([f"{name} {number}", weights, token, *[state] * hybrid, *room])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _is_hybrid(config: Config) -> bool:
    return "linear_num_value_heads" in config


def _head(config: Config) -> int:
    head: int = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return head


def _layer_token_bytes(config: Config) -> int:
    """Compute the bytes of a token's keys and values in one layer."""
    return 2 * 2 * int(config["num_key_value_heads"]) * _head(config)


def _gdn_widths(config: Config) -> tuple[int, int]:
    """Compute how many numbers the keys, and the values, of a token are in a GDN layer."""
    keys = config["linear_num_key_heads"] * config["linear_key_head_dim"]
    return keys, config["linear_num_value_heads"] * config["linear_value_head_dim"]


def _mlps(config: Config) -> int:
    """Count the weights of all MLPs, or of all routed experts."""
    if "num_experts" in config:
        return 3 * _per_layer(config, config["num_experts"] * config["moe_intermediate_size"])
    return 3 * _per_layer(config, config["intermediate_size"])


def _projections(config: Config) -> int:
    """Count the weights of the other large matrices: those around attention and GDN, and the shared experts."""
    hidden, head, gdn = config["hidden_size"], _head(config), gdn_layers(config)
    queries = config["num_attention_heads"] * (3 if _is_hybrid(config) else 2)  # A gate is as large as the queries.
    attention = hidden * head * (queries + 2 * config["num_key_value_heads"])
    count = (config["num_hidden_layers"] - gdn) * attention
    count += 3 * _per_layer(config, config.get("shared_expert_intermediate_size", 0))
    if gdn:
        keys, values = _gdn_widths(config)
        count += gdn * hidden * (2 * keys + 3 * values)
    return count


def _rest(config: Config) -> int:
    """Count what always has 16 bits: embeddings, norms, biases, routers, and the small parts of GDN."""
    hidden, layers, gdn = config["hidden_size"], config["num_hidden_layers"], gdn_layers(config)
    count = (
        config["vocab_size"] * hidden * (1 if config.get("tie_word_embeddings") else 2) + 2 * layers * hidden + hidden
    )
    heads = config["num_attention_heads"] + 2 * config["num_key_value_heads"]
    count += (layers - gdn) * _head(config) * (heads if config["model_type"].startswith("qwen2") else 2)
    count += _per_layer(config, config.get("num_experts", 0) + ("shared_expert_intermediate_size" in config))
    if gdn:
        keys, values = _gdn_widths(config)
        convolution = config["linear_conv_kernel_dim"] * (2 * keys + values)
        gates = config["linear_num_value_heads"] * (2 * hidden + 2)
        count += gdn * (convolution + gates + config["linear_value_head_dim"])
    return count


def _per_layer(config: Config, width: int) -> int:
    """Count the weights of a matrix between the hidden size and `width`, in all layers."""
    return int(config["num_hidden_layers"] * config["hidden_size"] * width)


def _thousands(tokens: int) -> str:
    return f"{tokens // 1000:,}k" if tokens >= 1000 else "–"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, metavar="FOLDER")
    folder = parser.parse_args().model
    if folder:
        described = json.loads((folder / "config.json").read_text())
        print(table({folder.name: described | described.get("text_config", {})}))
    else:
        print(table(MODELS), table(HYBRID_MODELS), sep="\n\n")
