"""What the copies in few bits cost: perplexity of the demo model on this project's docs, relative to float32.

    python -m benchmarks.perplexity

Wants a CPU with AVX-512 and BF16. Layers with a copy compute as `--quantization int8_copy` does for few tokens.
"""

import math
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from vllm.platforms import current_platform

from qwen_vllm.models.demo import demo_model
from qwen_vllm.vllm_plugin.int8_copy import FEW, product_with_copy

DOCS = Path(__file__).parent.parent / "docs"
TOKENS, AT_ONCE = 4096, 1024


class LayerWithCopy(torch.nn.Module):
    """A linear layer without a bias, by a copy of its weight, [outputs, inputs], in bfloat16."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = weight
        self._product = product_with_copy(weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the outputs for `x`, [..., inputs]."""
        rows = x.bfloat16().flatten(0, -2).split(FEW)
        return torch.cat([self._product(few) for few in rows]).float().unflatten(0, x.shape[:-1])


@torch.no_grad()
def perplexity(model: torch.nn.Module, token_ids: torch.Tensor) -> float:
    """Return the perplexity on `token_ids`, [1, tokens], in pieces that know nothing of each other."""
    losses = [model(piece, labels=piece).loss.item() for piece in token_ids.split(AT_ONCE, dim=1)]
    return math.exp(sum(losses) / len(losses))


def main() -> None:
    """Print the perplexity in float32, and how much more others have."""
    current_platform.import_kernels()
    text = "\n\n".join(path.read_text() for path in sorted(DOCS.glob("*.md")) if "zh-CN" not in path.name)
    token_ids = AutoTokenizer.from_pretrained(demo_model())(text, return_tensors="pt").input_ids[:, :TOKENS]
    model = AutoModelForCausalLM.from_pretrained(demo_model(), dtype=torch.float32).eval().requires_grad_(False)
    print(f"float32: {(whole := perplexity(model, token_ids)):.3f}", flush=True)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, torch.nn.Linear)}
    for layer in layers.values():
        layer.weight.copy_(layer.weight.bfloat16())
    print(f"weights in BF16: {perplexity(model, token_ids) / whole - 1:+.3%}", flush=True)
    for name, layer in layers.items():
        model.set_submodule(name, LayerWithCopy(layer.weight.bfloat16()))
    print(f"with the copies: {perplexity(model, token_ids) / whole - 1:+.3%}", flush=True)


if __name__ == "__main__":
    main()
