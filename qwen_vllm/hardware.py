"""Defaults for this hardware: those that differ from vLLM's, each with its reason.

A flag, or the environment variable of that name, goes over each of them; `vllm_server.py --show-defaults` lists them.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, distribution
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

FRONT_ENDS_PER_ENGINE = 6
"""Above 6 the engine slows down: it sends a message to every front end at each step (see benchmarks/NOTES.md)."""
FRONT_ENDS_PER_CORE, WITH_SEVERAL_ENGINES = 3 / 8, 1 / 2
"""One engine does less with 4 than with 3 on 8 cores. With two on 16, 8 read a burst sooner than 6 and cost nothing."""
MAX_PIXELS = 2**26
"""Of all images in one request: decoded they take 200 MB, and a file of a few kilobytes can hold that many."""
CONTEXTS, USUAL_CACHE = 8, 4 * 2**30
"""On a CPU the KV cache holds so many full contexts, but no more than so many bytes unless a single one needs them."""
INT8_COPY = "int8_copy"
"""Our name among vLLM's --quantization; see `vllm_plugin/int8_copy.py`."""
SMALL_WEIGHTS, ENGINE_ROOM = 5 * 2**29, 16 * 2**30
"""Bytes of the weights of a model whose engine cannot keep a large GPU busy, and of memory that each of two needs."""
ENGINE_EXTRA = 4 * 2**30
"""Bytes of a GPU that an engine takes beside weights and KV cache: graphs, activations, the libraries."""
GPU_SHARE = 0.92
"""How much of a GPU's memory vLLM takes by default."""
GRAPHS_BY_DEFAULT = 512
"""The largest batch that vLLM captures in a CUDA graph by default."""

MEMBERSHIP, CGROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
"""Where Linux lists the control groups of this process, and where their limits are."""

MTP = (
    "Qwen3.5 to 3.8 and Qwen3-Next have an MTP layer: --speculative-config "
    """'{"method": "mtp", "num_speculative_tokens": 2}' makes answers faster (docs/models.md)"""
)


class Default(NamedTuple):
    """A setting that we choose: the name of an engine argument or of an environment variable, its value, and why."""

    name: str
    value: Any
    reason: str


def environment_defaults() -> list[Default]:
    """Choose the environment variables that vLLM reads."""
    chosen = [
        Default("VLLM_NO_USAGE_STATS", "1", "nothing is sent to vLLM's makers"),
        Default("VLLM_MEDIA_URL_ALLOW_REDIRECTS", "0", "an allowed host must not lead to one that is not"),
        Default("VLLM_MAX_IMAGE_PIXELS", str(MAX_PIXELS), "decoded, such an image takes 200 MB"),
        Default("TOKENIZERS_PARALLELISM", "false", "one prompt is encoded faster on one thread"),
    ]
    if on_cpu():
        cores = _cores()
        chosen += [
            Default("VLLM_CPU_OMP_THREADS_BIND", "nobind", "the engine takes all cores; vLLM would keep one free"),
            Default("OMP_NUM_THREADS", str(cores), f"{cores} cores are to be had"),
            Default("VLLM_ENABLE_V1_MULTIPROCESSING", "0", "no second process, which would import vLLM again"),
        ]
    return chosen


def set_environment() -> None:
    """Set `environment_defaults` before vLLM is imported; what the user has set stays.

    But for one: `text_encoder` uses fastokens beside the tokenizer, which vLLM would exchange for it.
    """
    os.environ.pop("VLLM_USE_FASTOKENS", None)
    for name, value, _ in environment_defaults():
        os.environ.setdefault(name, value)


def engine_defaults() -> list[Default]:
    """Choose the engine arguments that depend on the hardware alone."""
    if not on_cpu():
        return []
    chosen = [
        Default("enforce_eager", True, "compiling takes minutes and gains a fifth on a CPU"),
        Default("max_num_batched_tokens", 512, "a long prompt is read in pieces, between which other answers go on"),
    ]
    if not {"avx512_bf16", "amx_bf16", "bf16"} & _cpu_flags():
        chosen.append(Default("dtype", "float32", "this processor only emulates bfloat16, several times slower"))
    return chosen


