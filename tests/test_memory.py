"""The memory of models, against transformers' own count and the published sizes; the table in the docs is this one."""

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from docs.memory import BITS, MODELS, table, token_bytes, tokens_that_fit, weight_bytes

DOCS = Path(__file__).parents[1] / "docs"
BILLIONS = {"0.5B": 0.49, "1.5B": 1.54, "3B": 3.09, "7B": 7.61, "14B": 14.7, "32B": 32.5, "72B": 72.7}


@pytest.mark.parametrize("model", MODELS)
def test_the_weights_are_those_of_the_network(model: str) -> None:
    with torch.device("meta"):
        network = AutoModelForCausalLM.from_config(AutoConfig.for_model(**MODELS[model]))
    assert weight_bytes(MODELS[model], BITS["BF16"]) == 2 * network.num_parameters()


@pytest.mark.parametrize("size", BILLIONS)
def test_the_weights_are_as_many_as_published(size: str) -> None:
    weights = weight_bytes(MODELS[f"Qwen2.5-{size}"], BITS["BF16"]) / 2
    assert weights / 1e9 == pytest.approx(BILLIONS[size], rel=0.01)


def test_what_fits_with_the_weights_fills_the_card() -> None:
    model, bits = MODELS["Qwen2.5-7B"], BITS["Int4"]
    tokens = tokens_that_fit(model, bits, 24)
    used = weight_bytes(model, bits) + tokens * token_bytes(model)
    assert 20.5e9 < used + token_bytes(model) <= 24e9 * 0.92
    assert tokens_that_fit(model, BITS["BF16"], 12) == 0


@pytest.mark.parametrize("page", ["models.md", "models.zh-CN.md"])
def test_the_table_in_the_docs_is_the_programs(page: str) -> None:
    lines = table(MODELS).splitlines()
    assert "\n".join(lines[2:]) in (DOCS / page).read_text()
