#!/bin/sh
# transformers 5.19.0, tokenizers 0.23.3: AutoTokenizer does not follow a tokenizer.json.
#
# Input: a folder with a valid tokenizer.json (byte-level BPE; its pattern counts combining marks to words, as that of
# Qwen3.5 does), a tokenizer_config.json that names a class, and a config.json with a model_type.
#
# Behaviour: where transformers has a class with the name, the class takes the vocabulary from the file, but brings its
# own normalizer, pre-tokenizer and decoder. Some model types have a class of their own that goes before the name; for
# "qwen2" that is Qwen2Tokenizer even where the general class is named. Texts then become other ids than the file says:
# those with combining marks, as Thai, Hindi and Arabic have. Nothing is logged. For LlamaTokenizer
# the same is known: huggingface/transformers issue 48206.
#
# Seen on 2026-11-28, Python 3.11:
#   file                                       [259]
#   qwen3_5_text Qwen2Tokenizer                [257, 258]  Qwen2Tokenizer
#   qwen3_5_text PreTrainedTokenizerFast       [259]  TokenizersBackend
#   qwen2        PreTrainedTokenizerFast       [257, 258]  Qwen2Tokenizer
#
# Exits with 0 while that is so, with 1 if it has changed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check transformers==5.19.0 tokenizers==0.23.3
cd "$folder"
venv/bin/python - <<'PYTHON'
import json
import sys
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer

TEXT = "ที"  # a consonant and a combining mark; one token of this vocabulary
piece = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(TEXT)[0][0]
merges = [(piece[0], piece[1]), (piece[:2], piece[2]), (piece[:2], piece[5]), (piece[:3], piece[3:])]
words = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(pair) for pair in merges)]
written = Tokenizer(models.BPE({word: number for number, word in enumerate(words)}, merges))
written.pre_tokenizer = pre_tokenizers.Sequence(
    [
        pre_tokenizers.Split(Regex(r"[\p{L}\p{M}]+|[^\p{L}\p{M}]"), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
)
written.decoder = decoders.ByteLevel()
expected = written.encode(TEXT).ids
print(f"{'file':42} {expected}")


def load(model_type: str, name: str) -> bool:
    """Say whether AutoTokenizer makes the ids that the file says."""
    folder = Path(f"{model_type}-{name}")
    folder.mkdir()
    written.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": name}))
    (folder / "config.json").write_text(json.dumps({"model_type": model_type, "transformers_version": "5.19.0"}))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer.encode(TEXT, add_special_tokens=False)
    print(f"{model_type:12} {name:29} {ids}  {type(tokenizer).__name__}")
    return ids == expected


seen = [
    load("qwen3_5_text", "Qwen2Tokenizer"),
    load("qwen3_5_text", "PreTrainedTokenizerFast"),
    load("qwen2", "PreTrainedTokenizerFast"),
]
sys.exit(seen != [False, True, False])
PYTHON
