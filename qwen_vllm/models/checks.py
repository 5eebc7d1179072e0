"""What vLLM would refuse in a model's folder, said before it loads, in one line.

vLLM refuses these too, but only after it has loaded for a while, and in many lines.
"""

import re
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from pydantic_core import from_json
from safetensors import SafetensorError, safe_open

from qwen_vllm import hardware
from qwen_vllm.models import qwen_v1
from qwen_vllm.words import SaidError, say

WEIGHTS = ("safetensors", "bin", "pt", "pth", "gguf")
TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "tekken.json")
DESCRIPTIONS = (
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "vocab.json"),
    *("special_tokens_map.json", "added_tokens.json", "chat_template.json", "preprocessor_config.json"),
)
"""Files of JSON that are read when a model is loaded."""
TEXTS = ("merges.txt", "*.tiktoken", "tokenizer.model", "chat_template.jinja", "*.py")
"""Other files that are read then."""
LAYOUTS = (
    ("consolidated*.safetensors", "consolidated.safetensors.index.json"),
    ("*.safetensors", "model.safetensors.index.json"),
    ("*.bin", "pytorch_model.bin.index.json"),
)
"""Of the weights vLLM loads the first of these that is there, and of safetensors only what the index names."""
POINTER = b"version https://git-lfs.github.com/spec/"

GATED_DELTA_NETS = ("qwen3_next", "qwen3_5", "qwen4_exp")
"""How the `model_type` of those begins whose linear attention is a gated delta net."""


class ModelUnavailable(SaidError):
    """The model cannot be had; the message says why and what to do, in one line."""


class ModelArgs(Protocol):
    """What the checks read of `vllm.EngineArgs`, or of a command line with the same names; `model` is a folder."""

    model: str
    tokenizer: str | None
    tokenizer_mode: str
    tokenizer_revision: str | None
    skip_tokenizer_init: bool
    trust_remote_code: bool
    load_format: str
    max_model_len: int | None
    dtype: Any
    hf_overrides: Any


def checked_config(folder: Path) -> dict[str, Any]:
    """Read a model's config.json, and check that the files of its folder that are loaded are readable and whole.

    Raises:
        ModelUnavailable: naming the file that is missing or damaged.
    """
    if not (folder / "config.json").is_file():
        raise ModelUnavailable("{folder} holds no model: it has no config.json", folder=folder)
    check_descriptions(folder)
    config = read_json(folder / "config.json")
    if not isinstance(config, dict):
        raise ModelUnavailable("{file} describes no model", file=folder / "config.json")
    for file in weight_files(folder):
        refuse_pointer(file)
        try:
            if file.suffix == ".safetensors":
                with safe_open(file, framework="numpy"):
                    pass
        except SafetensorError as error:
            raise ModelUnavailable(
                "{file} is damaged or cut off ({error}): fetch the model again", file=file, error=error
            ) from None
    return config


def check_descriptions(folder: Path) -> None:
    """Refuse a model's or a tokenizer's folder of which a file beside the weights is damaged, or is not there yet."""
    for name in DESCRIPTIONS:
        if (folder / name).is_file():
            read_json(folder / name)
    for pattern in TEXTS:
        for file in folder.glob(pattern):
            refuse_pointer(file)


def weight_files(folder: Path) -> list[Path]:
    """List the files that vLLM would load the weights from.

    Raises:
        ModelUnavailable: the index that vLLM reads names one that is not there, or is none.
    """
    found = next((layout for layout in LAYOUTS if any(folder.glob(layout[0]))), None)
    if not found:
        return []
    pattern, name = found
    index = folder / name
    if not index.is_file():
        return sorted(folder.glob(pattern))
    try:
        files = sorted(folder / file for file in {*read_json(index)["weight_map"].values()})
    except (KeyError, TypeError, AttributeError):
        raise ModelUnavailable(
            "{file} names no weights: delete it if {folder} is whole without", file=index, folder=folder
        ) from None
    for file in files:
        if not file.is_file():
            raise ModelUnavailable(
                "{folder} lacks {file}, which {index} names: fetch the model again, or delete {index} if it is left "
                "over from another copy",
                folder=folder,
                file=file.name,
                index=name,
            )
    return files


