"""Models without weights, for speed only: the shape of a Qwen2.5 and its real vocabulary.

    python -m benchmarks.shapes 0.5B FOLDER
    python vllm_server.py --model FOLDER --load-format dummy

What they answer is noise.
"""

import argparse
from pathlib import Path

from transformers import AutoConfig, GenerationConfig

from docs.published import QWEN25
from tests.support.tokenizers import qwen_tokenizer

SHAPES = QWEN25 | {
    # Next to no computing: what is left is the server.
    "tiny": QWEN25["0.5B"]
    | {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
    }
}


def write(shape: str, folder: Path) -> None:
    """Write the description and the tokenizer of a model, with the sampling that Qwen2.5 recommends."""
    qwen_tokenizer().save_pretrained(folder)
    config = AutoConfig.for_model(**SHAPES[shape], rope_theta=1e6, max_position_embeddings=32768, dtype="bfloat16")
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
