"""The parts of an answer on the page: the folded reasoning, the settings, the waiting line."""

import pytest

from qwen_vllm.protocol import ChatError, Sampling
from qwen_vllm.webui.answering import WaitingLine, answer_messages, sampling_of
from qwen_vllm.webui.words import WORDS
from tests.support.chat_messages import shown

EN = WORDS["en"]


def filled(**settings: str) -> list[str]:
    return [settings.get(name, "") for name in Sampling.model_fields]


@pytest.mark.parametrize(
    ("reasoning", "text", "ended", "messages"),
    [
        ("", "", False, []),
        ("", "\nHello", False, [("", "\nHello")]),
        ("\nHm", "", False, [(EN["reasoning_pending"], "Hm")]),
        ("Hm\n", "\n\nHello", False, [(EN["reasoning_done"], "Hm"), ("", "Hello")]),
        ("Hm", "", True, [(EN["reasoning_done"], "Hm")]),
        ("\n\n", "Hello", True, [("", "Hello")]),
    ],
)
def test_reasoning_is_folded_apart_from_the_answer(reasoning: str, text: str, ended: bool, messages: list) -> None:
    assert shown(answer_messages(reasoning, text, EN, ended)) == messages


def test_the_fields_of_the_settings_become_sampling_parameters() -> None:
    assert sampling_of(filled()) == Sampling()
    given = filled(
        temperature="0", max_tokens="12", top_p="0.5", stop="END\n\n。\n", enable_thinking="false", model="7"
    )
    expected = Sampling(temperature=0, max_tokens=12, top_p=0.5, stop=["END", "。"], enable_thinking=False, model="7")
    assert sampling_of(given) == expected


def test_no_ticket_where_the_line_is_full() -> None:
    crowd = WaitingLine(1, 0)
    with crowd.ticket(), pytest.raises(ChatError), crowd.ticket():
        pytest.fail("there is no place")
    with crowd.ticket():
        pass
