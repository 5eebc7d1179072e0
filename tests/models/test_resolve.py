"""Which folder a name stands for."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from qwen_vllm.models import resolve
from qwen_vllm.models.checks import ModelUnavailable
from qwen_vllm.models.resolve import resolve_model
from tests.support.tiny_checkpoints import write_model


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model")


def unavailable(name: str | None, **options: Any) -> str:
    with pytest.raises(ModelUnavailable) as caught:
        resolve_model(name, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_folder(model: Path) -> None:
    assert resolve_model(str(model)) == str(model)


def test_a_folder_in_the_home(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(model.parent))
    assert resolve_model("~/model") == str(model)


def test_the_home_of_nobody() -> None:
    message = unavailable("~no-such-user/model")
    assert message == "~no-such-user/model is neither a folder nor a model id such as Qwen/Qwen2.5-7B-Instruct"


@pytest.mark.parametrize("name", ["model", "./model", "model/"])
def test_a_relative_folder(model: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(model.parent)
    assert Path(resolve_model(name)).samefile(model)


def test_a_local_folder_goes_before_an_id(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resolve, "fetch", None)
    monkeypatch.chdir(model.parent.parent)
    assert Path(resolve_model(f"{model.parent.name}/model")).samefile(model)


def test_a_folder_that_holds_no_model(tmp_path: Path) -> None:
    message = unavailable(str(tmp_path))
    assert str(tmp_path) in message
    assert "config.json" in message


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b'"x"'])
def test_a_description_that_cannot_be_read(model: Path, content: bytes) -> None:
    (model / "config.json").write_bytes(content)
    assert "config.json" in unavailable(str(model))


@pytest.mark.parametrize("size", [0, 7, 50, 300])
def test_weights_that_are_cut_off(model: Path, size: int) -> None:
    os.truncate(model / "model.safetensors", size)
    message = unavailable(str(model))
    assert "model.safetensors is damaged or cut off" in message
    assert "fetch the model again" in message


def test_weights_that_are_missing_in_part(model: Path) -> None:
    index = {"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "lacks model-2.safetensors" in unavailable(str(model))


@pytest.mark.parametrize("name", ["/no/such/folder", "./model", "~/no-such-model", "Qwen2.5-7B", "a/b/c", "a/", ""])
def test_what_is_neither_a_folder_nor_an_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(resolve, "fetch", None)
    monkeypatch.chdir(tmp_path)
    assert name in unavailable(name)