def graph_defaults(args: Any) -> list[Default]:
    """Choose the engine arguments that depend on others.

    Args:
        args: `vllm.EngineArgs`, or a command line with the same names.
    """
    if on_cpu():
        return []
    graphs, running = args.compilation_config, max_num_seqs(args)
    chosen_by_user = (
        args.max_cudagraph_capture_size
        or args.cudagraph_capture_sizes
        or graphs.max_cudagraph_capture_size
        or graphs.cudagraph_capture_sizes
    )
    if chosen_by_user or running <= GRAPHS_BY_DEFAULT:
        return []
    reason = "CUDA graphs for as many requests as run at once; beyond its graphs the engine is a third slower"
    return [Default("max_cudagraph_capture_size", -(-running // 16) * 16, reason)]


def cache_defaults(context: int, token_bytes: int, request_bytes: int = 0) -> list[Default]:
    """Choose the size of the KV cache on a CPU, which takes the memory only as it is filled.

    Args:
        context: tokens of a full context; 0 where that is not known.
        token_bytes: bytes that a token takes in the cache; 0 where that is not known.
        request_bytes: bytes that a request takes there beside its tokens.
    """
    if not on_cpu() or "VLLM_CPU_KVCACHE_SPACE" in os.environ:
        return []
    one = context * token_bytes + request_bytes or USUAL_CACHE // CONTEXTS
    size = min(max(one, min(CONTEXTS * one, USUAL_CACHE)), _memory_bytes() // 2)
    return [Default("kv_cache_memory_bytes", size, f"{size / one:.1f} contexts of {context:,} tokens, as they fill it")]


def sharing_defaults(args: Any, weights: int) -> list[Default]:
    """Choose two engines on one GPU for a small model, whose one Python thread would leave the GPU waiting.

    Args:
        args: the server's command line.
        weights: bytes of the model's weights; 0 where that is not known.
    """
    set_by_user = ("data_parallel_size", "device_ids", "gpu_memory_utilization", "kv_cache_memory_bytes")
    others = ("data_parallel_size_local", "data_parallel_rank", "kv_transfer_config", "kv_offloading_size")
    split = args.headless or max(args.tensor_parallel_size, args.pipeline_parallel_size, args.nnodes) > 1
    if on_cpu() or split or any(getattr(args, name) is not None for name in (*set_by_user, *others)):
        return []
    room = int(_gpu_bytes() * GPU_SHARE / 2)
    if not 0 < weights <= SMALL_WEIGHTS or room < ENGINE_ROOM or front_ends(_cores(), 1) < 4:
        return []
    return [
        Default("data_parallel_size", 2, f"one engine leaves the GPU waiting: {weights / 2**30:.1f} GiB of weights"),
        Default("device_ids", [0, 0], "both engines on one GPU"),
        Default("gpu_memory_utilization", GPU_SHARE / 2, "of the GPU, for each engine"),
        Default("kv_cache_memory_bytes", room - weights - ENGINE_EXTRA, "for each engine"),
        Default("max_num_seqs", max_num_seqs(args) // 2 + 64, "requests at once, for each engine"),
    ]


def server_defaults(args: Any) -> list[Default]:
    """Choose what depends on the server's command line `args`."""
    engines = args.data_parallel_size
    bound = 2 * engines * max_num_seqs(args)
    chosen = [Default("max_num_queued_reqs", bound, "those that run at once, and as many that wait; more get a 503")]
    elsewhere = args.headless or args.data_parallel_rank is not None or args.data_parallel_start_rank is not None
    balanced = args.data_parallel_external_lb or args.data_parallel_hybrid_lb
    balanced = balanced or args.data_parallel_multi_port_external_lb
    single = any(
        os.environ.get(f"VLLM_{name}", "0") != "0" for name in ("USE_RUST_FRONTEND", "ALLOW_RUNTIME_LORA_UPDATING")
    )
    if not (on_cpu() or elsewhere or balanced or single or args.enable_elastic_ep or args.grpc):
        cores = _cores()
        reason = f"processes that talk to clients, for {cores} cores and {engines} engine{'s' if engines > 1 else ''}"
        chosen.append(Default("api_server_count", front_ends(cores, engines), reason))
    if not on_cpu():
        chosen.append(Default("speculative_config", None, MTP))
    return chosen


def front_ends(cores: int, engines: int) -> int:
    """Choose how many processes talk to clients, on a GPU."""
    share = FRONT_ENDS_PER_CORE if engines == 1 else WITH_SEVERAL_ENGINES
    return max(1, min(FRONT_ENDS_PER_ENGINE * engines, int(cores * share)))


def values(defaults: Iterable[Default]) -> dict[str, Any]:
    """Return the settings by name."""
    return {name: value for name, value, _ in defaults}


def fill_in(args: Any, defaults: Iterable[Default]) -> None:
    """Set what the command line has left open."""
    for name, value, _ in defaults:
        if getattr(args, name) is None:
            setattr(args, name, value)


def table(args: Any, defaults: Iterable[Default]) -> str:
    """Print the settings in force, a line each: name, value, and why it is so."""
    rows = []
    for name, value, reason in defaults:
        actual = os.environ[name] if name.isupper() else getattr(args, name)
        rows.append((name, str(actual), reason if actual == value else f"as you set it; else {value}: {reason}"))
    return "\n".join(f"{name:32} {actual:8} {reason}" for name, actual, reason in rows)


def max_num_seqs(args: Any) -> int:
    """Return how many requests an engine runs at once: as `args` say, or as vLLM chooses for this hardware."""
    from vllm import EngineArgs
    from vllm.usage.usage_lib import UsageContext

    if args.max_num_seqs:
        return args.max_num_seqs
    _, running = EngineArgs.get_batch_defaults(args.tensor_parallel_size * args.pipeline_parallel_size)
    return running[UsageContext.OPENAI_API_SERVER] * (2 if args.performance_mode == "throughput" else 1)


def on_cpu() -> bool:
    """Tell whether the installed vLLM is the one for CPUs."""
    try:
        distribution("vllm-cpu")
    except PackageNotFoundError:
        return False
    return True


def computes_four_bits() -> bool:
    """Tell whether vLLM has kernels here for weights of 4 bits (GPTQ, AWQ); on a CPU without AVX-512 it has none."""
    flags = _cpu_flags()
    return not on_cpu() or "avx512f" in flags or "avx2" not in flags


def reads_int8() -> bool:
    """Tell whether torch has a quick kernel here for weights of 8 bits and inputs in bfloat16."""
    flags = _cpu_flags()
    return on_cpu() and {"avx512bw", "avx512vl"} <= flags and not flags.isdisjoint({"avx512_bf16", "amx_bf16"})


def _cores() -> int:
    """Count the cores that this process may use: those of its affinity, and what its control groups allow."""
    quotas = chain(_limits("cpu", "cpu.max"), _limits("cpu", "cpu.cfs_quota_us", "cpu.cfs_period_us"))
    allowed = [quota // period for quota, period in quotas if quota > 0]
    return max(1, min([len(os.sched_getaffinity(0)), *allowed]))


def _limits(controller: str, *files: str) -> Iterator[list[int]]:
    """Yield the numbers in these files of each control group of this process; where there is no limit, none.

    Version 1 has a tree of groups for each controller, version 2 one for all. All groups up to the root count. In a
    container the path may be the host's, which is not there: then the root is the container's own group.
    """
    for line in MEMBERSHIP.read_text().splitlines() if MEMBERSHIP.is_file() else ():
        _, controllers, path = line.split(":", 2)
        root = CGROUPS / controller if controllers else CGROUPS
        if controllers and controller not in controllers.split(","):
            continue
        group = root / path.lstrip("/")
        for folder in (group, *group.parents[: len(group.parts) - len(root.parts)]):
            with suppress(OSError, ValueError):  # no such file, or "max"
                yield [int(number) for file in files for number in (folder / file).read_text().split()]


def _cpu_flags() -> set[str]:
    """Read the names of the processor's instruction sets, as Linux lists them."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.lower().startswith(("flags", "features")):
            return set(line.split(":")[1].split())
    return set()


def _gpu_bytes() -> int:
    """Tell how much memory the first GPU has, without touching it."""
    from vllm.platforms import current_platform

    return current_platform.get_device_total_memory()


def _memory_bytes() -> int:
    """Tell how much memory this process may use: the machine's, or less where its control groups allow less."""
    limits = chain(_limits("memory", "memory.max"), _limits("memory", "memory.limit_in_bytes"))
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([machine, *(limit for (limit,) in limits)])
