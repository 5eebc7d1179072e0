"""Models for speed only: the shape of a Qwen2.5 without weights, or of a Qwen3.5 with an MTP layer; a real vocabulary.

    python -m benchmarks.shapes 0.5B FOLDER
    python vllm_server.py --model FOLDER --load-format dummy

    python -m benchmarks.shapes 3.5-0.8B FOLDER [--guessed 0.7]
    python vllm_server.py --model FOLDER --language-model-only

What the first answers is noise. The second says the same words in the same order, and its MTP layer guesses a share of
them; its layers compute as those of a real one do, and add nothing.
"""

import argparse
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import (
    AutoConfig,
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
)

from docs.published import QWEN25, QWEN35
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


def write_words(folder: Path, text: dict[str, Any], guessed: float, words: int = 500) -> Path:
    """Write a Qwen3.5 with an MTP layer that says so many words in a fixed order, over and over.

    A word's embedding stands alone in its direction, and the output layer turns it into the word after it. Layers add
    nothing to it. The MTP layer passes on the embedding of a share `guessed` of the words; that of another it negates.

    Args:
        text: of the `text_config`; at least `words` + 1 wide.
    """
    torch.manual_seed(1)
    tokenizer = qwen_tokenizer()
    vision = {"depth": 1, "hidden_size": 64, "num_heads": 2, "intermediate_size": 128}
    text = {**text, "vocab_size": len(tokenizer), "mtp_num_hidden_layers": 1, "tie_word_embeddings": False}
    vision["out_hidden_size"] = hidden = text["hidden_size"]
    model = Qwen3_5ForConditionalGeneration(Qwen3_5Config(text_config=text, vision_config=vision)).to(torch.bfloat16)
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    last = text["num_hidden_layers"] - 1  # the last is one of full attention, as the MTP layer is
    layer = f"model.language_model.layers.{last}."
    weights |= {
        name.replace(layer, "mtp.layers.0."): w.clone() for name, w in weights.items() if name.startswith(layer)
    }
    for name, weight in weights.items():
        if name.endswith(("o_proj.weight", "out_proj.weight", "down_proj.weight")):
            weight.zero_()
    directions = torch.linalg.qr(torch.randn(hidden, hidden))[0][: words + 1]  # the last is that of all other tokens
    spoken = said_words(tokenizer)[:words]
    embedding, output = (torch.zeros(len(tokenizer), hidden) for _ in range(2))
    embedding[:] = directions[words]
    embedding[spoken] = directions[:words]
    output[spoken] = directions[:words].roll(1, 0)
    output[spoken[0]] += directions[words]
    sign = torch.where(torch.rand(words + 1) < guessed, 1.0, -1.0)
    passes = directions.T @ (sign[:, None] * directions)
    norms = ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden")
    weights |= {f"mtp.{name}.weight": torch.zeros(hidden) for name in norms}  # a factor of one
    weights |= {
        "mtp.fc.weight": torch.cat([passes, torch.zeros(hidden, hidden)], dim=1),
        "model.language_model.embed_tokens.weight": embedding,
        "lm_head.weight": 30 * output,
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: weight.to(torch.bfloat16).contiguous() for name, weight in weights.items()}, folder / "model.safetensors"
    )
    model.config.architectures = ["Qwen3_5ForConditionalGeneration"]
    model.config.save_pretrained(folder)
    GenerationConfig(eos_token_id=[151645, 151643]).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def said_words(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Return the ids of the tokens that are a space and a few letters, in the order in which they are said."""
    return sorted(number for token, number in tokenizer.get_vocab().items() if re.fullmatch("Ġ[a-z]{3,}", token))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=(*SHAPES, *(f"3.5-{size}" for size in QWEN35)))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--guessed", type=float, default=0.7, help="share of the words (default: 0.7)")
    args = parser.parse_args()
    if args.shape in SHAPES:
        write(args.shape, args.folder)
    else:
        write_words(args.folder, QWEN35[args.shape.removeprefix("3.5-")], args.guessed)
