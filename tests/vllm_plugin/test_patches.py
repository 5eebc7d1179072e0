"""The list of changes to foreign code: each is made for this vLLM, and steps aside where it does not fit."""

import asyncio
import logging
import pkgutil
import subprocess
import sys
from collections import Counter
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from vllm import EngineArgs, envs
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionResponse
from vllm.lora.ops.torch_ops import lora_ops
from vllm.lora.punica_wrapper import punica_cpu
from vllm.model_executor.models.registry import ModelRegistry
from vllm.v1.engine.core_client import DPLBAsyncMPClient

from qwen_vllm import hardware
from qwen_vllm.vllm_plugin import patches
from qwen_vllm.vllm_plugin.patch import Patch, source_hash
from qwen_vllm.vllm_plugin.patches import (
    INSPECTION,
    LORA_SLOTS,
    PATCHES,
    PREFERRED_ENGINE,
    QWEN_VL,
    SHARED_GPU,
    THINKING_BUDGET,
)

USED = {
    # The endpoint plugin, and what has to be set between building the server and listening.
    "vllm.plugins.endpoint_plugins.interface.EndpointPlugin": "3106c65976d0",
    "vllm.entrypoints.launchers.app.build_app": "95e9398476b5",
    "vllm.entrypoints.launchers.launcher.serve_http": "c1501ba0c475",
    "vllm.entrypoints.launchers.api_server.entry.run_server_worker": "f9e1f1c991e0",
    # The engine, as the lifecycle watches and stops it.
    "vllm.v1.engine.async_llm.AsyncLLM.abort": "3597ef24d6e7",
    "vllm.v1.engine.async_llm.AsyncLLM.is_sleeping": "d4602fbfa4be",
    "vllm.v1.engine.async_llm.AsyncLLM.errored": "eaddec85f6a1",
    "vllm.v1.engine.output_processor.OutputProcessor.propagate_error": "0d156558d5bc",
    # The offline engine.
    "vllm.v1.engine.llm_engine.LLMEngine.step": "3b21219dfa17",
    "vllm.v1.engine.llm_engine.LLMEngine.add_request": "d13cedec013d",
    # The reasoning parsers and the first-generation model that are made from vLLM's.
    "vllm.parser.qwen3.qwen3_config": "05b23c777fc6",
    "vllm.parser.engine.adapters.make_adapters": "bec3a81a99d8",
    "vllm.model_executor.models.qwen2.Qwen2ForCausalLM": "cee59dd10e77",
    # The check of adapters, which hands over a command line in place of a `LoRAConfig`.
    "vllm.lora.peft_helper.PEFTHelper.validate_legal": "24d1c84cd615",
    # The media that a request may name: the list of hosts holds a sentence, which must never match.
    "vllm.multimodal.media.connector.MediaConnector": "f35921adba6e",
    # uvicorn's parts that the deadlines rest on.
    "uvicorn.protocols.http.httptools_impl.HttpToolsProtocol": "1703c5a75224",
}
"""Code that is used as it is, though its makers do not promise it; by its hash."""


def test_this_vllm_is_the_one_the_patches_were_made_for() -> None:
    changed = {patch.name: patch.changed() for patch in PATCHES if patch.changed()}
    assert not changed, "look at each of these, then write down its new hash in patches.py"


def test_this_vllm_is_the_one_whose_inside_is_used() -> None:
    changed = [name for name, known in USED.items() if source_hash(name) != known]
    assert not changed, "look at each of these, then write down its new hash here"


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.name)
def test_every_patch_says_why_and_what_it_waits_for(patch: Patch) -> None:
    assert patch.why.endswith(".")
    assert patch.upstream
    assert patch.replaces or patch.modules
    assert patch.made_for