def read_json(file: Path) -> Any:
    """Read a file of JSON; raise ModelUnavailable where it is none."""
    refuse_pointer(file)
    try:
        return from_json(file.read_bytes())
    except ValueError as error:
        raise ModelUnavailable("{file} is no JSON ({error}): fetch the model again", file=file, error=error) from None


def refuse_pointer(file: Path) -> None:
    """Raise ModelUnavailable where Git LFS has left a pointer in place of a file."""
    with file.open("rb") as content:
        if content.read(len(POINTER)) == POINTER:
            raise ModelUnavailable(
                "{file} is a Git LFS pointer: git lfs pull there, or fetch the model again", file=file
            )


def check_loadable(args: ModelArgs) -> None:
    """Refuse a model that vLLM cannot load here.

    Raises:
        ModelUnavailable: no weights, no tokenizer, an architecture that neither vLLM nor transformers knows; more
            context than a first-generation Qwen was trained on; 4-bit weights or a number format that this machine
            cannot compute with.
    """
    import transformers
    from vllm import ModelRegistry

    folder = Path(args.model)
    if args.load_format != "dummy" and not any(any(folder.glob(f"*.{end}")) for end in WEIGHTS):
        raise ModelUnavailable("{folder} holds no weights, only a description: fetch the model again", folder=folder)
    if not (args.tokenizer or args.skip_tokenizer_init or any((folder / name).is_file() for name in TOKENIZERS)):
        raise ModelUnavailable(
            "{folder} holds no tokenizer: fetch the model again, or name one with --tokenizer", folder=folder
        )
    if args.tokenizer and Path(args.tokenizer).is_dir():
        check_descriptions(Path(args.tokenizer))
    if not (args.tokenizer or args.trust_remote_code) and _tokenizer_is_code(folder):
        raise ModelUnavailable(
            "{folder} brings Python code as its tokenizer: read it, then add --trust-remote-code (/chat stays off), or "
            "put a tokenizer.json there",
            folder=folder,
        )
    config = read_config(args.model)
    architectures = config.get("architectures") or []
    trained = config.get("max_position_embeddings") or 0
    if qwen_v1.VLLM_ARCHITECTURE in architectures and (args.max_model_len or 0) > trained:
        raise ModelUnavailable(
            "{model} was trained on {context} tokens; how it stretches beyond (dynamic NTK, logn attention) is not in "
            "vLLM: leave --max-model-len out, or name less",
            model=folder.name,
            context=trained,
        )
    if language_part_only(args.model) and not any(name.startswith("Qwen") for name in architectures):
        raise ModelUnavailable(
            "{model} takes images, which needs torchvision, and that is not installed: with vLLM's CPU build, add "
            "PyTorch's CPU build of the version that requirements.txt names",
            model=folder.name,
        )
    if _only_bfloat16(config) and str(args.dtype).removeprefix("torch.") in ("half", "float16"):
        raise ModelUnavailable(
            "vLLM for the CPU computes {model} in bfloat16 alone: leave --dtype out", model=folder.name
        )
    if _four_bits(config) and not hardware.computes_four_bits():
        raise ModelUnavailable(
            "{model} has weights of 4 bits, for which vLLM needs a GPU, or a processor with AVX-512: take the model "
            "without GPTQ or AWQ here",
            model=folder.name,
        )
    _check_gptq(folder.name, config.get("quantization_config") or {})
    known = ModelRegistry.get_supported_archs()
    if not any(name in known or hasattr(transformers, name) for name in architectures):
        if "auto_map" not in config:
            names = ", ".join(map(str, architectures)) or say("none")
            raise ModelUnavailable(
                "this version of vLLM does not know the architecture of {folder}: {names}", folder=folder, names=names
            )
        if not args.trust_remote_code:
            raise ModelUnavailable(
                "{folder} needs the code that it brings: read it, then add --trust-remote-code", folder=folder
            )
    elif args.load_format != "dummy" and any(re.fullmatch(r"Qwen\w+ForCausalLM", name) for name in architectures):
        _check_output_embeddings(folder, args.hf_overrides)


