"""A model that says what a test wants it to say, on the real engine."""

from itertools import pairwise
from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM


def write_reciter(
    folder: Path, tokenizer: PreTrainedTokenizerFast, *texts: str | list[int], vocab_size: int | None = None
) -> None:
    """Writes a Qwen3 that recites: after the first token of a text comes its second, and so on, whatever came before.

    Attention and MLP add nothing; each token of the texts has a dimension of its own, and the head maps it to the next.

    Args:
        tokenizer: goes into the folder, with its chat template.
        texts: or their token ids. Control tokens count in them. Over all of them, a token is always followed by the
            same one.
        vocab_size: rows of the embeddings, where they are more than the tokenizer's tokens.
    """
    following = {}
    for text in texts:
        token_ids = tokenizer.encode(text, add_special_tokens=False) if isinstance(text, str) else text
        for token, after in pairwise(token_ids):
            assert following.setdefault(token, after) == after, tokenizer.decode([token])
    config = Qwen3Config(
        vocab_size=vocab_size or len(tokenizer),
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
    )
    model = Qwen3ForCausalLM(config)
    layer, embeddings, head = model.model.layers[0], model.model.embed_tokens.weight, model.lm_head.weight
    with torch.no_grad():
        for weight in (layer.self_attn.o_proj.weight, layer.mlp.down_proj.weight, embeddings, head):
            weight.zero_()
        for dimension, (token, after) in enumerate(following.items()):
            embeddings[token, dimension] = head[after, dimension] = 1
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id)
    model.bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
