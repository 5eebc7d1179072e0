"""What engines and front ends import, and their patches look at: done by the process that `early.begin` starts."""

from importlib import import_module

from qwen_vllm import hardware
from qwen_vllm.vllm_plugin import plugin

ON_CPU = (
    *("vllm.v1.worker.cpu_worker", "vllm.model_executor.models.qwen2"),
    *("qwen_vllm.vllm_plugin.cpu_speedups", "qwen_vllm.vllm_plugin.int8_copy"),
)
# Without models: as Qwen3.5's is imported, it looks at the GPU.
ON_GPU = (
    *("vllm.v1.worker.gpu_worker", "vllm.v1.worker.gpu_model_runner", "vllm.v1.attention.backends.flash_attn"),
    *("vllm.entrypoints.launchers.api_server.entry", "qwen_vllm.server.endpoint"),  # several front ends
)

for name in ("vllm.v1.engine.core", "vllm.v1.engine.coordinator", *(ON_CPU if hardware.on_cpu() else ON_GPU)):
    import_module(name)
for patch in plugin.process_patches():
    patch.changed()
