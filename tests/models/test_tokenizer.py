"""A tokenizer is loaded as its tokenizer.json says, or not at all."""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from vllm import EngineArgs
from vllm.tokenizers.registry import cached_tokenizer_from_config

from qwen_vllm.models import tokenizer as module
from qwen_vllm.models.checks import ModelUnavailable
from qwen_vllm.models.prepare import prepare
from qwen_vllm.models.qwen_v1 import PATTERN
from qwen_vllm.models.tokenizer import tokenizer_as_written
from tests.support.tiny_families import FAMILIES
from tests.support.tokenizers import QWEN36_PATTERN

TEXT = "สวัสดีครับ ผู้ใหญ่ नमस्ते हिन्दी مُحَمَّدٌ"
QWEN2 = {
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "max_position_embeddings": 256,
    "vocab_size": 1000,
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CACHE", tmp_path / "cache")


@cache
def trained(pattern: str) -> str:
    """A small byte-level vocabulary in the manner of Qwen's, as JSON."""
    vocabulary = Tokenizer(models.BPE())
    vocabulary.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    vocabulary.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)]
    )
    # As Qwen's files have it; transformers' classes write other options here, which decide on nothing.
    vocabulary.decoder = decoders.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary.train_from_iterator(
        [TEXT] * 5, trainers.BpeTrainer(vocab_size=900, initial_alphabet=alphabet, show_progress=False)
    )
    vocabulary.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    vocabulary.add_tokens([AddedToken("<think>", normalized=False), AddedToken("</think>", normalized=False)])
    return vocabulary.to_str()


def write(
    folder: Path, config: dict | None, tokenizer_class: str | None, pattern: str = QWEN36_PATTERN, **more: Any
) -> Path:
    """A model's folder without weights; `more` goes into tokenizer_config.json."""
    vocabulary = Tokenizer.from_str(trained(pattern))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=vocabulary, eos_token="<|im_end|>", chat_template="{{ 1 }}")
    tokenizer.save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    described = json.loads(file.read_text()) | {"tokenizer_class": tokenizer_class} | more
    file.write_text(json.dumps({name: value for name, value in described.items() if value is not None}))
    if config:
        (folder / "config.json").write_text(json.dumps({"transformers_version": "5.19.0", **config}))
    return folder


def arguments(folder: Path, **flags: Any) -> SimpleNamespace:
    defaults = {"tokenizer": None, "tokenizer_mode": "auto", "tokenizer_revision": None}
    return SimpleNamespace(
        **{"model": str(folder), "skip_tokenizer_init": False, "trust_remote_code": False, **defaults, **flags}
    )


MISREAD = {
    "text-only Qwen3.5": ({"model_type": "qwen3_5_text"}, "Qwen2Tokenizer"),
    "Qwen3 with Qwen3.5's vocabulary": ({"model_type": "qwen3"}, "Qwen2TokenizerFast"),
    "Qwen2, whatever is named": ({"model_type": "qwen2"}, "PreTrainedTokenizerFast"),
    "Llama, byte-level": ({"model_type": "llama"}, "LlamaTokenizerFast"),
    "a tokenizer alone": (None, "Qwen2Tokenizer"),
}
RIGHT = {
    "text-only Qwen3.5": ({"model_type": "qwen3_5_text"}, "Qwen3_5Tokenizer"),
    "Qwen3.5": ({"model_type": "qwen3_5"}, "Qwen2Tokenizer"),
    "text-only Qwen3.5, the general class": ({"model_type": "qwen3_5_text"}, "PreTrainedTokenizerFast"),
    "Qwen3.5, no class": ({"model_type": "qwen3_5_moe_text"}, None),
    "a tokenizer alone": (None, "PreTrainedTokenizerFast"),
}


@pytest.mark.parametrize(("config", "tokenizer_class"), MISREAD.values(), ids=MISREAD)
@pytest.mark.parametrize("flag", ["model", "tokenizer"])
def test_what_transformers_would_read_otherwise_is_mended(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], config: dict | None, tokenizer_class: str, flag: str
) -> None:
    folder = write(tmp_path / "Tiny", config, tokenizer_class)
    args = arguments(tmp_path / "elsewhere", **{flag: str(folder)})
    written = Tokenizer.from_file(str(folder / "tokenizer.json"))
    misread = module.load_tokenizer(str(folder), args)
    assert misread.encode(TEXT, add_special_tokens=False) != written.encode(TEXT).ids
    mended = tokenizer_as_written(args)
    tokenizer = module.load_tokenizer(mended, args)
    ids = tokenizer.encode(TEXT, add_special_tokens=False)
    assert ids == written.encode(TEXT).ids
    assert tokenizer.decode(ids) == TEXT
    assert tokenizer.added_tokens_decoder == written.get_added_tokens_decoder()
    assert (tokenizer.chat_template, tokenizer.eos_token) == ("{{ 1 }}", "<|im_end|>")
    said = capsys.readouterr().err
    assert said.startswith("The tokenizer of Tiny is loaded as its tokenizer.json says: ")
    assert said.count("\n") == 1
    assert tokenizer_as_written(args) == mended


