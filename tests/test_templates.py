"""The prompt builder on the families' own templates: the same token ids, and text that stays text."""

import random
import unicodedata
from functools import cache
from itertools import pairwise, takewhile

import pytest
from transformers import PreTrainedTokenizerBase

from prompt_utils import PromptBuilder, PromptTooLong, UnsupportedTemplate, UnsupportedTokenizer
from qwen_vllm.protocol import DEFAULT_SYSTEM, Turn
from tests.support.tiny_families import FAMILIES, PIECES, REFUSED, Family, tokenizer_of

MANY = 2**20
TURNS = (0, 0, 1, 1, 2, 3, 6)
TAGGED = ["<think>\nHm.\n</think>\n\n", "<think>\n \n</think>", "</think>\n\n  "]


@cache
def builder_of(name: str) -> PromptBuilder:
    return PromptBuilder(tokenizer_of(name))


def by_template(
    tokenizer: PreTrainedTokenizerBase, family: Family, system: str, history: list[Turn], query: str, **flags: bool
) -> list[int]:
    messages = family.messages(system, history, query)
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False, **flags)


def random_text(dice: random.Random, pieces: list[str]) -> str:
    match dice.randrange(8):
        case 0:
            return ""
        case 1:
            codes = (dice.choice((0x80, 0x800, 0x3000, 0x10000, 0x30000)) for _ in range(dice.randrange(30)))
            drawn = (chr(dice.randrange(code)) for code in codes)
            return "".join(char for char in drawn if unicodedata.category(char) != "Cs" and char not in "<▁")
        case 2:
            return dice.choice(pieces) * dice.choice((1, 2, 50, 400))
    return "".join(dice.choices(pieces, k=dice.randrange(1, 8)))


def random_conversation(dice: random.Random, pieces: list[str]) -> tuple[str, list[Turn], str]:
    history = [
        tuple(random_text(dice, pieces) for _ in range(dice.choice((2, 2, 3)))) for _ in range(dice.choice(TURNS))
    ]
    return random_text(dice, pieces), history, random_text(dice, pieces)


def counts(count: int) -> list[object]:
    """A count for every run, and a longer one for long runs."""
    return [count, pytest.param(25 * count, marks=pytest.mark.long)]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("count", counts(40))
def test_any_conversation_has_the_templates_token_ids(name: str, count: int) -> None:
    dice, family, tokenizer, builder = random.Random(name), FAMILIES[name], tokenizer_of(name), builder_of(name)
    for _ in range(count):
        conversation = random_conversation(dice, PIECES)
        mode = {"enable_thinking": dice.choice((None, True, False))}
        mode |= {"reasoning_effort": dice.choice((None, *builder.efforts))}
        flags = {name: value for name, value in mode.items() if value is not None}
        expected = by_template(tokenizer, family, *conversation, **flags)
        assert builder.build(*conversation, MANY, **mode).token_ids == expected


@pytest.mark.parametrize("name", [name for name in FAMILIES if "Qwen" in name])
def test_reasoning_within_an_answer_is_taken_out_as_the_template_does(name: str) -> None:
    dice, family, tokenizer, builder = random.Random(name), FAMILIES[name], tokenizer_of(name), builder_of(name)
    for _ in range(40):
        history = [("?", dice.choice(TAGGED) + random_text(dice, PIECES))] * dice.randrange(1, 3)
        token_ids, expected = (
            builder.build("", history, "?", MANY).token_ids,
            by_template(tokenizer, family, "", history, "?"),
        )
        if name in ("Qwen3.8", "Qwen3.8 medium"):  # its tags are control tokens, which no text can spell
            token_ids, expected = tokenizer.decode(token_ids), tokenizer.decode(expected)
        assert token_ids == expected


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("count", counts(25))
def test_text_that_spells_control_tokens_stays_text(name: str, count: int) -> None:
    family, tokenizer, builder = FAMILIES[name], tokenizer_of(name), builder_of(name)
    between = [token for token in family.plain if token in ("<｜User｜>", "<｜Assistant｜>")]
    between += ["<think>", "</think>"] if builder.keeps_reasoning else []
    control = {*tokenizer.convert_tokens_to_ids([*family.control, *between])}
    spelled = [token for token in (*family.control, *between) for _ in range(3)]
    spelled += [f"{left}\n{right}assistant\n" for left in family.control for right in family.control]
    dice = random.Random(name)
    for _ in range(count):
        conversation = random_conversation(dice, PIECES + spelled)
        token_ids = builder.build(*conversation, MANY).token_ids
        _, history, _ = conversation
        system = "s" if conversation[0].strip() else ""
        said = [("u", "a", *("r" if text.strip() else "" for text in reasoning)) for _, _, *reasoning in history]
        plain = builder.build(system, said, "q", MANY).token_ids
        assert [i for i in token_ids if i in control] == [i for i in plain if i in control]
        assert tokenizer.decode(token_ids) == builder.render(*conversation)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("system", ["", "Be brief.", "long " * 30])
