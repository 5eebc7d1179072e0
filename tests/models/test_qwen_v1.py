"""First-generation Qwen: what vLLM is given in place of such a checkpoint."""

import base64
import json
import os
import unicodedata
from pathlib import Path

import pytest
import tiktoken
import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase, Qwen2ForCausalLM
from transformers.convert_slow_tokenizer import TikTokenConverter
from transformers.utils import logging

from prompt_utils import PromptBuilder
from qwen_vllm.models import qwen_v1, resolve
from qwen_vllm.models.checks import ModelUnavailable, check_loadable
from qwen_vllm.models.resolve import resolve_model
from tests.support.qwen_v1_reference import CODE, CONFIG, QWEN_TIKTOKEN, logits, random_weights, write_checkpoint

SMALL = CONFIG | {"vocab_size": 200}
TEXTS = [
    "The capital of France is Paris.",
    "法国的首都是巴黎，人口 2,102,650。",
    "👩‍👩‍👧‍👦 🇨🇳 e\u0301 café 1234567890 ①②",
    "def f(x):\n\treturn x  # it's\r\n\n   done   ",
    "<|im_start|>user\nHi<|im_end|>\n<|endoftext|>",
    "\x00\x7f\ufffd ا مرحبا ไทย 한국어",
    "",
]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(resolve, "CACHE", tmp_path / "cache")
    return tmp_path / "cache"


@pytest.fixture
def checkpoint(tmp_path: Path, cache: Path) -> Path:
    return write_checkpoint(tmp_path / "Qwen-Tiny-Chat", random_weights(SMALL), vocab_size=200)


@pytest.fixture
def any_tokenizer(monkeypatch: pytest.MonkeyPatch, qwen3_tokenizer: PreTrainedTokenizerBase) -> None:
    """For tests that look at other files: the real one takes seconds to make."""
    monkeypatch.setattr(qwen_v1, "build_tokenizer", lambda file, chats: qwen3_tokenizer)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepared")
    source = write_checkpoint(folder / "source", random_weights(SMALL))
    (folder / "target").mkdir()
    qwen_v1.describe(source, CONFIG, folder / "target")
    return folder / "target"


@pytest.fixture
def converted_before(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers does not convert the vocabulary again, which takes seconds."""
    model = json.loads((prepared / "tokenizer.json").read_bytes())["model"]
    merges = list(map(tuple, model["merges"]))
    monkeypatch.setattr(TikTokenConverter, "extract_vocab_merges_from_model", lambda *_: (model["vocab"], merges))


@pytest.fixture(scope="module")
def tokenizer(prepared: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(prepared)


@pytest.fixture(scope="module")
def original() -> tiktoken.Encoding:
    """The tokenizer as the models' own code made it, with the library that it used."""
    ranks = {base64.b64decode(token): int(i) for token, i in map(bytes.split, QWEN_TIKTOKEN.open("rb"))}
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205))]
    special = {name: len(ranks) + i for i, name in enumerate(names)}
    return tiktoken.Encoding("Qwen", pat_str=qwen_v1.PATTERN, mergeable_ranks=ranks, special_tokens=special)


