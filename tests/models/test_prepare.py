"""The one recipe that makes a model ready to serve."""

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vllm import EngineArgs

from qwen_vllm import hardware
from qwen_vllm.generation import sampling_defaults
from qwen_vllm.models import checks
from qwen_vllm.models.checks import ModelUnavailable
from qwen_vllm.models.prepare import cache_default, prepare, read_chat_template
from tests.support.tiny_checkpoints import TEXT, write_model


def test_a_chat_template_is_a_file_or_its_text(tmp_path: Path) -> None:
    file = tmp_path / "mine.jinja"
    file.write_text("{{ messages }}")
    assert read_chat_template(str(file), tmp_path) == read_chat_template("{{ messages }}", tmp_path) == "{{ messages }}"
    assert read_chat_template(None, tmp_path) is None
    with pytest.raises(ModelUnavailable, match=r"--chat-template .*missing.jinja: neither a file"):
        read_chat_template(str(tmp_path / "missing.jinja"), tmp_path)


@pytest.mark.parametrize(
    ("files", "taken"),
    [
        (["chat_template.json", "preprocessor_config.json"], True),
        (["chat_template.json"], False),  # vLLM asks the processor alone for this file
        (["chat_template.json", "preprocessor_config.json", "chat_template.jinja"], False),
    ],
)
def test_the_template_of_a_processor_goes_before_the_tokenizers_as_in_vllm(
    tmp_path: Path, files: list[str], taken: bool
) -> None:
    for name in files:
        (tmp_path / name).write_text('{"chat_template": "{{ messages }}"}')
    assert read_chat_template(None, tmp_path) == ("{{ messages }}" if taken else None)
    assert read_chat_template("mine {{ messages }}", tmp_path) == "mine {{ messages }}"


@pytest.mark.parametrize(
    "written", ['{"chat_template": [{"name": "default", "template": "{{ messages }}"}]}', "{}", "[]"]
)
def test_a_processor_with_several_templates_or_none_is_told(tmp_path: Path, written: str) -> None:
    (tmp_path / "preprocessor_config.json").write_text("{}")
    (tmp_path / "chat_template.json").write_text(written)
    with pytest.raises(ModelUnavailable, match=r"chat_template.json is not one template.*--chat-template FILE"):
        read_chat_template(None, tmp_path)
    assert read_chat_template("mine {{ messages }}", tmp_path) == "mine {{ messages }}"


@pytest.mark.parametrize("torchvision", [True, False])
def test_qwen35_on_a_cpu_is_bfloat16_and_without_torchvision_its_language_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, torchvision: bool
) -> None:
    folder = write_model(
        tmp_path / "Qwen3.5-Tiny",
        architectures=["Qwen3_5ForConditionalGeneration"],
        model_type="qwen3_5",
        vision_config={},
    )
    monkeypatch.setattr(hardware, "on_cpu", lambda: True)
    monkeypatch.setattr(checks, "find_spec", lambda name: torchvision or None)
    logging.getLogger("vllm").propagate = True
    args = EngineArgs(model=str(folder), dtype="float32")
    prepare(args, {}, None, {})
    assert (args.dtype, args.language_model_only) == ("bfloat16", not torchvision)
    warned = [] if torchvision else ["torchvision is not installed: Qwen3.5-Tiny takes no images"]
    assert [record.message for record in caplog.records if record.name == "vllm.qwen_vllm"] == warned


@pytest.mark.parametrize(
    ("method", "caching", "is_on", "warned"),
    [
        ("mtp", None, False, "the prefix cache is off"),
        ("mtp", False, False, ""),
        ("mtp", True, True, "add --no-enable-prefix-caching"),
        ("ngram", None, None, ""),
    ],
)
def test_multi_token_prediction_does_without_the_prefix_cache_or_is_warned_of(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    method: str,
    caching: bool | None,
    is_on: bool | None,
    warned: str,
) -> None:
    logging.getLogger("vllm").propagate = True
    monkeypatch.setattr("qwen_vllm.models.prepare.on_cpu", lambda: False)
    args = EngineArgs(model=str(write_model(tmp_path / "Tiny")), enable_prefix_caching=caching)
    args.speculative_config = {"method": method, "num_speculative_tokens": 2}
    prepare(args, {}, None, {})
    assert args.enable_prefix_caching is is_on
    assert warned in caplog.text
    assert ("MTP" in caplog.text) == bool(warned)


