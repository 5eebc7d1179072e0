"""The page without a browser: what it sends, what it shows, who waits, and its command line."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Awaitable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import requests
from fastapi.testclient import TestClient

from gradio_webui import LONGEST_DRAWING, Page, PageServer, main, parse_args
from qwen_vllm.protocol import Sampling
from qwen_vllm.webui import mended
from qwen_vllm.webui.answering import WaitingLine
from qwen_vllm.words import WORDS
from tests.support.chat_messages import TALK, assistant, kept_settings, shown, user
from tests.support.scripted_server import LAST, Server, line
from tests.support.switch import switch

EN = WORDS["en"]


def person(name: str = "ada", language: str = "en") -> SimpleNamespace:
    """Stands in for Gradio's request: a person's tab."""
    return SimpleNamespace(session_hash=name, headers={"accept-language": language})


def page_for(server: Server, line: WaitingLine | None = None) -> Page:
    return Page(server.url, "key", None, None, line or WaitingLine(8, 8))


def answer(
    page: Page, *messages: dict[str, Any], settings: str = kept_settings(), tab: Any = None
) -> AsyncIterator[tuple]:
    last = len(messages) - bool(messages and messages[-1]["role"] == "user")
    return page.answer("chat", list(messages[:last]), list(messages[last:]), settings, tab or person())


async def last(parts: AsyncIterator[tuple]) -> tuple[list[tuple[str, str]], str]:
    """What the page shows at the end: (title, text) of each message under the question, and the figures."""
    *_, (_, messages, figures) = [part async for part in parts]
    return shown(messages), figures


@pytest.mark.parametrize("settings", [{"temperature": "hot"}, {"max_tokens": "1.5"}, {"top_p": "2"}, {"seed": "[1]"}])
def test_a_setting_that_is_not_allowed_is_named(server: Server, settings: dict[str, str]) -> None:
    [(title, text)], _ = asyncio.run(last(answer(page_for(server), user("q"), settings=kept_settings(**settings))))
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
    assert end[2].endswith(" · 20 tokens in, 3 out · old turns left out: 1")


def test_a_long_answer_is_drawn_less_often_whatever_came_before(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.play(line({"delta": "Hi"}), line(LAST))
    server.then_play(line({"delta": "Hi"}), line(LAST))
    server.then_play(line({"delta": "a" * 200_000}), line(LAST))
    pauses = []

    async def pause(ended: Awaitable, seconds: float) -> None:
        pauses.append(seconds)
        await ended

    monkeypatch.setattr("gradio_webui.asyncio.wait_for", pause)
    asyncio.run(last(answer(page_for(server), user("q"))))
    asyncio.run(last(answer(page_for(server), *[user("q" * 5000), assistant("a" * 5000)] * 20, user("q"))))
    assert pauses[0] == pauses[-1]
    asyncio.run(last(answer(page_for(server), user("q"))))
    assert 10 * pauses[0] < pauses[-1] < 1


async def twice_drawn(page: Page, tab: Any, parts: list[threading.Event]) -> AsyncIterator[tuple]:
    """An answer that goes on behind two of its parts. The browser is done with the drawing of the first only."""
    drawn = answer(page, user("q"), tab=tab)
    await anext(drawn)
    await page.drawn(tab)
    parts[0].set()
    await anext(drawn)
    parts[1].set()
    return drawn


def test_the_next_drawing_waits_until_the_browser_is_done_with_the_last(server: Server) -> None:
    parts = [threading.Event() for _ in range(3)]
    texts = [line({"delta": text}) for text in ("one", " two", " three")]
    server.play(*[step for text, part in zip(texts, parts, strict=True) for step in (text, part)], line(LAST))

    async def watch() -> list[tuple[str, str]]:
        page, tab = page_for(server), person()
        drawn = await twice_drawn(page, tab, parts)
        third = asyncio.ensure_future(anext(drawn))
        await asyncio.sleep(0.3)
        assert not third.done()
        await page.drawn(person("another"))
        await page.drawn(tab)
        parts[2].set()
        return shown((await third)[1])

    assert asyncio.run(watch()) == [("", "one two three")]


def test_the_end_of_an_answer_does_not_wait_for_the_browser(server: Server) -> None:
    parts = [threading.Event(), threading.Event()]
    server.play(line({"delta": "one"}), parts[0], line({"delta": " two"}), parts[1], line(LAST))

    async def watch() -> list[tuple[str, str]]:
        drawn = await twice_drawn(page_for(server), person(), parts)
        async with asyncio.timeout(LONGEST_DRAWING / 2):
            return shown((await anext(drawn))[1])

    assert asyncio.run(watch()) == [("", "one two")]


def test_the_key_and_the_conversation_are_sent(server: Server) -> None:
    server.play(line(LAST))
    asyncio.run(last(answer(page_for(server), *TALK, user("q"))))
    [(_, headers, body)] = server.requests
    assert {name.lower(): value for name, value in headers.items()}["authorization"] == "Bearer key"
    asked = {"query": "q", "history": [["a", "b"], ["d", "half"]], "system": "system"}
    assert body == {**asked, "stream": True, "keep_alive": True}


def test_several_models_at_one_address_are_in_the_menu_and_asked_by_their_names(server: Server) -> None:
    event = {"choices": [{"delta": {"content": "Rose"}, "finish_reason": "stop"}]}
    usage = {"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 2}}
    server.play(b"data: " + line(event), b"data: " + line(usage), path="/v1/chat/completions")
    with switch({"base": server.url, "poet": server.url}) as url:
        page = Page(url, "key", None, None, WaitingLine(8, 8))
        title, *fields = asyncio.run(page.greet(person()))
        assert title == "<h1>base</h1>"
        assert fields[list(Sampling.model_fields).index("model")]["choices"] == ["base", "poet"]
        for settings in (kept_settings(), kept_settings(model="poet")):
            assert asyncio.run(last(answer(page, user("q"), settings=settings)))[0] == [("", "Rose")]
    assert [body["model"] for _, _, body in server.requests] == ["base", "poet"]


def test_an_answer_without_a_word_is_told(server: Server) -> None:
    server.play(line(LAST))
    assert asyncio.run(last(answer(page_for(server), user("q"))))[0] == [(EN["no_answer"], EN["empty_answer"])]


@pytest.mark.parametrize("messages", [[], TALK])
def test_without_a_question_nothing_is_asked(server: Server, messages: list) -> None:
    async def parts() -> list:
        return [part async for part in answer(page_for(server), *messages)]

    assert asyncio.run(parts()) == []
    assert not server.requests


def test_a_blank_question_stays_out_of_the_conversation(server: Server) -> None:
    def began(text: str) -> list:
        asked = {"text": text, "files": []}
        return asyncio.run(page_for(server).begin(asked, "[]", "[]", False, kept_settings(), person()))[1]

    assert began(" \n") == []
    assert began(" hi ")[-1]["content"] == user(" hi ")["content"]


@pytest.mark.parametrize(("language", "words"), [("zh-CN,zh;q=0.9,en;q=0.8", "zh"), ("de", "en"), ("en,zh", "en")])
def test_what_is_said_follows_the_browser(server: Server, language: str, words: str) -> None:
    server.play(line({"error": {"type": "unauthorized", "message": "x"}}), status=401)
    messages, _ = asyncio.run(last(answer(page_for(server), user("q"), tab=person(language=language))))
    assert messages == [(WORDS[words]["no_answer"], WORDS[words]["unauthorized"])]


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

    expected = {"": (EN["no_answer"], EN["stopped_early"]), "Hel": ("", "Hel"), "Hm": (EN["reasoning_done"], "Hm")}
    assert asyncio.run(stopped()) == ([expected["".join(pieces.values())]], EN["stopped"])
    server.server_close()  # waits for the handlers
    assert server.left == [True]


def test_twenty_people_are_answered_side_by_side(server: Server) -> None:
    seen = threading.Event()
    server.play(line({"delta": "Hel"}), seen, line({"delta": "lo"}), line(LAST))

    async def all_at_once() -> list[tuple]:
        page = page_for(server, WaitingLine(20, 0))
        talks = [answer(page, user("q"), tab=person(str(n))) for n in range(20)]
        firsts = await asyncio.wait_for(asyncio.gather(*map(anext, talks)), 30)  # before any is at its end
        assert [shown(messages) for _, messages, _ in firsts] == [[("", "Hel")]] * 20
        seen.set()
        return await asyncio.gather(*map(last, talks))

    assert [messages for messages, _ in asyncio.run(all_at_once())] == [[("", "Hello")]] * 20


def test_who_waits_for_the_model_server_sees_the_place_then_how_much_is_read(server: Server) -> None:
    third, reading = threading.Event(), threading.Event()
    signs = [line({"waiting": place, "prompt_tokens": 7600}) for place in (3, 0)]
    server.play(signs[0], third, signs[1], reading, line({"delta": "Hi"}), line(LAST))

    async def wait() -> None:
        waiting = answer(page_for(server, WaitingLine(1, 0)), user("q"))
        assert shown((await anext(waiting))[1]) == [(EN["place"].format(place=3), "")]
        third.set()
        assert shown((await anext(waiting))[1]) == [(EN["reading"].format(tokens=7600), "")]
        reading.set()
        assert (await last(waiting))[0] == [("", "Hi")]

    asyncio.run(wait())


def test_who_comes_late_stands_in_line_and_sees_the_place(server: Server) -> None:
    seen = threading.Event()
    server.play(seen, line({"delta": "Hi"}), line(LAST))

    async def crowd() -> None:
        page = page_for(server, WaitingLine(1, 2))
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


def test_a_taken_port_is_told_in_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(SystemExit) as end:
        main(["--port", str(taken.getsockname()[1])])
    assert "choose another --port" in str(end.value)


def visit(*flags: str) -> TestClient:
    return TestClient(PageServer(parse_args(flags)).config.app)


def test_every_answer_of_the_page_forbids_other_hosts() -> None:
    page = visit()
    for path in ("/", "/config", "/nowhere"):
        assert page.get(path).headers["content-security-policy"].startswith("default-src 'self'")


def test_nothing_can_be_asked_before_the_browser_has_restored_its_chat() -> None:
    [box] = [part for part in visit().get("/config").json()["components"] if part["props"].get("elem_id") == "box"]
    assert not box["props"]["interactive"]


def test_gradio_is_served_mended() -> None:
    page = visit()
    for name, repairs in mended.REPAIRS.items():
        [file] = [file for file in mended.assets(name) if page.get(f"/assets/{file.name}").text != file.read_text()]
        served = page.get(f"/assets/{file.name}")
        assert all(after in served.text for after in repairs.values())
        assert served.headers["content-type"].startswith("text/css" if name.endswith("css") else "text/javascript")


def test_another_gradio_is_refused_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(mended.REPAIRS, "Blocks-*.js", {"what this Gradio has not": ""})
    with pytest.raises(RuntimeError, match="is not the one this page is made for: run `make setup`"):
        visit()


def test_the_page_tells_nobody_of_itself() -> None:
    config = visit().get("/config").json()
    assert not config["analytics_enabled"]
    assert not config["run_history"]
    assert config["footer_links"] == []
    assert [dependency["api_visibility"] for dependency in config["dependencies"]].count("public") == 0


@pytest.mark.parametrize("path", ["/chat", "/chat/"])
def test_a_path_behind_a_proxy(path: str) -> None:
    assert visit("--root-path", path).get("/config").json()["root"].endswith("/chat")


@pytest.mark.parametrize("root", ["/qwen", "https://chat.example:8443/qwen/"])
def test_the_page_makes_its_addresses_of_what_the_proxy_tells_or_of_the_flag(root: str) -> None:
    told = {"x-forwarded-host": "chat.example:8443", "x-forwarded-proto": "https"} if root == "/qwen" else {}
    assert visit("--root-path", root).get("/config", headers=told).json()["root"] == "https://chat.example:8443/qwen"


@pytest.mark.parametrize("proxy", ["socks://127.0.0.1:9", pytest.param("socks5://127.0.0.1:9", marks=pytest.mark.long)])
def test_the_page_starts_where_the_desktop_has_a_socks_proxy(proxy: str) -> None:
    environment = os.environ | {"ALL_PROXY": proxy, "http_proxy": proxy}
    command = [sys.executable, "gradio_webui.py", "--port", "0"]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as program:
        url = program.stdout.readline().split()[4]
        with requests.Session() as session:
            session.trust_env = False
            assert session.get(url, timeout=30).ok
        program.send_signal(signal.SIGINT)
        assert program.wait(30) == 0
