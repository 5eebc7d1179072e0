"""What is refused before vLLM loads it, and what is not."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from qwen_vllm import hardware
from qwen_vllm.models import checks
from qwen_vllm.models.checks import ModelUnavailable, check_loadable, number_format
from tests.support.tiny_checkpoints import write_model

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True}
LOADING = {"tokenizer": None, "skip_tokenizer_init": False, "trust_remote_code": False, "load_format": "auto"}


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


def test_a_model_that_takes_images_needs_torchvision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_model(tmp_path, architectures=["Qwen2_5_VLForConditionalGeneration"], vision_config={})
    monkeypatch.setattr(checks, "find_spec", lambda name: None)
    with pytest.raises(ModelUnavailable, match="needs torchvision"):
        check_loadable(SimpleNamespace(model=str(folder), **LOADING))
    monkeypatch.setattr(checks, "find_spec", lambda name: name)
    check_loadable(SimpleNamespace(model=str(folder), **LOADING))


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
