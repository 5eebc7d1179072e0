"""What is chosen for which hardware, and that what the user says goes over it."""

import os
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qwen_vllm import hardware


@pytest.mark.parametrize(
    ("cpu", "flags", "defaults"),
    [
        (False, {"avx2"}, {}),
        (True, {"avx2", "avx512f"}, {"enforce_eager": True, "max_num_batched_tokens": 512, "dtype": "float32"}),
        (True, {"avx512f", "avx512_bf16"}, {"enforce_eager": True, "max_num_batched_tokens": 512}),
        (True, {"amx_bf16"}, {"enforce_eager": True, "max_num_batched_tokens": 512}),
        (True, {"bf16", "sve"}, {"enforce_eager": True, "max_num_batched_tokens": 512}),
        (True, set(), {"enforce_eager": True, "max_num_batched_tokens": 512, "dtype": "float32"}),
    ],
)
def test_engine_defaults(monkeypatch: pytest.MonkeyPatch, cpu: bool, flags: set[str], defaults: dict) -> None:
    monkeypatch.setattr(hardware, "on_cpu", lambda: cpu)
    monkeypatch.setattr(hardware, "_cpu_flags", lambda: flags)
    assert hardware.values(hardware.engine_defaults()) == defaults


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    fresh = {"OMP_NUM_THREADS": "1"}
    monkeypatch.setattr(os, "environ", fresh)
    return fresh


@pytest.mark.parametrize("cpu", [False, True])
def test_the_environment_keeps_what_the_user_has_set(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch, cpu: bool
) -> None:
    monkeypatch.setattr(hardware, "on_cpu", lambda: cpu)
    hardware.set_environment()
    assert environment["OMP_NUM_THREADS"] == "1"
    assert environment["VLLM_NO_USAGE_STATS"] == "1"
    assert ("VLLM_CPU_OMP_THREADS_BIND" in environment) == cpu


def test_vllm_does_not_exchange_the_tokenizer(environment: dict[str, str]) -> None:
    environment["VLLM_USE_FASTOKENS"] = "1"
    hardware.set_environment()
    assert "VLLM_USE_FASTOKENS" not in environment


NO_LIMIT = str(2**63 - 4096)
GROUPS = {
    "version 2, in a container": ("0::/", {"cpu.max": "200000 100000", "memory.max": str(8 * 2**30)}, 2, 8),
    "version 2, of the host": ("0::/a/b", {"a/b/cpu.max": "400000 100000", "a/b/memory.max": str(16 * 2**30)}, 4, 16),
    "a limit further up": ("0::/a/b", {"a/b/cpu.max": "max 100000", "a/cpu.max": "300000 100000"}, 3, 256),
    "the least of all": ("0::/a", {"a/memory.max": str(9 * 2**30), "memory.max": str(4 * 2**30)}, 64, 4),
    "no limit": ("0::/", {"cpu.max": "max 100000", "memory.max": "max"}, 64, 256),
    "half a core": ("0::/", {"cpu.max": "50000 100000", "memory.max": str(2**29)}, 1, 0),
    "a core and a half": ("0::/", {"cpu.max": "150000 100000"}, 1, 256),
    "more than there is": ("0::/", {"cpu.max": "9900000 100000", "memory.max": str(2**50)}, 64, 256),
    "version 1": (
        "4:memory:/docker/x\n3:cpu,cpuacct:/docker/x\n0::/",
        {
            "cpu/cpu.cfs_quota_us": "200000",
            "cpu/cpu.cfs_period_us": "100000",
            "memory/memory.limit_in_bytes": str(8 * 2**30),
        },
        2,
        8,
    ),
    "version 1, of the host": (
        "4:memory:/docker/x\n3:cpuset:/\n2:cpu:/docker/x",
        {
            "cpu/cpu.cfs_quota_us": "-1",
            "cpu/docker/x/cpu.cfs_quota_us": "300000",
            "cpu/docker/x/cpu.cfs_period_us": "50000",
            "memory/memory.limit_in_bytes": NO_LIMIT,
            "memory/docker/x/memory.limit_in_bytes": str(4 * 2**30),
        },
        6,
        4,
    ),
    "version 1, no limit": (
        "4:memory:/\n2:cpu:/",
        {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "1", "memory/memory.limit_in_bytes": NO_LIMIT},
        64,
        256,
    ),
    "no files": ("0::/a/b", {}, 64, 256),
    "no groups": ("", {}, 64, 256),
}


