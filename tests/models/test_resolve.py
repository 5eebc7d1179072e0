"""Where models are found, what they want by default, and what fits the hardware."""

import errno
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qwen_vllm.models.checks import ModelUnavailable
from qwen_vllm.models.resolve import resolve_model
from tests.support.tiny_checkpoints import write_model


class ScriptedHub:
    """Stands in for a hub's package: each call of snapshot_download returns or raises the next thing."""

    def __init__(self, *script: Any) -> None:
        self._script = list(script)
        self.calls: list[tuple[str, dict[str, Any]]] = []

    def snapshot_download(self, name: str, **options: Any) -> str:
        self.calls.append((name, options))
        step = self._script.pop(0)
        if isinstance(step, Exception):
            raise step
        return str(step)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Callable[..., ScriptedHub]:
    def script(*steps: Any, package: str = "modelscope") -> ScriptedHub:
        scripted = ScriptedHub(*steps)
        monkeypatch.setitem(sys.modules, package, scripted)
        return scripted

    return script


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


@pytest.mark.parametrize("name", ["model", "./model", "model/"])
def test_a_relative_folder(model: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(model.parent)
    assert Path(resolve_model(name)).samefile(model)


def test_a_local_folder_goes_before_an_id(model: Path, monkeypatch: pytest.MonkeyPatch, hub: Callable) -> None:
    scripted = hub()
    monkeypatch.chdir(model.parent.parent)
    assert Path(resolve_model(f"{model.parent.name}/model")).samefile(model)
    assert scripted.calls == []


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


@pytest.mark.parametrize("name", ["/no/such/folder", "./model", "~/no-such-model", "Qwen2.5-7B", "a/b/c", ""])
def test_what_is_neither_a_folder_nor_an_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hub: Callable, name: str
) -> None:
    scripted = hub()
    monkeypatch.chdir(tmp_path)
    assert name in unavailable(name)
    assert scripted.calls == []


@pytest.mark.parametrize(("package", "options"), [("modelscope", {}), ("huggingface_hub", {"hub": "huggingface"})])
def test_an_id_is_fetched_from_its_hub(
    model: Path, hub: Callable, capsys: pytest.CaptureFixture, package: str, options: dict
) -> None:
    scripted = hub(model, package=package)
    assert resolve_model("Qwen/Qwen2.5-7B-Instruct", **options) == str(model)
    assert [name for name, _ in scripted.calls] == ["Qwen/Qwen2.5-7B-Instruct"]
    assert "Fetching Qwen/Qwen2.5-7B-Instruct" in capsys.readouterr().err


FAILURES = [ConnectionError("no route\nto host"), ValueError(""), OSError(errno.ENOSPC, "No space left on device")]


@pytest.mark.parametrize("failure", FAILURES[:2], ids=repr)
def test_without_the_hub_the_copy_fetched_before_is_taken(
    model: Path, hub: Callable, capsys: pytest.CaptureFixture, failure: Exception
) -> None:
    scripted = hub(failure, model)
    assert resolve_model("Qwen/Qwen3-8B") == str(model)
    assert scripted.calls[1] == ("Qwen/Qwen3-8B", {"local_files_only": True})
    assert "the copy of Qwen/Qwen3-8B fetched before" in capsys.readouterr().err


def test_a_download_that_was_cut_is_not_taken_for_a_copy(model: Path, hub: Callable) -> None:
    index = {"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    hub(ConnectionError("no route"), model)
    assert "no route" in unavailable("Qwen/Qwen3-8B")


def test_a_full_disk_is_told_and_not_hidden_by_an_older_copy(model: Path, hub: Callable) -> None:
    hub(OSError(errno.ENOSPC, "No space left on device"), model)
    assert "No space left on device" in unavailable("Qwen/Qwen3-8B")


@pytest.mark.parametrize(
    ("failure", "reason"),
    [*zip(FAILURES, ["no route", "ValueError", "No space left on device"], strict=True)],
    ids=repr,
)
def test_without_hub_and_copy_the_reason_is_told(hub: Callable, failure: Exception, reason: str) -> None:
    hub(failure, FileNotFoundError("not cached"))
    message = unavailable("Qwen/Qwen3-8B")
    assert "Qwen/Qwen3-8B" in message
    assert reason in message


def test_a_fetched_folder_that_holds_no_model(tmp_path: Path, hub: Callable) -> None:
    hub(tmp_path)
    assert "config.json" in unavailable("Qwen/Qwen3-8B")
