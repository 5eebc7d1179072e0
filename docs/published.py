"""The shapes of published models, in the words of their config.json; for docs, benchmarks and tests."""

from typing import Any

Shape = dict[str, Any]


def _shapes(common: Shape, keys: tuple[str, ...], sizes: dict[str, tuple[Any, ...]]) -> dict[str, Shape]:
    """Return the shape of each size: what all have in common, and its own values by `keys`."""
    return {size: common | dict(zip(keys, values, strict=True)) for size, values in sizes.items()}


QWEN25_KEYS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "tie_word_embeddings",
)
QWEN25 = _shapes(
    {"model_type": "qwen2"},
    QWEN25_KEYS,
    {
        "0.5B": (896, 4864, 24, 14, 2, 151936, True),
        "1.5B": (1536, 8960, 28, 12, 2, 151936, True),
        "3B": (2048, 11008, 36, 16, 2, 151936, True),
        "7B": (3584, 18944, 28, 28, 4, 152064, False),
        "14B": (5120, 13824, 48, 40, 8, 152064, False),
        "32B": (5120, 27648, 64, 40, 8, 152064, False),
        "72B": (8192, 29568, 80, 64, 8, 152064, False),
    },
)
# Without groups of heads that share keys and values: four times the memory a token.
QWEN15_14B = QWEN25["14B"] | {"intermediate_size": 13696, "num_hidden_layers": 40, "num_key_value_heads": 40}
QWEN3_CODER_30B: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "vocab_size": 151936,
    "tie_word_embeddings": False,
}

_GDN = {
    "head_dim": 256,
    "full_attention_interval": 4,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 16,
}
QWEN35_KEYS = (*QWEN25_KEYS[:5], "linear_num_value_heads", "tie_word_embeddings")
QWEN35 = _shapes(
    {"model_type": "qwen3_5_text", "vocab_size": 248320, "mamba_ssm_dtype": "float32"} | _GDN,
    QWEN35_KEYS,
    {
        "0.8B": (1024, 3584, 24, 8, 2, 16, True),
        "2B": (2048, 6144, 24, 8, 2, 16, True),
        "4B": (2560, 9216, 32, 16, 4, 32, True),
        "9B": (4096, 12288, 32, 16, 4, 32, False),
        "27B": (5120, 17408, 64, 24, 4, 48, False),
    },
)
QWEN35_MOE_KEYS = (
    "hidden_size",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "num_experts",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "linear_num_value_heads",
)
_MOE = {"model_type": "qwen3_5_moe_text", "vocab_size": 248320, "mamba_ssm_dtype": "float32"}
QWEN35_MOE = _shapes(
    _MOE | _GDN | {"tie_word_embeddings": False},
    QWEN35_MOE_KEYS,
    {
        "35B-A3B": (2048, 512, 512, 256, 40, 16, 2, 32),
        "122B-A10B": (3072, 1024, 1024, 256, 48, 32, 2, 64),
    },
)
# Its config.json names no number format for the state, which is then of the model's own 16 bits.
QWEN3_NEXT_80B: dict[str, Any] = (
    {"model_type": "qwen3_next", "vocab_size": 151936, "tie_word_embeddings": False}
    | _GDN
    | dict(zip(QWEN35_MOE_KEYS, (2048, 512, 512, 512, 48, 16, 2, 32), strict=True))
)
