"""The page without a browser: what it sends, what it shows, who waits, and its command line."""

import asyncio
import base64
import json
import socket
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi.testclient import TestClient

from gradio_webui import Page, begin, build_app, main, parse_args, sampling_of
from qwen_vllm.protocol import ChatError, ChatRequest, Sampling, validated
from qwen_vllm.webui.answering import Line, answer_messages, remark
from qwen_vllm.webui.conversation import as_json, as_markdown, as_text, text_of, turns, with_images
from qwen_vllm.webui.words import WORDS
from tests.support.scripted_server import LAST, Server, line

UNSET = [""] * len(Sampling.model_fields)
EN = WORDS["en"]


def said(role: str, text: str, **metadata: str) -> dict[str, Any]:
    return {"role": role, "content": [{"type": "text", "text": text}], "metadata": metadata or None}


def user(text: str) -> dict[str, Any]:
    return said("user", text)


def assistant(text: str, **metadata: str) -> dict[str, Any]:
    return said("assistant", text, **metadata)


THOUGHT = assistant("Hm.", title="Thoughts", status="done")
TALK = [user("a"), THOUGHT, assistant("b"), user("c"), remark("No answer", "busy"), user("d"), assistant("half")]


def person(name: str = "ada", language: str = "en") -> SimpleNamespace:
    """Stands in for Gradio's request: a person's tab."""
    return SimpleNamespace(session_hash=name, headers={"accept-language": language})


def page_for(server: Server, line: Line | None = None) -> Page:
    return Page(server.url, "key", None, None, line or Line(8, 8))


def answer(page: Page, *messages: dict[str, Any], settings: list[str] = UNSET, tab: Any = None) -> AsyncIterator[tuple]:
    return page.answer("chat", list(messages), tab or person(), "system", *settings)


async def last(parts: AsyncIterator[tuple]) -> tuple[list[tuple[str, str]], str]:
    """What the page shows at the end: (title, text) of each message under the question, and the figures."""
    *_, (_, messages, figures) = [part async for part in parts]
    return shown(messages), figures


def shown(messages: list[dict[str, Any]]) -> list[tuple[str, str]]:
    replies = [message for message in messages if message["role"] == "assistant"]
    return [((m.get("metadata") or {}).get("title", ""), m["content"][0]["text"]) for m in replies]


@pytest.mark.parametrize(
    ("thought", "text", "ended", "messages"),
    [
        ("", "", False, []),
        ("", "\nHello", False, [("", "\nHello")]),
        ("\nHm", "", False, [(EN["thinking"], "Hm")]),
        ("Hm\n", "\n\nHello", False, [(EN["thoughts"], "Hm"), ("", "Hello")]),
        ("Hm", "", True, [(EN["thoughts"], "Hm")]),
        ("\n\n", "Hello", True, [("", "Hello")]),
    ],
)
def test_thoughts_are_folded_apart_from_the_answer(thought: str, text: str, ended: bool, messages: list) -> None:
    assert shown(answer_messages(thought, text, EN, ended)) == messages


@pytest.mark.parametrize(
    ("text", "rendered"),
    [
        ("vector<int> 1 < 2", "vector<\u2060int> 1 < 2"),
        ("</p><!-- x --><?y?>", "<\u2060/p><\u2060!-- x --><\u2060?y?>"),
        ("a<br>b<br />H<sub>2</sub>O", "a<br>b<br />H<sub>2</sub>O"),
        ("<sub onclick=x>", "<\u2060sub onclick=x>"),
        ("`<b>` <b>", "`<b>` <\u2060b>"),
        ("```\n<b>`\n```\n<b>", "```\n<b>`\n```\n<\u2060b>"),
        ("```\n<b>", "```\n<b>"),
        ("\\`<b>`", "\\`<\u2060b>`"),
    ],
)
def test_html_shows_as_it_is_written(text: str, rendered: str) -> None:
    message = {"role": "user", "content": [{"type": "text", "text": as_text(text)}]}
    assert as_text(text) == rendered
    assert text_of(message) == text


def test_thoughts_and_failed_turns_are_no_history() -> None:
    assert turns(TALK) == [("a", "b"), ("d", "half")]
    assert turns([user("a"), assistant("half"), remark("No answer", "broke off")]) == []
    assert turns([user("a"), THOUGHT]) == []


def test_exports_hold_the_conversation() -> None:
    exported = json.loads(as_json(TALK, "Be brief."))
    loaded = validated(ChatRequest, json.dumps({"query": "-", **exported}).encode())  # as the terminals do
    assert (loaded.system, loaded.history) == ("Be brief.", [("a", "b"), ("d", "half")])
    assert as_markdown(TALK[:3], "Be brief.") == "## System\n\nBe brief.\n\n## User\n\na\n\n## Assistant\n\nb\n"


def filled(**settings: str) -> list[str]:
    return [settings.get(name, "") for name in Sampling.model_fields]


def test_the_fields_of_the_settings_become_sampling_parameters() -> None:
    assert sampling_of(UNSET) == Sampling()
    given = filled(
        temperature="0", max_tokens="12", top_p="0.5", stop="END\n\n。\n", enable_thinking="false", model="7"
    )
    expected = Sampling(temperature=0, max_tokens=12, top_p=0.5, stop=["END", "。"], enable_thinking=False, model="7")
    assert sampling_of(given) == expected