def test_multi_token_prediction_with_the_prefix_cache_is_refused_on_a_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qwen_vllm.models.prepare.on_cpu", lambda: True)
    args = EngineArgs(model=str(write_model(tmp_path / "Tiny")), enable_prefix_caching=True)
    args.speculative_config = {"method": "mtp", "num_speculative_tokens": 2}
    with pytest.raises(ModelUnavailable, match="leave out --enable-prefix-caching"):
        prepare(args, {}, None, {})


@pytest.mark.parametrize(
    ("written", "flags", "temperature"),
    [
        ({"do_sample": False}, {}, 0),
        ({"do_sample": False, "repetition_penalty": 1.1}, {}, 0),
        ({"do_sample": False, "temperature": 0.6}, {}, 0.6),
        ({"do_sample": True}, {}, 0.7),
        ({}, {}, 0.7),
        (None, {}, 0.7),
        ({"do_sample": False}, {"override_generation_config": {"temperature": 0.5}}, 0.5),
        ({"do_sample": False}, {"override_generation_config": {"top_k": 5}}, 0),
        ({"do_sample": False}, {"override_generation_config": {"do_sample": True}}, 0.7),
        ({"do_sample": False}, {"generation_config": "vllm"}, 0.7),
    ],
)
def test_a_model_whose_makers_say_greedy_is_greedy_by_every_way_in(
    tmp_path: Path, written: dict | None, flags: dict[str, Any], temperature: float
) -> None:
    folder = write_model(tmp_path, model_type="qwen2", transformers_version="5.19.0", **TEXT)
    if written is not None:
        (folder / "generation_config.json").write_text(json.dumps(written))
    args = EngineArgs(model=str(folder), dtype="float32", **flags)
    prepare(args, {}, None, {})
    configured = args.create_model_config().get_diff_sampling_param()  # of /v1 these are the defaults too
    assert sampling_defaults(2048, configured)["temperature"] == temperature


def test_a_generation_config_of_another_folder(tmp_path: Path) -> None:
    folder, other = write_model(tmp_path), tmp_path / "other"
    other.mkdir()
    (other / "generation_config.json").write_text('{"do_sample": false}')
    args = EngineArgs(model=str(folder), generation_config=str(other))
    prepare(args, {}, None, {})
    assert args.override_generation_config == {"temperature": 0}


@pytest.mark.parametrize(("max_model_len", "context"), [(None, 4096), (-1, 4096), (1024, 1024)])
def test_the_kv_cache_holds_eight_contexts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, max_model_len: int | None, context: int
) -> None:
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE")
    monkeypatch.setattr(hardware, "on_cpu", lambda: True)
    kinds = ["linear_attention", "full_attention"]
    text = {"num_attention_heads": 8, "num_key_value_heads": 2, "hidden_size": 512, "layer_types": kinds}
    (tmp_path / "config.json").write_text(json.dumps({"text_config": {**text, "max_position_embeddings": 4096}}))
    args = SimpleNamespace(model=str(tmp_path), max_model_len=max_model_len, dtype="bfloat16", speculative_config=None)
    chosen = hardware.values(cache_default(args))
    assert chosen == {"kv_cache_memory_bytes": 8 * context * 2 * 2 * 64 * 2}
    args.speculative_config = {"method": "mtp", "num_speculative_tokens": 2}
    assert hardware.values(cache_default(args)) == {"kv_cache_memory_bytes": 8 * context * 2 * 2 * 2 * 64 * 2}
