"""What is refused before vLLM loads it, and what is not."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from qwen_vllm import hardware
from qwen_vllm.models import checks
from qwen_vllm.models.checks import ModelUnavailable, check_loadable, language_part_only, number_format
from tests.support.tiny_checkpoints import write_model

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True}
LOADING = {
    "tokenizer": None,
    "skip_tokenizer_init": False,
    "trust_remote_code": False,
    "load_format": "auto",
    "dtype": "auto",
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