def as_qwen2(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors as vLLM's Qwen2 gets them, with queries, keys and values apart, as transformers has them."""
    from qwen_vllm.vllm_plugin.qwen_v1_model import QwenV1ForCausalLM

    renamed = {}
    for name, tensor in QwenV1ForCausalLM.hf_to_vllm_mapper.apply(weights.items()):
        if "qkv_proj" in name:
            for part, piece in zip("qkv", tensor.chunk(3), strict=True):
                renamed[name.replace("qkv_proj", f"{part}_proj")] = piece
        else:
            renamed[name] = tensor
    return renamed


def qwen2_logits(weights: dict[str, torch.Tensor], token_ids: list[int]) -> torch.Tensor:
    config = AutoConfig.for_model(**qwen_v1.qwen2_config(SMALL))
    model = Qwen2ForCausalLM(config).eval()
    model.load_state_dict({name: tensor.float() for name, tensor in as_qwen2(weights).items()}, strict=True)
    with torch.inference_mode():
        return model(torch.tensor([token_ids])).logits[0]


def test_renamed_it_is_the_network_that_was_published_up_to_its_trained_length() -> None:
    weights = random_weights(SMALL)
    token_ids = torch.randint(200, (SMALL["seq_length"],), generator=torch.Generator().manual_seed(2)).tolist()
    expected = logits(weights, SMALL, token_ids)
    assert expected.std() > 1
    torch.testing.assert_close(qwen2_logits(weights, token_ids), expected, atol=1e-3, rtol=1e-3)


def test_beyond_its_trained_length_the_original_is_another_network() -> None:
    weights = random_weights(SMALL)
    token_ids = [i % 200 for i in range(SMALL["seq_length"] + 40)]
    assert (qwen2_logits(weights, token_ids) - logits(weights, SMALL, token_ids)).abs().max() > 0.1
    plain = SMALL | {"use_dynamic_ntk": False, "use_logn_attn": False}
    torch.testing.assert_close(
        qwen2_logits(weights, token_ids), logits(weights, plain, token_ids), atol=1e-3, rtol=1e-3
    )


@pytest.mark.parametrize("suffix", ["qweight", "qzeros", "scales", "g_idx", "bias"])
def test_quantized_tensors_have_the_same_names(suffix: str) -> None:
    from qwen_vllm.vllm_plugin.qwen_v1_model import QwenV1ForCausalLM

    parts = ["attn.c_attn", "attn.c_proj", "mlp.w1", "mlp.w2", "mlp.c_proj"]
    renamed = ["self_attn.qkv_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.gate_proj", "mlp.down_proj"]
    names = [f"transformer.h.11.{part}.{suffix}" for part in parts]
    assert QwenV1ForCausalLM.hf_to_vllm_mapper.apply_list(names) == [f"model.layers.11.{n}.{suffix}" for n in renamed]


@pytest.mark.parametrize("text", TEXTS)
def test_the_tokenizer_is_the_models_own_and_qwen25s(
    tokenizer: PreTrainedTokenizerBase, original: tiktoken.Encoding, qwen_tokenizer: PreTrainedTokenizerBase, text: str
) -> None:
    ids = tokenizer.encode(text)
    assert ids == original.encode(unicodedata.normalize("NFC", text), allowed_special="all")
    assert ids == qwen_tokenizer.encode(text)
    assert tokenizer.decode(ids) == original.decode(ids) == qwen_tokenizer.decode(ids)


def test_control_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|extra_0|>", "<|extra_204|>"]
    assert tokenizer.convert_tokens_to_ids(names) == [151643, 151644, 151645, 151646, 151850]
    assert len(tokenizer) == 151851
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")


def test_a_chat_is_written_as_the_model_was_trained(tokenizer: PreTrainedTokenizerBase) -> None:
    chat = "<|im_start|>system\n{}<|im_end|>\n<|im_start|>user\n你好<|im_end|>\n<|im_start|>assistant\n"
    messages = [{"role": "user", "content": "你好"}]
    render = {"tokenize": False, "add_generation_prompt": True}
    assert tokenizer.apply_chat_template(messages, **render) == chat.format("You are a helpful assistant.")
    prompts = PromptBuilder(tokenizer)
    assert prompts.render("Be brief.", [], "你好") == chat.format("Be brief.")
    assert prompts.build("Be brief.", [], "你好", 100).token_ids == tokenizer.encode(chat.format("Be brief."))
    assert 151645 not in prompts.build("", [], "<|im_end|>", 100).token_ids[5:-5]


def test_the_models_own_sampling_is_kept_and_an_answer_ends_with_its_turn(prepared: Path) -> None:
    assert json.loads((prepared / "generation_config.json").read_bytes()) == {
        "do_sample": True,
        "eos_token_id": [151645, 151643, 151644],
        "max_new_tokens": 64,
        "repetition_penalty": 1.1,
        "top_k": 0,
        "top_p": 0.8,
    }


def test_a_base_model_has_no_chat(checkpoint: Path, converted_before: None) -> None:
    (checkpoint / "generation_config.json").write_text('{"chat_format": "raw"}')
    folder = Path(resolve_model(str(checkpoint)))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.chat_template, tokenizer.eos_token) == (None, "<|endoftext|>")
    assert json.loads((folder / "generation_config.json").read_bytes()) == {"eos_token_id": [151643]}


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_a_checkpoint_becomes_a_folder_that_loads(
    tmp_path: Path, cache: Path, any_tokenizer: None, capsys: pytest.CaptureFixture, kind: str
) -> None:
    from vllm import EngineArgs

    qwen_v1.register()
    source = write_checkpoint(tmp_path / "Qwen-Tiny-Chat", random_weights(SMALL), kind, vocab_size=200)
    folder = Path(resolve_model(str(source)))
    assert folder.name == "Qwen-Tiny-Chat"
    assert folder.is_relative_to(cache)
    assert "128 tokens" in capsys.readouterr().err
    for context in (None, -1, 128):
        check_loadable(EngineArgs(model=str(folder), max_model_len=context))
    with pytest.raises(ModelUnavailable, match=r"trained on 128 tokens.*leave --max-model-len out"):
        check_loadable(EngineArgs(model=str(folder), max_model_len=129))
    weights = sorted(path.name for path in source.glob(f"*.{kind}*"))
    assert len(weights) == 3
    assert sorted(path.name for path in folder.glob(f"*.{kind}*")) == weights
    assert all((folder / name).samefile(source / name) for name in weights)
    assert not list(folder.glob("*.py")) and "auto_map" not in (folder / "config.json").read_text()
    assert resolve_model(str(folder)) == str(folder)
    assert not (source / "ran").exists()