@pytest.mark.parametrize(("config", "tokenizer_class"), RIGHT.values(), ids=RIGHT)
def test_what_is_read_rightly_is_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], config: dict | None, tokenizer_class: str | None
) -> None:
    args = arguments(write(tmp_path / "Tiny", config, tokenizer_class))
    assert tokenizer_as_written(args) is None
    assert not capsys.readouterr().err


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.config])
def test_no_family_gives_a_false_alarm(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    family = FAMILIES[name]
    if family.config["model_type"] == "qwen2":
        # Transformers takes the vocabulary alone, so that it has to be in the manner of Qwen's.
        family = replace(family, vocabulary=lambda: Tokenizer.from_str(trained(PATTERN)))
    family.tokenizer(small=True).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"transformers_version": "5.19.0", **family.config}))
    assert tokenizer_as_written(arguments(tmp_path)) is None
    assert not capsys.readouterr().err


def test_options_that_decide_on_nothing_give_no_alarm(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write(tmp_path / "Tiny", {"model_type": "qwen2"}, "Qwen2Tokenizer", PATTERN)
    assert tokenizer_as_written(arguments(folder)) is None
    assert not capsys.readouterr().err


def described_as_special(token: str) -> dict[str, Any]:
    """How tokenizer_config.json lists one token of all."""
    number = str(Tokenizer.from_str(trained(PATTERN)).token_to_id(token))
    return {number: {"content": token, "normalized": False, "special": True}}


@pytest.mark.parametrize(
    "described",
    [{"extra_special_tokens": ["<think>"]}, {"added_tokens_decoder": described_as_special("<|endoftext|>")}],
    ids=["made special", "left out"],
)
def test_added_tokens_are_those_of_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], described: dict
) -> None:
    folder = write(tmp_path / "Tiny", {"model_type": "qwen2"}, "Qwen2Tokenizer", PATTERN, **described)
    args, written = arguments(folder), Tokenizer.from_file(str(folder / "tokenizer.json"))
    paths = str(folder), tokenizer_as_written(args)
    misread, tokenizer = (module.load_tokenizer(path, args) for path in paths)
    assert misread.added_tokens_decoder != tokenizer.added_tokens_decoder == written.get_added_tokens_decoder()
    assert "The tokenizer of Tiny" in capsys.readouterr().err


def test_a_token_that_tokenizer_config_json_marks_as_special_is_special(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every class of transformers takes it so, and the model's makers did too."""
    described = {"added_tokens_decoder": described_as_special("<think>")}
    folder = write(tmp_path / "Tiny", {"model_type": "qwen3"}, "PreTrainedTokenizerFast", PATTERN, **described)
    assert tokenizer_as_written(arguments(folder)) is None
    assert not capsys.readouterr().err


def remove_file(folder: Path) -> dict[str, Any]:
    (folder / "tokenizer.json").unlink()
    return {}


def damage_file(folder: Path) -> dict[str, Any]:
    (folder / "tokenizer.json").write_text("{}")
    return {}


def bring_code(folder: Path) -> dict[str, Any]:
    code = "from transformers import Qwen2Tokenizer\n\n\nclass Own(Qwen2Tokenizer):\n    pass\n"
    (folder / "own.py").write_text(code)
    file = folder / "tokenizer_config.json"
    described = json.loads(file.read_text()) | {
        "tokenizer_class": "Own",
        "auto_map": {"AutoTokenizer": [None, "own.Own"]},
    }
    file.write_text(json.dumps(described))
    return {"trust_remote_code": True}


@pytest.mark.parametrize(
    "change",
    [
        remove_file,
        damage_file,
        bring_code,
        lambda folder: {"skip_tokenizer_init": True},
        lambda folder: {"tokenizer": "Qwen/Qwen3-8B"},
    ],
)
def test_what_cannot_be_compared_or_is_trusted_is_left_to_vllm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], dict[str, Any]]
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = write(tmp_path / "Tiny", {"model_type": "qwen3_5_text"}, "Qwen2Tokenizer")
    args = arguments(folder, **change(folder))
    assert tokenizer_as_written(args) == args.tokenizer


def test_what_cannot_be_mended_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(tmp_path / "Tiny", {"model_type": "qwen3_5_text"}, "Qwen2Tokenizer")

    def link_all(source: Path, target: Path) -> None:
        for file in source.iterdir():
            (target / file.name).symlink_to(file)

    monkeypatch.setattr(module, "_link", link_all)
    with pytest.raises(ModelUnavailable, match=r"Tiny would be read otherwise .* as Qwen2Tokenizer: name another"):
        tokenizer_as_written(arguments(folder))
    monkeypatch.setattr(module, "CACHE", folder / "config.json")
    with pytest.raises(ModelUnavailable, match=r"cannot write .*config.json"):
        tokenizer_as_written(arguments(folder))


def test_every_part_of_vllm_gets_the_mended_one(tmp_path: Path) -> None:
    folder = write(tmp_path / "Tiny", QWEN2, "Qwen2Tokenizer")
    args = EngineArgs(model=str(folder), load_format="dummy", dtype="float32")
    prepare(args, {}, None, {})
    tokenizer = cached_tokenizer_from_config(args.create_model_config())
    written = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert tokenizer.encode(TEXT, add_special_tokens=False) == written.encode(TEXT).ids
