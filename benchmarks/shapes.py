"""Models without weights, for speed only: the shape of a Qwen2.5 and its real vocabulary.

    python -m benchmarks.shapes 0.5B FOLDER
    python vllm_server.py --model FOLDER --load-format dummy

What they answer is noise.
"""

import argparse
from pathlib import Path

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


def write(shape: str, folder: Path) -> None:
    """Writes the description and the tokenizer of a model, with the sampling that Qwen2.5 recommends."""
    # Here, so that docs.memory, which needs the numbers alone, does not wait for them.
    from transformers import GenerationConfig, Qwen2Config

    from tests.support.tokenizers import qwen_tokenizer

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
