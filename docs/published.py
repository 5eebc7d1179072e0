"""The shapes of published models, in the words of their config.json; for docs, benchmarks and tests."""

from typing import Any

QWEN25_KEYS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "tie_word_embeddings",
)
QWEN25: dict[str, dict[str, Any]] = {
    size: {"model_type": "qwen2"} | dict(zip(QWEN25_KEYS, values, strict=True))
    for size, values in {
        "0.5B": (896, 4864, 24, 14, 2, 151936, True),
        "1.5B": (1536, 8960, 28, 12, 2, 151936, True),
        "3B": (2048, 11008, 36, 16, 2, 151936, True),
        "7B": (3584, 18944, 28, 28, 4, 152064, False),
        "14B": (5120, 13824, 48, 40, 8, 152064, False),
        "32B": (5120, 27648, 64, 40, 8, 152064, False),
        "72B": (8192, 29568, 80, 64, 8, 152064, False),
    }.items()
}
# Without groups of heads that share keys and values: four times the memory a token.
QWEN15_14B = QWEN25["14B"] | {"intermediate_size": 13696, "num_hidden_layers": 40, "num_key_value_heads": 40}
