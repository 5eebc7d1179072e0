"""What is refused before vLLM loads it, and what is not."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from qwen_vllm import hardware
from qwen_vllm.models import checks
from qwen_vllm.models.checks import (
    ModelUnavailable,
    check_loadable,
    checked_config,
    language_part_only,
    number_format,
    weight_files,
)
from tests.support.tiny_checkpoints import POINTER, write_model

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True}
LOADING = {
    "tokenizer": None,
    "skip_tokenizer_init": False,
    "trust_remote_code": False,
    "load_format": "auto",
    "dtype": "auto",
    "hf_overrides": {},
}


@pytest.mark.parametrize(
    ("config", "missing", "flags", "reason"),
    [
        ({}, "model.safetensors", {}, "holds no weights"),
        ({}, "tokenizer.json", {}, "holds no tokenizer"),
        ({"architectures": ["NobodysModel"]}, None, {}, "does not know the architecture of .*: NobodysModel"),
        ({"architectures": None}, None, {}, "does not know the architecture of .*: none"),
        ({"architectures": ["NobodysModel"], "auto_map": {}}, None, {}, "add --trust-remote-code"),
        ({"quantization_config": GPTQ | {"desc_act": True}}, None, {}, "without desc_act: take another"),
        ({"quantization_config": GPTQ | {"sym": False}}, None, {}, "symmetric"),
        ({"quantization_config": GPTQ | {"bits": 3}}, None, {}, "4 or 8 bits"),
    ],
)
def test_a_model_that_cannot_be_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: dict, missing: str | None, flags: dict, reason: str
) -> None:
    folder = write_model(tmp_path, **config)
    if missing:
        (folder / missing).unlink()
    monkeypatch.setattr(hardware, "computes_four_bits", lambda: True)
    with pytest.raises(ModelUnavailable, match=reason) as caught:
        check_loadable(SimpleNamespace(model=str(folder), **{**LOADING, **flags}))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("config", "missing", "flags"),
    [
        ({}, None, {}),
        ({"auto_map": {"AutoModel": "theirs.Model"}}, None, {}),
        ({"quantization_config": GPTQ}, None, {}),
        ({"quantization_config": GPTQ | {"desc_act": True, "group_size": -1}}, None, {}),
        ({}, "model.safetensors", {"load_format": "dummy"}),
        ({}, "tokenizer.json", {"tokenizer": "elsewhere"}),
        ({"architectures": ["NobodysModel"], "auto_map": {}}, None, {"trust_remote_code": True}),
    ],
)
def test_a_model_that_can_be_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: dict, missing: str | None, flags: dict
) -> None:
    monkeypatch.setattr(hardware, "computes_four_bits", lambda: True)
    folder = write_model(tmp_path, **config)
    if missing:
        (folder / missing).unlink()
    check_loadable(SimpleNamespace(model=str(folder), **{**LOADING, **flags}))


def test_without_torchvision_only_a_qwen_that_takes_images_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    qwen = write_model(tmp_path / "a", architectures=["Qwen2_5_VLForConditionalGeneration"], vision_config={})
    other = write_model(tmp_path / "b", architectures=["LlavaForConditionalGeneration"], vision_config={})
    monkeypatch.setattr(checks, "find_spec", lambda name: None)
    check_loadable(SimpleNamespace(model=str(qwen), **LOADING))
    assert language_part_only(str(qwen))
    with pytest.raises(ModelUnavailable, match="needs torchvision"):
        check_loadable(SimpleNamespace(model=str(other), **LOADING))
    monkeypatch.setattr(checks, "find_spec", lambda name: name)
    check_loadable(SimpleNamespace(model=str(other), **LOADING))
    assert not language_part_only(str(qwen))


@pytest.mark.parametrize("kind", ["qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_next"])
@pytest.mark.parametrize(("cpu", "taken"), [(True, "bfloat16"), (False, "float32")])
def test_a_gated_delta_net_is_loaded_as_bfloat16_on_a_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, cpu: bool, taken: str
) -> None:
    folder = write_model(tmp_path, model_type=kind, quantization_config={"quant_method": "fp8"})
    monkeypatch.setattr(hardware, "on_cpu", lambda: cpu)
    assert number_format(SimpleNamespace(model=str(folder), dtype="float32")) == taken


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        ({"dtype": "float16"}, "Qwen3.5-Tiny in bfloat16 alone: leave --dtype out"),
        ({"dtype": "half"}, "bfloat16 alone"),
        ({"dtype": torch.float16}, "bfloat16 alone"),
    ],
)
def test_what_vllm_for_the_cpu_cannot_do_with_a_gated_delta_net(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: dict, reason: str
) -> None:
    folder = write_model(tmp_path / "Qwen3.5-Tiny", model_type="qwen3_5")
    args = SimpleNamespace(model=str(folder), **{**LOADING, **asked})
    monkeypatch.setattr(hardware, "on_cpu", lambda: True)
    with pytest.raises(ModelUnavailable, match=reason):
        check_loadable(args)
    monkeypatch.setattr(hardware, "on_cpu", lambda: False)
    check_loadable(args)


def test_a_tokenizer_that_is_code_is_not_run_unasked(tmp_path: Path) -> None:
    folder = write_model(tmp_path)
    (folder / "tokenizer.json").rename(folder / "tokenizer.model")
    described = {
        "auto_map": {"AutoTokenizer": ["theirs.ChatGLMTokenizer", None]},
        "tokenizer_class": "ChatGLMTokenizer",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(described))
    args = {"model": str(folder), **LOADING}
    with pytest.raises(ModelUnavailable, match=r"Python code as its tokenizer.*--trust-remote-code"):
        check_loadable(SimpleNamespace(**args))
    check_loadable(SimpleNamespace(**{**args, "trust_remote_code": True}))
    check_loadable(SimpleNamespace(**{**args, "tokenizer": "elsewhere"}))
    (folder / "tokenizer.model").rename(folder / "tokenizer.json")
    check_loadable(SimpleNamespace(**args))


@pytest.mark.parametrize("method", ["gptq", "awq"])
@pytest.mark.parametrize(
    ("cpu", "flags", "loads"),
    [(True, {"avx2"}, False), (True, {"avx2", "avx512f"}, True), (True, {"asimd"}, True), (False, {"avx2"}, True)],
)
def test_four_bits_where_the_machine_can_compute_with_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, cpu: bool, flags: set[str], loads: bool
) -> None:
    folder = write_model(tmp_path / "Tiny-Int4", quantization_config={"quant_method": method, "bits": 4})
    monkeypatch.setattr(hardware, "on_cpu", lambda: cpu)
    monkeypatch.setattr(hardware, "_cpu_flags", lambda: flags)
    args = SimpleNamespace(model=str(folder), **LOADING)
    if loads:
        return check_loadable(args)
    with pytest.raises(ModelUnavailable, match=r"Tiny-Int4 has weights of 4 bits.*without GPTQ or AWQ") as caught:
        check_loadable(args)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("config", "asked", "taken"),
    [
        ({"quantization_config": {"quant_method": "gptq"}}, "float32", "auto"),
        ({"quantization_config": {"quant_method": "awq"}}, "float16", "float16"),
        ({"quantization_config": {"quant_method": "fp8"}}, "float32", "float32"),
        ({"quantization_config": None}, "float32", "float32"),
    ],
)
def test_four_bits_are_not_loaded_as_float32(tmp_path: Path, config: dict, asked: str, taken: str) -> None:
    folder = write_model(tmp_path, **config)
    assert number_format(SimpleNamespace(model=str(folder), dtype=asked)) == taken


def refusal(folder: Path, **flags: Any) -> str:
    """Why the model in a folder is not loaded, in one line."""
    with pytest.raises(ModelUnavailable) as caught:
        checked_config(folder)
        check_loadable(SimpleNamespace(model=str(folder), **{**LOADING, **flags}))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin.index.json", "consolidated.safetensors.index.json", "x.index.json"]
)
@pytest.mark.parametrize("content", ['{"weight_map": {"a": "gone.bin"}}', "{}", "no JSON", POINTER])
def test_an_index_of_what_is_not_loaded_does_not_count(tmp_path: Path, name: str, content: str) -> None:
    folder = write_model(tmp_path)
    (folder / name).write_text(content)
    checked_config(folder)
    assert weight_files(folder) == [folder / "model.safetensors"]


def test_weights_that_are_not_loaded_do_not_count(tmp_path: Path) -> None:
    folder = write_model(tmp_path)
    (folder / "pytorch_model.bin").write_text(POINTER)
    (folder / "picture.png").write_text(POINTER)
    (folder / "old.safetensors").write_text("cut off")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"weight": "model.safetensors"}}')
    checked_config(folder)
    assert weight_files(folder) == [folder / "model.safetensors"]


def test_weights_without_safetensors(tmp_path: Path) -> None:
    folder = write_model(tmp_path)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "gone.safetensors"}}')
    assert weight_files(folder) == [folder / "pytorch_model.bin"]
    (folder / "pytorch_model.bin.index.json").write_text('{"weight_map": {"a": "pytorch_model-2.bin"}}')
    assert "lacks pytorch_model-2.bin" in refusal(folder)


@pytest.mark.parametrize("index", ["{}", "[]", '{"weight_map": ["model.safetensors"]}', '{"weight_map": {"a": 1}}'])
def test_an_index_that_names_no_weights(tmp_path: Path, index: str) -> None:
    folder = write_model(tmp_path)
    (folder / "model.safetensors.index.json").write_text(index)
    assert "model.safetensors.index.json names no weights: delete it" in refusal(folder)


def test_an_index_of_another_copy_is_to_be_deleted(tmp_path: Path) -> None:
    """vLLM would not load the whole file beside it either."""
    folder = write_model(tmp_path)
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "or delete model.safetensors.index.json if it is left over" in refusal(folder)


READ = [
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"),
    *("model.safetensors.index.json", "merges.txt", "vocab.json", "qwen.tiktoken", "chat_template.jinja"),
    *("modeling_qwen.py", "tokenizer.model", "special_tokens_map.json", "preprocessor_config.json"),
]


@pytest.mark.parametrize("name", READ)
def test_a_pointer_of_git_lfs_is_named(tmp_path: Path, name: str) -> None:
    folder = write_model(tmp_path)
    (folder / name).write_text(POINTER)
    assert refusal(folder) == f"{folder / name} is a Git LFS pointer: git lfs pull there, or fetch the model again"


def test_a_pointer_in_place_of_the_only_weights(tmp_path: Path) -> None:
    folder = write_model(tmp_path)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_text(POINTER)
    assert "pytorch_model.bin is a Git LFS pointer" in refusal(folder)


@pytest.mark.parametrize("content", [POINTER, "", "{", "\ufeff{}"], ids=["pointer", "empty", "cut off", "with a mark"])
def test_a_tokenizer_of_its_own_that_is_damaged(tmp_path: Path, content: str) -> None:
    folder, tokenizer = write_model(tmp_path), tmp_path / "tokenizer"
    tokenizer.mkdir()
    (tokenizer / "tokenizer_config.json").write_text(content)
    assert refusal(folder, tokenizer=str(tokenizer)).startswith(f"{tokenizer / 'tokenizer_config.json'} is ")


@pytest.mark.parametrize("name", [name for name in READ if name.endswith(".json")])
@pytest.mark.parametrize("content", ["", '{"a":', "\ufeff{}"], ids=["empty", "cut off", "with a mark"])
def test_json_that_is_damaged_is_named(tmp_path: Path, name: str, content: str) -> None:
    folder = write_model(tmp_path)
    (folder / name).write_text(content)
    assert f"{folder / name} is no JSON" in refusal(folder)


QWEN3 = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
TIED = {"tie_word_embeddings": True}
ONES, ZEROS = torch.ones(9, 2), torch.zeros(9, 2)


@pytest.mark.parametrize(
    ("config", "weights", "advice"),
    [
        ({"tie_word_embeddings": False}, {"model.embed_tokens.weight": ONES}, 'add "tie_word_embeddings": true'),
        ({}, {"model.embed_tokens.weight": ONES}, 'add "tie_word_embeddings": true'),
        ({"tie_word_embeddings": True}, {"model.embed_tokens.weight": ONES}, None),
        ({"tie_word_embeddings": False}, {"model.embed_tokens.weight": ONES, "lm_head.weight": ZEROS}, None),
        ({"tie_word_embeddings": True}, {"model.embed_tokens.weight": ONES, "lm_head.weight": ONES.clone()}, None),
        (
            {"tie_word_embeddings": True},
            {"model.embed_tokens.weight": ONES, "lm_head.weight": ZEROS},
            'set "tie_word_embeddings": false',
        ),
        ({}, {"model.embed_tokens.weight": ONES, "lm_head.qweight": ZEROS}, None),
    ],
)
def test_the_output_embeddings_are_as_the_description_says(
    tmp_path: Path, config: dict, weights: dict, advice: str | None
) -> None:
    folder = write_model(tmp_path, **QWEN3, **config)
    save_file(weights, folder / "model.safetensors")
    if advice:
        assert advice in refusal(folder)
    else:
        check_loadable(SimpleNamespace(model=str(folder), **LOADING))
    check_loadable(SimpleNamespace(model=str(folder), **{**LOADING, "load_format": "dummy"}))


@pytest.mark.parametrize("overrides", [TIED, lambda config: config.update(TIED) or config])
def test_what_hf_overrides_says_of_the_output_embeddings_counts(tmp_path: Path, overrides: Any) -> None:
    folder = write_model(tmp_path, **QWEN3, tie_word_embeddings=False)
    save_file({"model.embed_tokens.weight": ONES}, folder / "model.safetensors")
    assert "has no lm_head.weight" in refusal(folder)
    check_loadable(SimpleNamespace(model=str(folder), **{**LOADING, "hf_overrides": overrides}))


def test_a_qwen_of_a_later_day_is_told_in_a_line(tmp_path: Path) -> None:
    folder = write_model(tmp_path, architectures=["Qwen99ForCausalLM"], model_type="qwen99")
    save_file({"model.embed_tokens.weight": ONES}, folder / "model.safetensors")
    assert "does not know the architecture" in refusal(folder)
