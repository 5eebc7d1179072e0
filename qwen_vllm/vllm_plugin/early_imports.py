"""What an engine imports and its patches look at: done by the process that `early.begin` starts."""

from importlib import import_module

from qwen_vllm.vllm_plugin import patches

for name in (
    *("vllm.v1.engine.core", "vllm.v1.worker.cpu_worker", "vllm.model_executor.models.qwen2"),
    *("qwen_vllm.vllm_plugin.plugin", "qwen_vllm.vllm_plugin.cpu_speedups", "qwen_vllm.vllm_plugin.int8_copy"),
):
    import_module(name)
for patch in (*patches.IN_EVERY_PROCESS, *patches.ON_CPU):
    patch.changed()