@pytest.mark.parametrize("settings", [{"temperature": "hot"}, {"max_tokens": "1.5"}, {"top_p": "2"}, {"seed": "[1]"}])
def test_a_setting_that_is_not_allowed_is_named(server: Server, settings: dict[str, str]) -> None:
    [(title, text)], _ = asyncio.run(last(answer(page_for(server), user("q"), settings=filled(**settings))))
    assert title == EN["no_answer"]
    assert next(iter(settings)) in text
    assert not server.requests


def test_an_answer_comes_piece_by_piece_with_its_figures(server: Server) -> None:
    seen = threading.Event()
    server.play(line({"delta": "Hel"}), seen, line({"delta": "lo"}), line(LAST))

    async def watch() -> list[tuple]:
        parts = answer(page_for(server), user("q"))
        first = await anext(parts)
        seen.set()
        return [first, *[part async for part in parts]]

    first, *_, end = asyncio.run(watch())
    assert (first[0], first[1][0], shown(first[1]), first[2]) == ("chat", user("q"), [("", "Hel")], "")
    assert shown(end[1]) == [("", "Hello")]
    assert end[2].startswith("first token 0.")
    assert end[2].endswith(" · 23 tokens · old turns left out: 1")


def test_the_key_and_the_conversation_are_sent(server: Server) -> None:
    server.play(line(LAST))
    asyncio.run(last(answer(page_for(server), *TALK, user("q"))))
    [(_, headers, body)] = server.requests
    assert {name.lower(): value for name, value in headers.items()}["authorization"] == "Bearer key"
    assert body == {"query": "q", "history": [["a", "b"], ["d", "half"]], "system": "system", "stream": True}


def test_an_answer_without_a_word_is_told(server: Server) -> None:
    server.play(line(LAST))
    assert asyncio.run(last(answer(page_for(server), user("q"))))[0] == [(EN["no_answer"], EN["empty_answer"])]


@pytest.mark.parametrize("messages", [[], TALK])
def test_without_a_question_nothing_is_asked(server: Server, messages: list) -> None:
    async def parts() -> list:
        return [part async for part in answer(page_for(server), *messages)]

    assert asyncio.run(parts()) == []
    assert not server.requests


def test_a_blank_question_stays_out_of_the_conversation() -> None:
    assert begin({"text": " \n", "files": []}, TALK)[1] == TALK
    assert begin({"text": " hi ", "files": []}, TALK)[1][-1]["content"] == user(" hi ")["content"]


@pytest.mark.parametrize(("language", "words"), [("zh-CN,zh;q=0.9,en;q=0.8", "zh"), ("de", "en"), ("en,zh", "en")])
def test_what_is_said_follows_the_browser(server: Server, language: str, words: str) -> None:
    server.play(line({"error": {"type": "unauthorized", "message": "x"}}), status=401)
    messages, _ = asyncio.run(last(answer(page_for(server), user("q"), tab=person(language=language))))
    assert messages == [(WORDS[words]["no_answer"], WORDS[words]["unauthorized"])]


def test_both_languages_say_the_same_things() -> None:
    untranslated = {f"{name}_info" for name in Sampling.model_fields} - set(WORDS["zh"])
    assert set(WORDS["en"]) == set(WORDS["zh"]) | untranslated
    assert untranslated == set()


@pytest.mark.parametrize("pieces", [{}, {"delta": "Hel"}, {"reasoning": "Hm"}])
def test_stop_ends_the_answer_at_once_and_keeps_what_has_come(server: Server, pieces: dict[str, str]) -> None:
    server.play(*([line(pieces)] if pieces else []), ...)

    async def stopped() -> tuple:
        page, tab = page_for(server), person()
        parts = answer(page, user("q"), tab=tab)
        if pieces:
            await anext(parts)
        end = asyncio.ensure_future(last(parts))
        while not server.requests:
            await asyncio.sleep(0.01)
        await page.stop(person("another"))
        await page.stop(tab)
        return await asyncio.wait_for(end, 1)

    expected = {"": (EN["no_answer"], EN["stopped_early"]), "Hel": ("", "Hel"), "Hm": (EN["thoughts"], "Hm")}
    assert asyncio.run(stopped()) == ([expected["".join(pieces.values())]], EN["stopped"])
    server.server_close()  # waits for the handlers
    assert server.left == [True]


def test_twenty_people_are_answered_side_by_side(server: Server) -> None:
    seen = threading.Event()
    server.play(line({"delta": "Hel"}), seen, line({"delta": "lo"}), line(LAST))

    async def all_at_once() -> list[tuple]:
        page = page_for(server, Line(20, 0))
        talks = [answer(page, user("q"), tab=person(str(n))) for n in range(20)]
        firsts = await asyncio.wait_for(asyncio.gather(*map(anext, talks)), 30)  # before any is at its end
        assert [shown(messages) for _, messages, _ in firsts] == [[("", "Hel")]] * 20
        seen.set()
        return await asyncio.gather(*map(last, talks))

    assert [messages for messages, _ in asyncio.run(all_at_once())] == [[("", "Hello")]] * 20


