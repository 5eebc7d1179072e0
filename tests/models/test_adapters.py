"""LoRA adapters: which are refused before anything is loaded."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from qwen_vllm.models.adapters import check_adapter
from qwen_vllm.models.checks import ModelUnavailable
from tests.support.tiny_checkpoints import POINTER, TEXT, write_adapter, write_model

CONFIG = {"hidden_size": TEXT["hidden_size"], "num_hidden_layers": TEXT["num_hidden_layers"]}


def adapter_error(folder: Path, max_lora_rank: int = 16) -> str:
    with pytest.raises(ValueError, match=r".") as caught:
        check_adapter(folder, CONFIG, SimpleNamespace(max_lora_rank=max_lora_rank))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_an_adapter_that_can_be_loaded(tmp_path: Path) -> None:
    check_adapter(write_adapter(tmp_path / "poet"), CONFIG, SimpleNamespace(max_lora_rank=16))


def test_folders_that_hold_no_adapter(tmp_path: Path) -> None:
    assert adapter_error(tmp_path / "missing") == "there is no such folder"
    assert adapter_error(write_model(tmp_path / "a model")) == "it holds no LoRA adapter as peft writes them"
    (write_adapter(tmp_path / "no weights") / "adapter_model.safetensors").unlink()
    assert adapter_error(tmp_path / "no weights") == "it holds no LoRA adapter as peft writes them"
    weights = write_adapter(tmp_path / "cut") / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert "header" in adapter_error(tmp_path / "cut")
    (write_adapter(tmp_path / "no json") / "adapter_config.json").write_text("{")
    assert adapter_error(tmp_path / "no json")


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"])
def test_a_pointer_of_git_lfs_in_an_adapter(tmp_path: Path, name: str) -> None:
    folder = write_adapter(tmp_path / "poet")
    (folder / name).write_text(POINTER)
    with pytest.raises(ModelUnavailable, match=f"{name} is a Git LFS pointer: git lfs pull"):
        check_adapter(folder, CONFIG, SimpleNamespace(max_lora_rank=16))


def test_adapters_of_too_high_a_rank_and_of_other_kinds(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "high", rank=32)
    assert adapter_error(folder) == "LoRA rank 32 is greater than --max-lora-rank 16."
    config = json.loads((folder / "adapter_config.json").read_bytes())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))
    assert "DoRA" in adapter_error(folder, max_lora_rank=32)


def test_adapters_of_other_models(tmp_path: Path) -> None:
    """vLLM takes one that is smaller than the model, fills it up with zeros, and answers."""
    smaller = write_adapter(tmp_path / "smaller", hidden_size=32)
    assert adapter_error(smaller).startswith("it is for another model: its layer 0 has a hidden size of 32; ")
    deeper = write_adapter(tmp_path / "deeper", num_hidden_layers=3)
    assert adapter_error(deeper).endswith("this model has 2 layers, with 64")
