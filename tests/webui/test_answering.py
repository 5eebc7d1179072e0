"""The parts of an answer on the page: the folded reasoning, the settings, the waiting line."""

from typing import Any

import pytest

from qwen_vllm.protocol import ChatError, ChatResult, Question, Reasoning, Sampling, ServerInfo, turn
from qwen_vllm.webui.answering import Reply, WaitingLine, answer_messages, sampling_of
from qwen_vllm.webui.conversation import turns
from qwen_vllm.words import WORDS
from tests.support.chat_messages import shown, user

EN = WORDS["en"]


def filled(**settings: str) -> dict[str, str]:
    return {name: settings.get(name, "") for name in Sampling.model_fields}


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


def ended(*parts: Reasoning | str, keeps: bool = False, reason: str = "stop", efforts: tuple[str, ...] = ()) -> Reply:
    """A reply of these parts, from a server that keeps reasoning in the conversation, or not."""
    reply = Reply(EN, ServerInfo(["Qwen"], reasoning_efforts=list(efforts)))
    reasoning = "".join(part.text for part in parts if isinstance(part, Reasoning))
    text = "".join(part for part in parts if isinstance(part, str))
    history = [turn("q", text, reasoning if keeps else "")]
    end = ChatResult(text, history, reason, None, 20, 3, 0, reasoning, dropped_reasoning=2)
    for part in (*parts, end, None):
        reply.add(part)
    return reply


@pytest.mark.parametrize("keeps", [True, False])
def test_reasoning_is_sent_along_where_the_server_keeps_it(keeps: bool) -> None:
    reply = ended(Reasoning("\nHm"), "Hello", keeps=keeps)
    assert turns([user("q"), *reply.messages()]) == [(Question("q"), "Hello", "Hm" if keeps else "")]
    assert reply.figures().endswith(" · 20 tokens in, 3 out · turns without their thoughts: 2")


def test_the_folded_reasoning_has_its_seconds_and_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter((0.0, 1.0, 3.5, 4.0, 9.0, 9.5))
    monkeypatch.setattr("qwen_vllm.webui.answering.time.monotonic", lambda: next(times))
    reply = Reply(WORDS["zh"], ServerInfo([]))
    logs = []
    for part in (Reasoning("Hm"), Reasoning(" a"), "b", ChatResult("b", [], "stop", None, 20, 1203, 0, "Hm a", 1200)):
        reply.add(part)
        logs.append(reply.messages()[0]["metadata"].get("log"))
    assert logs == [None, None, "2.5 秒", "2.5 秒 · 1,200 词元"]


def test_the_reasoning_of_a_stopped_answer_is_sent_along() -> None:
    reply = Reply(EN, ServerInfo([]))
    for part in (Reasoning("Hm"), "Hel", None):
        reply.add(part)
    assert turns([user("q"), *reply.messages()]) == [(Question("q"), "Hel", "Hm")]


@pytest.mark.parametrize(("efforts", "more"), [((), ""), (("low", "high"), EN["lower_effort"])])
def test_an_answer_that_is_cut_in_its_reasoning_says_what_to_set(efforts: tuple[str, ...], more: str) -> None:
    reply = ended(Reasoning("Hm"), reason="length", efforts=efforts)
    told = (EN["no_answer"], EN["ended_in_reasoning"] + more)
    assert shown(reply.messages()) == [(EN["reasoning_done"], "Hm"), told]
    assert turns([user("q"), *reply.messages()]) == []
    assert reply.figures().endswith(EN["cut"])


def test_the_fields_of_the_settings_become_sampling_parameters() -> None:
    assert sampling_of(filled()) == Sampling()
    given = filled(temperature="0", max_tokens="12", top_p="0.5", stop="END\n\n。\n", reasoning_effort="off", model="7")
    expected = Sampling(temperature=0, max_tokens=12, top_p=0.5, stop=["END", "。"], enable_thinking=False, model="7")
    assert sampling_of(given) == expected


@pytest.mark.parametrize(
    ("depth", "sent"),
    [
        ("off", {"enable_thinking": False}),
        ("on", {"enable_thinking": True}),
        ("low", {"reasoning_effort": "low"}),
        ("", {}),
    ],
)
def test_the_depth_of_thought_is_one_menu(depth: str, sent: dict[str, Any]) -> None:
    assert sampling_of(filled(reasoning_effort=depth)).sampling() == sent


def test_no_ticket_where_the_line_is_full() -> None:
    crowd = WaitingLine(1, 0)
    with crowd.ticket(), pytest.raises(ChatError), crowd.ticket():
        pytest.fail("there is no place")
    with crowd.ticket():
        pass