def test_the_newest_whole_turns_that_fit_are_kept(name: str, system: str) -> None:
    builder = builder_of(name)
    history = [(f" question {n}", f"answer {n} " * n) for n in range(1, 4)]
    whole = [builder.build(system, history[n:], "q", MANY).token_ids for n in range(len(history) + 1)]
    for budget in range(len(whole[-1]), len(whole[0]) + 1):
        prompt = builder.build(system, history, "q", budget)
        assert prompt.token_ids == whole[prompt.dropped_turns]
        assert prompt.dropped_turns == min(n for n, token_ids in enumerate(whole) if len(token_ids) <= budget)
    with pytest.raises(PromptTooLong, match=f"take {len(whole[-1])} tokens, but only {len(whole[-1]) - 1} fit"):
        builder.build(system, history, "q", len(whole[-1]) - 1)


@pytest.mark.parametrize("name", ["Qwen3.6 keeping", "Qwen3.8"])
@pytest.mark.parametrize("system", ["", "Be brief."])
def test_reasoning_goes_before_turns_and_the_oldest_first(name: str, system: str) -> None:
    builder = builder_of(name)
    history = [(f"question {n}", f"answer {n}", *([f"thought {n} " * n] if n != 3 else [])) for n in range(1, 6)]
    bare = [turn[:2] for turn in history]
    least, all_bare, whole = (len(builder.build(system, turns, "q", MANY).token_ids) for turns in ([], bare, history))
    for budget in range(least, whole + 1):
        prompt = builder.build(system, history, "q", budget)
        assert len(prompt.token_ids) <= budget
        assert bool(prompt.dropped_turns) == (budget < all_bare)
        assert bool(prompt.dropped_turns or prompt.dropped_reasoning) == (budget < whole)
        left = [n for n in range(prompt.dropped_turns, 5) if len(history[n]) == 3][prompt.dropped_reasoning :]
        kept = [turn if n in left else turn[:2] for n, turn in enumerate(history)][prompt.dropped_turns :]
        assert prompt.token_ids == builder.build(system, kept, "q", MANY).token_ids


@pytest.mark.parametrize("name", FAMILIES)
def test_while_the_context_is_full_the_engine_finds_most_of_the_prompt_in_its_cache(name: str) -> None:
    dice, builder = random.Random(name), builder_of(name)
    history = [tuple(f"{n} " * dice.randrange(1, 40) for _ in range(3)) for n in range(120)]
    budget = len(builder.build("Be brief.", history[:60], "q", MANY).token_ids)
    prompts = [builder.build("Be brief.", history[:n], history[n][0], budget) for n in range(61, 120)]
    assert all(prompt.dropped_turns or prompt.dropped_reasoning for prompt in prompts)
    pairs = [zip(one.token_ids, two.token_ids, strict=False) for one, two in pairwise(prompts)]
    shared = sum(len([*takewhile(lambda pair: pair[0] == pair[1], pair)]) for pair in pairs)
    assert shared > 0.75 * sum(len(prompt.token_ids) for prompt in prompts)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("system", ["", DEFAULT_SYSTEM])
def test_a_templates_own_default_system_prompt_never_comes_in(name: str, system: str) -> None:
    prompt = tokenizer_of(name).decode(builder_of(name).build(system, [], "q", MANY).token_ids)
    assert prompt.count("You are") == prompt.count(system or "You are") == bool(system)


@pytest.mark.parametrize("name", FAMILIES)
def test_without_a_system_message_the_template_does_what_it_does_with_none(name: str) -> None:
    dice, tokenizer, builder = random.Random(name), tokenizer_of(name), builder_of(name)
    for _ in range(20):
        _, history, query = random_conversation(dice, PIECES)
        messages = FAMILIES[name].messages("", history, query)
        messages = messages[messages[0]["role"] == "system" :]
        expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert builder.build(None, history, query, MANY).token_ids == expected
    if name == "Qwen2.5":
        assert "You are Qwen, created by Alibaba Cloud." in tokenizer.decode(expected)


@pytest.mark.parametrize("name", REFUSED)
def test_a_template_that_text_could_pass_for_is_refused(name: str) -> None:
    with pytest.raises(UnsupportedTemplate):
        builder_of(name)


def test_a_tokenizer_of_another_library_is_refused() -> None:
    class Tekken:
        is_fast = False
        chat_template = FAMILIES["Mistral 0.3"].template

    with pytest.raises(UnsupportedTokenizer):
        PromptBuilder(Tekken())


def test_a_tokenizer_that_makes_control_tokens_of_pieces_is_refused() -> None:
    """As one may whose vocabulary can build a control token from parts of it."""
    tokenizer = FAMILIES["Qwen2.5"].tokenizer(small=True)
    tokenizer.backend_tokenizer.add_special_tokens(["a"])
    tokenizer = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, chat_template=tokenizer.chat_template)
    with pytest.raises(UnsupportedTemplate, match="takes text for control tokens"):
        PromptBuilder(tokenizer)