@pytest.mark.parametrize(("membership", "files", "cores", "gib"), GROUPS.values(), ids=GROUPS)
def test_threads_and_cache_follow_the_limits_of_a_container(
    environment: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    membership: str,
    files: dict[str, str],
    cores: int,
    gib: int,
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"{text}\n")
    if membership:
        (tmp_path / "membership").write_text(f"{membership}\n")
    monkeypatch.setattr(hardware, "MEMBERSHIP", tmp_path / "membership")
    monkeypatch.setattr(hardware, "CGROUPS", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)))
    monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 256 * 2**18}.get)
    monkeypatch.setattr(hardware, "on_cpu", lambda: True)
    chosen = hardware.values(hardware.environment_defaults())
    assert chosen["OMP_NUM_THREADS"] == str(cores)
    cache = hardware.values(hardware.cache_defaults(2**20, 2**18))["kv_cache_memory_bytes"]
    assert cache // 2**30 == gib // 2
    monkeypatch.setattr(hardware, "on_cpu", lambda: False)
    monkeypatch.setattr(hardware, "max_num_seqs", lambda args: 1024)
    front_ends = hardware.values(hardware.server_defaults(command_line()))["api_server_count"]
    assert front_ends == max(1, min(6, cores * 3 // 8))


@pytest.mark.parametrize(
    ("context", "token_bytes", "gib"),
    [(8192, 32768, 2), (32768, 32768, 4), (262144, 32768, 8), (8192, 0, 4), (0, 32768, 4)],
    ids=["eight contexts", "no more than usual", "at least one", "unknown", "context unknown"],
)
def test_the_cache_is_as_large_as_the_model_and_its_context_need(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch, context: int, token_bytes: int, gib: int
) -> None:
    monkeypatch.setattr(hardware, "on_cpu", lambda: True)
    monkeypatch.setattr(hardware, "_memory_bytes", lambda: 64 * 2**30)
    chosen = hardware.values(hardware.cache_defaults(context, token_bytes))
    assert chosen == {"kv_cache_memory_bytes": gib * 2**30}
    environment["VLLM_CPU_KVCACHE_SPACE"] = "1"
    assert hardware.cache_defaults(context, token_bytes) == []
    monkeypatch.setattr(hardware, "on_cpu", lambda: False)
    assert hardware.cache_defaults(context, token_bytes) == []


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with GPUs that run 1,024 requests each, and 16 cores."""
    monkeypatch.setattr(hardware, "on_cpu", lambda: False)
    monkeypatch.setattr(hardware, "max_num_seqs", lambda args: args.max_num_seqs or 1024)
    monkeypatch.setattr(hardware, "_cores", lambda: 16)


def command_line(**flags: Any) -> Namespace:
    graphs = SimpleNamespace(max_cudagraph_capture_size=None, cudagraph_capture_sizes=None)
    nothing = dict.fromkeys(
        [
            "api_server_count",
            "cudagraph_capture_sizes",
            "data_parallel_external_lb",
            "data_parallel_hybrid_lb",
            "data_parallel_multi_port_external_lb",
            "data_parallel_rank",
            "data_parallel_start_rank",
            "enable_elastic_ep",
            "grpc",
            "data_parallel_size_local",
            "device_ids",
            "gpu_memory_utilization",
            "headless",
            "kv_cache_memory_bytes",
            "kv_offloading_size",
            "kv_transfer_config",
            "max_cudagraph_capture_size",
            "speculative_config",
            "max_num_queued_reqs",
            "max_num_seqs",
        ]
    )
    one = dict.fromkeys(["data_parallel_size", "nnodes", "pipeline_parallel_size", "tensor_parallel_size"], 1)
    return Namespace(**{**nothing, **one, "compilation_config": graphs, **flags})


@pytest.mark.parametrize(
    ("flags", "size"),
    [
        ({}, 1024),
        ({"max_num_seqs": 1000}, 1008),
        ({"max_num_seqs": 512}, None),
        ({"max_cudagraph_capture_size": 8}, None),
        ({"cudagraph_capture_sizes": [1, 2]}, None),
        ({"compilation_config": SimpleNamespace(max_cudagraph_capture_size=8, cudagraph_capture_sizes=None)}, None),
    ],
)
def test_graphs_reach_as_far_as_requests_run_unless_the_user_says_how_far(gpu: None, flags: dict, size: Any) -> None:
    chosen = hardware.values(hardware.graph_defaults(command_line(**flags)))
    assert chosen.get("max_cudagraph_capture_size") == size


@pytest.mark.parametrize(
    ("cores", "engines", "processes"),
    [(1, 1, 1), (8, 1, 3), (16, 1, 6), (64, 1, 6), (1, 2, 1), (16, 2, 8), (64, 2, 12)],
)
def test_front_ends_follow_the_cores_and_the_engines(
    gpu: None, monkeypatch: pytest.MonkeyPatch, cores: int, engines: int, processes: int
) -> None:
    monkeypatch.setattr(hardware, "_cores", lambda: cores)
    chosen = hardware.values(hardware.server_defaults(command_line(data_parallel_size=engines)))
    assert chosen["api_server_count"] == processes


@pytest.fixture
def large_gpu(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "_gpu_bytes", lambda: 80 * 2**30)
    monkeypatch.setattr(hardware, "_cores", lambda: 16)


def test_a_small_model_gets_two_engines_on_a_large_gpu(large_gpu: None) -> None:
    chosen = hardware.values(hardware.sharing_defaults(command_line(data_parallel_size=None), 2**30))
    assert (chosen["data_parallel_size"], chosen["device_ids"], chosen["max_num_seqs"]) == (2, [0, 0], 576)
    assert chosen["gpu_memory_utilization"] == 0.46
    whole = 2 * (chosen["kv_cache_memory_bytes"] + 2**30)
    assert 0.8 < whole / (80 * 2**30) < 0.92


@pytest.mark.parametrize(
    ("weights", "gib", "cores", "flags"),
    [
        (3 * 2**30, 80, 16, {}),
        (0, 80, 16, {}),
        (2**30, 24, 16, {}),
        (2**30, 80, 8, {}),
        (2**30, 80, 16, {"data_parallel_size": 1}),
        (2**30, 80, 16, {"tensor_parallel_size": 2}),
        (2**30, 80, 16, {"gpu_memory_utilization": 0.3}),
        (2**30, 80, 16, {"kv_offloading_size": 10}),
        (2**30, 80, 16, {"headless": True}),
    ],
    ids=["large model", "unknown", "small GPU", "few cores", "off", "split", "memory", "offloading", "headless"],
)
def test_any_other_gets_one_engine(
    large_gpu: None, monkeypatch: pytest.MonkeyPatch, weights: int, gib: int, cores: int, flags: dict
) -> None:
    monkeypatch.setattr(hardware, "_gpu_bytes", lambda: gib * 2**30)
    monkeypatch.setattr(hardware, "_cores", lambda: cores)
    assert hardware.sharing_defaults(command_line(**{"data_parallel_size": None, **flags}), weights) == []


@pytest.mark.parametrize(
    "flags",
    [
        {"headless": True},
        {"data_parallel_rank": 0},
        {"data_parallel_start_rank": 1},
        {"data_parallel_external_lb": True},
        {"data_parallel_hybrid_lb": True},
        {"data_parallel_multi_port_external_lb": True},
        {"enable_elastic_ep": True},
        {"grpc": True},
    ],
)
def test_where_vllm_takes_one_front_end_it_is_left_to_vllm(gpu: None, flags: dict) -> None:
    assert "api_server_count" not in hardware.values(hardware.server_defaults(command_line(**flags)))


@pytest.mark.parametrize("variable", ["VLLM_USE_RUST_FRONTEND", "VLLM_ALLOW_RUNTIME_LORA_UPDATING"])
def test_what_works_with_one_front_end_only_gets_one(gpu: None, monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setenv(variable, "1")
    assert "api_server_count" not in hardware.values(hardware.server_defaults(command_line()))


def test_what_the_user_says_goes_over_the_defaults_and_the_table_shows_it(gpu: None) -> None:
    args = command_line(api_server_count=2)
    chosen = hardware.server_defaults(args)
    hardware.fill_in(args, chosen)
    assert (args.api_server_count, args.max_num_queued_reqs) == (2, 2048)
    queue, front_ends, drafts = hardware.table(args, chosen).splitlines()
    assert queue.split()[:2] == ["max_num_queued_reqs", "2048"]
    assert front_ends.split()[:2] == ["api_server_count", "2"]
    assert "as you set it; else 6" in front_ends
    assert drafts.startswith("speculative_config") and "num_speculative_tokens" in drafts
