"""A model that says what a test wants it to say, on the real engine."""

from collections import defaultdict
from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

LOOKS_BACK = 14
"""How many tokens, at most, a reciter goes by."""
CODE, HEAD = 24, 64


def write_reciter(
    folder: Path, tokenizer: PreTrainedTokenizerFast, *texts: str | list[int], vocab_size: int | None = None
) -> None:
    """Writes a Qwen3 that recites: after the first token of a text comes its second, and so on, whatever came before.

    It goes by the last tokens, as few as tell what follows, and ends where it knows nothing. Each token of the texts
    has a code. Attention head h looks at the token h + 1 places back and copies its code; a neuron of the MLP fires on
    a run of codes and writes the code of the token that follows, which the head reads.

    Args:
        tokenizer: goes into the folder, with its chat template.
        texts: or their token ids. Control tokens count in them. Over all of them, LOOKS_BACK tokens are always
            followed by the same one. A text that begins like a part of others goes on where nothing else tells.
        vocab_size: rows of the embeddings, where they are more than the tokenizer's tokens.
    """
    lists = [tokenizer.encode(text, add_special_tokens=False) if isinstance(text, str) else text for text in texts]
    rules = _rules(lists)
    codes = _codes({token for token_ids in lists for token in token_ids})
    heads = LOOKS_BACK - 1
    config = Qwen3Config(
        vocab_size=vocab_size or len(tokenizer),
        hidden_size=CODE * (LOOKS_BACK + 2),  # a constant; the codes of the last tokens; the code of the next
        intermediate_size=(len(rules) + 63) // 64 * 64,
        num_hidden_layers=1,
        num_attention_heads=heads,
        num_key_value_heads=1,
        head_dim=HEAD,
        max_position_embeddings=2**16,
        rope_parameters={"rope_type": "default", "rope_theta": 10.0},
        tie_word_embeddings=False,
    )
    model = Qwen3ForCausalLM(config)
    layer, embeddings, head = model.model.layers[0], model.model.embed_tokens.weight, model.lm_head.weight
    attention, mlp, last = layer.self_attn, layer.mlp, slice(-CODE, None)
    with torch.no_grad():
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj):
            linear.weight.zero_()
        for weight in (mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight, embeddings, head):
            weight.zero_()
        embeddings[:, 0] = 1
        for token, code in codes.items():
            embeddings[token, _place(0)], head[token, last] = code, code
        head[tokenizer.eos_token_id, 0] = 8
        # The scores are highest where the query's turn undoes the distance.
        turns = config.rope_parameters["rope_theta"] ** -(torch.arange(HEAD // 2) * 2 / HEAD)
        for h in range(heads):
            attention.q_proj.weight[h * HEAD :][:HEAD, 0] = torch.cat(
                [torch.cos((h + 1) * turns), -torch.sin((h + 1) * turns)]
            )
            attention.o_proj.weight[_place(h + 1), h * HEAD :][:, :CODE] = torch.eye(CODE)
        attention.k_proj.weight[: HEAD // 2, 0] = 1
        attention.q_norm.weight.fill_(8)
        attention.k_norm.weight.fill_(8)
        attention.v_proj.weight[:CODE, _place(0)] = torch.eye(CODE) * ((1 + CODE) / config.hidden_size) ** 0.5
        for neuron, (run, (after, strength)) in enumerate(rules.items()):
            for back, token in enumerate(reversed(run)):
                mlp.gate_proj.weight[neuron, _place(back)] = 4 * codes[token]
            mlp.gate_proj.weight[neuron, 0] = -4 * (CODE * len(run) - CODE // 4)
            mlp.up_proj.weight[neuron, 0] = 1
            mlp.down_proj.weight[last, neuron] = codes[after] * strength
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id)
    model.bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _place(back: int) -> slice:
    """Where the code of the token is that came so many places back."""
    return slice(CODE * (back + 1), CODE * (back + 2))


def _rules(lists: list[list[int]]) -> dict[tuple[int, ...], tuple[int, float]]:
    """What follows on which tokens, as few as are followed by one token alone; and how much that counts."""
    after = defaultdict[tuple[int, ...], set[int]](set)
    for token_ids in lists:
        for end in range(1, len(token_ids)):
            for start in range(max(0, end - LOOKS_BACK), end):
                after[tuple(token_ids[start:end])].add(token_ids[end])
    rules = {}
    for token_ids in lists:
        for end in range(1, len(token_ids)):
            runs = [tuple(token_ids[start:end]) for start in range(end - 1, max(-1, end - LOOKS_BACK - 1), -1)]
            run = next((run for run in runs if len(after[run]) == 1), runs[-1])
            clear = len(after[run]) == 1
            assert clear or end < LOOKS_BACK, (token_ids[:end], token_ids[end])
            rules[run] = token_ids[end], 1 if clear else 0.4
    return rules


def _codes(tokens: set[int]) -> dict[int, torch.Tensor]:
    """A code of ±1 for each token, any two of which differ in a quarter of their places or more."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.empty(0, CODE)
    while len(codes) < len(tokens):
        code = torch.randint(2, (CODE,), generator=generator) * 2.0 - 1
        if not len(codes) or (codes @ code).max() <= CODE // 2:
            codes = torch.vstack([codes, code])
    return dict(zip(sorted(tokens), codes, strict=True))