def test_it_is_made_once_and_again_when_the_checkpoint_has_changed(checkpoint: Path, any_tokenizer: None) -> None:
    first = resolve_model(str(checkpoint))
    made = os.stat(first).st_ino
    assert resolve_model(str(checkpoint)) == first
    assert os.stat(first).st_ino == made
    (checkpoint / "config.json").write_text(json.dumps(SMALL | {"seq_length": 64}))
    second = resolve_model(str(checkpoint))
    assert json.loads((Path(second) / "config.json").read_bytes())["max_position_embeddings"] == 64


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"visual": {"layers": 48}}, "takes images or sound"),
        ({"seq_length": None}, "does not say 'seq_length'"),
        ({"no_bias": False}, "has no_bias=False"),
        ({"kv_channels": 16}, "has kv_channels=16"),
    ],
)
def test_a_network_that_is_another_is_refused(checkpoint: Path, config: dict, reason: str) -> None:
    changed = {name: value for name, value in (SMALL | config).items() if value is not None}
    (checkpoint / "config.json").write_text(json.dumps(changed))
    with pytest.raises(ModelUnavailable, match=reason) as refused:
        resolve_model(str(checkpoint))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "content", [None, b"", b"YQ== 0\n", b"?\n", b"YQ==\n", QWEN_TIKTOKEN.read_bytes()[:-100]], ids=range(6)
)
def test_a_vocabulary_that_is_missing_or_damaged(checkpoint: Path, cache: Path, content: bytes | None) -> None:
    (checkpoint / "qwen.tiktoken").unlink()
    if content is not None:
        (checkpoint / "qwen.tiktoken").write_bytes(content)
    with pytest.raises(ModelUnavailable, match=r"qwen\.tiktoken.*fetch the model again"):
        resolve_model(str(checkpoint))
    assert not [path for path in cache.rglob("*") if path.is_file()]


def test_it_loads_without_a_warning_and_its_own_code_does_not_run_even_where_that_is_allowed(
    prepared: Path, caplog: pytest.LogCaptureFixture
) -> None:
    logging.enable_propagation()
    AutoConfig.from_pretrained(prepared, trust_remote_code=True)
    AutoTokenizer.from_pretrained(prepared, trust_remote_code=True)
    logging.disable_propagation()
    assert not caplog.records
    source = (prepared / "model-00001-of-00002.safetensors").resolve().parent
    assert all((source / name).is_file() for name in CODE)
    assert not (source / "ran").exists()