def _tokenizer_is_code(folder: Path) -> bool:
    import transformers

    file = folder / "tokenizer_config.json"
    if (folder / "tokenizer.json").is_file() or not file.is_file():
        return False
    config = read_json(file)
    return "AutoTokenizer" in config.get("auto_map", {}) and not hasattr(
        transformers, config.get("tokenizer_class", "")
    )


def _check_gptq(name: str, quantization: Mapping[str, Any]) -> None:
    """Refuse what AutoGPTQ offers and vLLM no longer takes."""
    if quantization.get("quant_method") != "gptq":
        return
    ordered = quantization.get("desc_act") and quantization.get("group_size") != -1
    if ordered or not quantization.get("sym", True) or quantization.get("bits", 4) not in (4, 8):
        raise ModelUnavailable(
            "{model}: of GPTQ vLLM takes 4 or 8 bits, symmetric, without desc_act: take another quantisation of it",
            model=name,
        )


def _check_output_embeddings(folder: Path, overrides: Any) -> None:
    """Refuse a Qwen whose weights are otherwise than its config.json says: with a matrix for the output, or without.

    vLLM meets a missing one after it has loaded; one that is there too many it leaves out, and answers nonsense.
    """
    from transformers import AutoConfig

    found = {}
    for file in weight_files(folder):
        if file.suffix != ".safetensors":
            return
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                if name.endswith(("embed_tokens.weight", "lm_head.weight")):
                    found[name.split(".")[-2]] = tensors.get_slice(name)[:8]
                elif "lm_head" in name:
                    return  # quantised
    if "embed_tokens" not in found:
        return
    config = AutoConfig.from_pretrained(folder)
    if callable(overrides):
        config = overrides(config)
    else:
        config.update(overrides or {})
    tied = config.get_text_config().tie_word_embeddings
    if not tied and "lm_head" not in found:
        raise ModelUnavailable(
            "{folder} has no lm_head.weight, and its config.json does not say that the embeddings stand in for it: "
            'add "tie_word_embeddings": true there, or fetch the model again',
            folder=folder,
        )
    if tied and "lm_head" in found and not found["lm_head"].equal(found["embed_tokens"]):
        raise ModelUnavailable(
            "{folder} has a lm_head.weight of its own, and its config.json says that the embeddings stand in for it: "
            'set "tie_word_embeddings": false there',
            folder=folder,
        )


def number_format(args: ModelArgs) -> str:
    """Choose the dtype to load with.

    It is that of `args`. A checkpoint of 4 bits takes only formats of 16 bits: there float32, our default on some
    processors, gives way to the checkpoint's own. On a CPU, vLLM's kernels for a gated delta net (GDN) take only
    bfloat16, which it emulates where the processor does not have it.
    """
    config = read_config(args.model)
    if _only_bfloat16(config):
        return "bfloat16"
    return "auto" if args.dtype == "float32" and _four_bits(config) else args.dtype


def language_part_only(folder: str) -> bool:
    """Tell whether the model in `folder` takes images, and what it needs for them is not installed."""
    return "vision_config" in read_config(folder) and not find_spec("torchvision")


def _only_bfloat16(config: Mapping[str, Any]) -> bool:
    return hardware.on_cpu() and str(config.get("model_type")).startswith(GATED_DELTA_NETS)


def read_config(folder: str) -> dict[str, Any]:
    """Read the config.json of a folder that was checked."""
    config: dict[str, Any] = read_json(Path(folder) / "config.json")
    return config


def _four_bits(config: Mapping[str, Any]) -> bool:
    return (config.get("quantization_config") or {}).get("quant_method") in ("gptq", "awq")
