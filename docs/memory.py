"""Which card for which model: the memory of the weights and of the keys and values, from the published shapes.

    python -m docs.memory                  the table of docs/models.md
    python -m docs.memory --model FOLDER   the same of a model's config.json

Counted are the weights, the keys and values in 16 bits, and what vLLM wants besides (RESERVED). vLLM's log says what
it found: "Available KV cache memory" and "GPU KV cache size".
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from docs.published import QWEN15_14B, QWEN25

CARDS = (8, 12, 16, 24, 48, 80)
"""Counted as 10^9 bytes a GB: cards have up to 7 % more, some of which the driver and error correction take."""
UTILIZATION = 0.92
"""vLLM's default of --gpu-memory-utilization."""
RESERVED = 1.5e9
"""Bytes for CUDA itself, its graphs and the largest step: a guess, vLLM measures it."""
MODELS = {f"Qwen2.5-{size}": config for size, config in QWEN25.items()} | {"Qwen1.5-14B": QWEN15_14B}
BITS = {"BF16": 16.0, "Int4": 4 + (16 + 4) / 128}
"""A weight of the layers; GPTQ and AWQ have a scale of 16 and a zero point of 4 bits for each 128. The rest has 16."""


def layer_weights(config: Mapping[str, Any]) -> int:
    """How many weights the matrices of all layers have, which are what gets quantised."""
    hidden, head = config["hidden_size"], _head(config)
    attention = 2 * hidden * head * (config["num_attention_heads"] + config["num_key_value_heads"])
    return config["num_hidden_layers"] * (attention + 3 * hidden * config["intermediate_size"])


def weight_bytes(config: Mapping[str, Any], bits: float) -> float:
    """Bytes of a Qwen2's weights, with `bits` for each one of its layers' matrices."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"] + 2 * config["num_key_value_heads"]
    embeddings = config["vocab_size"] * hidden * (1 if config["tie_word_embeddings"] else 2)
    biases_and_norms = config["num_hidden_layers"] * (heads * _head(config) + 2 * hidden) + hidden
    return layer_weights(config) * bits / 8 + 2 * (embeddings + biases_and_norms)


def token_bytes(config: Mapping[str, Any], width: int = 2) -> int:
    """Bytes of the keys and values of a token, at `width` bytes a number."""
    return 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * _head(config) * width


def tokens_that_fit(config: Mapping[str, Any], bits: float, card: float) -> int:
    """How many tokens of all conversations together fit beside the weights, on a card of so many GB."""
    return max(0, int((card * 1e9 * UTILIZATION - RESERVED - weight_bytes(config, bits)) // token_bytes(config)))


def table(models: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown: a line for each model and number format."""
    heads = ["model", "weights", "1,000 tokens", *(f"{card} GB" for card in CARDS)]
    lines = [heads, ["---"] * len(heads)]
    for name, config in models.items():
        for bits in BITS:
            room = (tokens_that_fit(config, BITS[bits], card) for card in CARDS)
            weights, tokens = weight_bytes(config, BITS[bits]) / 1e9, token_bytes(config) / 1e3
            lines.append([f"{name} {bits}", f"{weights:.1f} GB", f"{tokens:.0f} MB", *map(_thousands, room)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _head(config: Mapping[str, Any]) -> int:
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


def _thousands(tokens: int) -> str:
    return f"{tokens // 1000:,}k" if tokens >= 1000 else "–"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, metavar="FOLDER")
    folder = parser.parse_args().model
    if folder:
        print(table({folder.name: json.loads((folder / "config.json").read_text())}))
    else:
        print(table(MODELS))