def test_who_comes_late_stands_in_line_and_sees_the_place(server: Server) -> None:
    seen = threading.Event()
    server.play(seen, line({"delta": "Hi"}), line(LAST))

    async def crowd() -> None:
        page = page_for(server, Line(1, 2))
        ada = asyncio.ensure_future(last(answer(page, user("q"))))
        while not server.requests:
            await asyncio.sleep(0.01)
        bob, cleo = (answer(page, user("q"), tab=person(name)) for name in ("bob", "cleo"))
        assert shown((await anext(bob))[1]) == [(EN["place"].format(place=1), "")]
        assert shown((await anext(cleo))[1]) == [(EN["place"].format(place=2), "")]
        assert (await last(answer(page, user("q"))))[0] == [(EN["no_answer"], EN["line_full"])]
        await page.stop(person("bob"))
        assert (await last(bob))[0] == [(EN["no_answer"], EN["stopped_early"])]
        assert shown((await anext(cleo))[1]) == [(EN["place"].format(place=1), "")]
        assert len(server.requests) == 1
        seen.set()
        assert (await ada)[0] == (await last(cleo))[0] == [("", "Hi")]

    asyncio.run(crowd())


def file_part(file: Path) -> dict[str, Any]:
    return {"type": "file", "file": {"path": str(file)}}


def test_images_go_along_as_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    (tmp_path / "dot.png").write_bytes(b"png")
    question = {"role": "user", "content": [file_part(tmp_path / "dot.png"), {"type": "text", "text": "What?"}]}
    image = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{base64.b64encode(b'png').decode()}"}}
    *earlier, now = with_images([*TALK[:3], question])
    text = [{"type": "text", "text": "a"}]
    assert earlier == [{"role": "user", "content": text}, {"role": "assistant", "content": "b"}]
    assert now["content"] == [image, {"type": "text", "text": "What?"}]


def test_an_export_has_the_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    (tmp_path / "dot.png").write_bytes(b"png")
    question = {"role": "user", "content": [file_part(tmp_path / "dot.png"), *TALK[0]["content"]]}
    exported = json.loads(as_json([question, *TALK[1:]], "Be brief."))
    assert exported["images"] == [[f"data:image/png;base64,{base64.b64encode(b'png').decode()}"], []]
    assert exported["history"] == [["a", "b"], ["d", "half"]]


@pytest.mark.parametrize("path", ["up/gone.png", "up/notes.txt", "secret.png", "up/../secret.png", "up/link.png"])
def test_no_other_file_goes_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    uploads = tmp_path / "up"
    uploads.mkdir()
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(uploads))
    (uploads / "notes.txt").write_text("secret")
    (tmp_path / "secret.png").write_text("secret")
    (uploads / "link.png").symlink_to(tmp_path / "secret.png")
    [question] = with_images([{"role": "user", "content": [file_part(tmp_path / path)]}])
    assert question["content"] == [{"type": "text", "text": "(an image that is not kept any more)"}]


@pytest.mark.parametrize(
    "flags",
    [
        ["--auth", "ada"],
        ["--auth", ":secret"],
        ["--auth-file", "/no/such/file"],
        ["--ssl-certfile", "/no/such/file"],
        ["--concurrency", "0"],
        ["--queue", "-1"],
        ["--lang", "tlh"],
    ],
)
def test_a_wrong_flag_is_told(flags: list[str], capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        parse_args(flags)
    assert flags[0] in capsys.readouterr().err


def test_passwords_from_flags_and_a_file(tmp_path: Path) -> None:
    file = tmp_path / "people"
    file.write_text("bob:s:e:c\n\n")
    assert parse_args(["--auth", "ada:x", "--auth-file", str(file)]).auth == [("ada", "x"), ("bob", "s:e:c")]


def test_a_taken_port_is_told_in_one_line(capsys: pytest.CaptureFixture) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert main(["--port", str(taken.getsockname()[1])]) == 1
    assert "choose another --port" in capsys.readouterr().err


def visit(*flags: str) -> TestClient:
    return TestClient(build_app(parse_args(flags)))


def test_every_answer_of_the_page_forbids_other_hosts() -> None:
    for path in ("/", "/config", "/nowhere"):
        assert visit().get(path).headers["content-security-policy"].startswith("default-src 'self'")


def test_the_page_tells_nobody_of_itself() -> None:
    config = visit().get("/config").json()
    assert not config["analytics_enabled"]
    assert not config["run_history"]
    assert config["footer_links"] == []
    assert [dependency["api_visibility"] for dependency in config["dependencies"]].count("public") == 0


def test_a_path_behind_a_proxy() -> None:
    assert visit("--root-path", "/chat").get("/config").json()["root"].endswith("/chat")


def test_no_ticket_where_the_line_is_full() -> None:
    crowd = Line(1, 0)
    with crowd.ticket(), pytest.raises(ChatError), crowd.ticket():
        pytest.fail("there is no place")
    with crowd.ticket():
        pass