@pytest.fixture
def foreign(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A foreign module with one function."""
    module = ModuleType("foreign")
    module.slow = sys.intern
    monkeypatch.setitem(sys.modules, "foreign", module)
    return module


def patch_of(foreign: ModuleType, known: str, **options: object) -> Patch:
    made_for = {"qwen_vllm.hardware.values": known}
    return Patch(f"quick {known}", "It is slow.", "nobody", {"foreign.slow": lambda slow: "quick"}, made_for, **options)


def test_a_speed_up_is_applied_where_the_source_is_known(foreign: ModuleType) -> None:
    patch_of(foreign, source_hash("qwen_vllm.hardware.values")).apply()
    assert foreign.slow == "quick"


def test_a_speed_up_is_left_out_with_one_line_where_the_source_differs(
    foreign: ModuleType, caplog: pytest.LogCaptureFixture
) -> None:
    logging.getLogger("vllm").propagate = True
    patch_of(foreign, "another").apply()
    assert foreign.slow is sys.intern
    # pytest also takes what vLLM's logger kept to itself when the test began: then one record is there twice.
    assert [record.message for record in dict.fromkeys(caplog.records)] == [
        "quick another: left out, because this version differs in qwen_vllm.hardware.values"
    ]


@pytest.mark.parametrize("fault", [True, False])
def test_a_repair_is_applied_only_where_the_fault_shows(foreign: ModuleType, fault: bool) -> None:
    patch_of(foreign, f"another {fault}", shows_fault=lambda: fault).apply()
    assert (foreign.slow == "quick") == fault


def test_a_change_for_a_block_is_taken_back(foreign: ModuleType) -> None:
    with patch_of(foreign, source_hash("qwen_vllm.hardware.values")).applied():
        assert foreign.slow == "quick"
    assert foreign.slow is sys.intern


def test_names_that_vllm_would_ignore_if_it_renamed_them() -> None:
    names = {default.name for default in hardware.environment_defaults() if default.name.startswith("VLLM_")}
    assert names <= envs.environment_variables.keys()


def test_a_request_without_an_adapter_gets_none_where_others_have_one() -> None:
    with LORA_SLOTS.applied():
        assert not LORA_SLOTS.shows_fault()
        inputs, weights, outputs = torch.ones(3, 4), torch.ones(2, 1, 5, 4), torch.zeros(3, 5)
        punica_cpu.bgmv_shrink(inputs, weights, outputs, torch.tensor([0, -1, 1]), 0.5)
        assert outputs.tolist() == [[2.0] * 5, [0.0] * 5, [2.0] * 5]
        slots, lengths, nothing = torch.tensor([-1, 1]), torch.tensor([2, 1]), torch.zeros(2)
        lora_ops.sgmv_shrink(inputs, weights, outputs, nothing, lengths, slots, 2, 2, 3, 1.0)
        assert outputs.tolist() == [[0.0] * 5, [0.0] * 5, [4.0] * 5]


def test_a_request_gets_no_thinking_budget_of_one_that_has_ended() -> None:
    with THINKING_BUDGET.applied():
        assert not THINKING_BUDGET.shows_fault()


@pytest.mark.parametrize(
    ("devices", "flags", "resolved"),
    [
        (None, {}, None),
        ([1, 0], {"tensor_parallel_size": 2}, [1, 0]),
        ([0, 0], {"data_parallel_size": 2}, [0, 0]),
        ([1, 0, 1], {"data_parallel_size": 3}, [1, 0, 1]),
        ([0, 0], {"tensor_parallel_size": 2}, "duplicates"),
        ([0, 0, 1, 1], {"data_parallel_size": 2, "tensor_parallel_size": 2}, "duplicates"),
    ],
)
def test_engines_of_one_gpu_each_may_share_it(
    devices: list[int] | None, flags: dict[str, int], resolved: list[int] | str | None
) -> None:
    args = EngineArgs(device_ids=devices, **flags)
    with SHARED_GPU.applied():
        if isinstance(resolved, str):
            with pytest.raises(ValueError, match=resolved):
                args._resolve_device_ids()
        else:
            assert args._resolve_device_ids() == resolved
    assert args.device_ids == devices


def client_of(counts: list[list[float]], gpus: list[int] | None, **inflight: int) -> SimpleNamespace:
    """vLLM's client of two engines with 576 places each, one of two front ends."""
    return SimpleNamespace(
        core_engines=["first", "second"],
        lb_engines=counts,
        vllm_config=SimpleNamespace(
            parallel_config=SimpleNamespace(assigned_physical_gpu_ids=gpus),
            scheduler_config=SimpleNamespace(max_num_seqs=576),
        ),
        client_count=2,
        engine_inflight=Counter(inflight),
        reqs_in_flight={f"{name} {n}": name for name, count in inflight.items() for n in range(count)},
        eng_start_index=0,
    )


@pytest.mark.parametrize(
    ("gpus", "preferred", "counts", "chosen"),
    [
        ([0, 0], 1, [[0, 480, 0.0], [0, 518, 0.0]], "second"),
        ([0, 0], 1, [[0, 480, 0.0], [0, 520, 0.0]], "first"),
        ([0, 1], 1, [[0, 40, 0.0], [0, 58, 0.0]], "second"),
        ([0, 1], 1, [[0, 40, 0.0], [0, 59, 0.0]], "first"),
        (None, 1, [[0, 0, 0.0], [5, 3, 0.0]], "second"),
        ([0, 1], None, [[0, 1, 0.0], [0, 0, 0.0]], "second"),
        ([0, 0], 1, [[5, 90, 0.0], [0, 0, 0.0]], "first"),
        ([0, 0], None, [[0, 96, 0.0], [0, 0, 0.0]], "second"),
        ([0, 0], 1, [[0, 96, 0.0], [0, 90, 0.0]], "second"),
    ],
)
def test_the_preferred_engine_takes_a_request_unless_it_has_too_much_to_do_or_few_are_on_the_gpu(
    gpus: list[int] | None, preferred: int | None, counts: list[list[float]], chosen: str
) -> None:
    client = client_of(counts, gpus)
    request = SimpleNamespace(request_id="r", data_parallel_rank=preferred, pooling_params=None)
    with PREFERRED_ENGINE.applied():
        assert DPLBAsyncMPClient.get_core_engine_for_request(client, request) == chosen
    assert client.engine_inflight == {chosen: 1}


def test_an_engine_that_has_just_ended_its_requests_takes_the_next_ones() -> None:
    client = client_of([[0, 500, 0.0], [0, 500, 0.0]], [0, 0], first=250, second=250)
    requests = (SimpleNamespace(request_id=str(n), data_parallel_rank=1, pooling_params=None) for n in range(251))
    with PREFERRED_ENGINE.applied():
        assert DPLBAsyncMPClient.get_core_engine_for_request(client, next(requests)) == "second"
        ended = {name for name, engine in client.reqs_in_flight.items() if engine == "first"}
        asyncio.run(DPLBAsyncMPClient.process_engine_outputs(client, SimpleNamespace(finished_requests=ended)))
        taken = [DPLBAsyncMPClient.get_core_engine_for_request(client, request) for request in requests]
    assert taken[:190] == ["first"] * 190
    assert client.client_count * client.engine_inflight["second"] <= 0.9 * 576 + 2


def test_vllms_qwen35_is_imported_without_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    (missing,), (stand_in,) = QWEN_VL.modules, QWEN_VL.modules.values()
    monkeypatch.setattr(patches, "find_spec", lambda name: None)
    monkeypatch.delitem(sys.modules, missing, raising=False)
    with QWEN_VL.applied():
        assert import_module(missing) is import_module(stand_in)
        assert import_module("vllm.model_executor.models.qwen3_5").Qwen3_5ForConditionalGeneration
    assert missing not in sys.modules
    monkeypatch.setattr(patches, "find_spec", lambda name: name)
    assert not QWEN_VL.is_wanted()


def test_a_model_is_looked_at_without_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    envs.disable_envs_cache()  # other tests leave one
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    monkeypatch.delattr(subprocess, "run")
    with INSPECTION.applied():
        assert ModelRegistry.models["LlamaForCausalLM"].inspect_model_cls().is_text_generation_model
    assert [*tmp_path.rglob("*.json")]  # kept for the next start


@pytest.mark.parametrize(
    ("arguments", "taken"),
    [
        ('{"city": "北京"}', {"city": "北京"}),
        ('{"city": "北", "days": [1, 2', {"city": "北", "days": [1, 2]}),
        ('{"ci', {}),
        ("", {}),
        ('{"a": 1 2}', {"a": 1}),
        ("[1]", {}),
    ],
)
def test_anthropics_clients_get_a_call_as_far_as_it_came(arguments: str, taken: dict[str, Any]) -> None:
    name = next(iter(patches.CUT_ARGUMENTS.replaces))
    convert = patches.CUT_ARGUMENTS.replaces[name](pkgutil.resolve_name(name))
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}
    choice = {"index": 0, "message": {"role": "assistant", "tool_calls": [call]}, "finish_reason": "length"}
    usage = {"prompt_tokens": 1, "total_tokens": 2, "completion_tokens": 1}
    answer = ChatCompletionResponse.model_validate({"model": "m", "choices": [choice], "usage": usage})
    said = convert(None, answer)
    assert (said.content[0].input, said.stop_reason) == (taken, "max_tokens")
