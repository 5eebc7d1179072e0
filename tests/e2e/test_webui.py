"""The page in a real browser: against a scripted server, and against the real one on the demo model."""

import asyncio
import base64
import json
import re
import subprocess
import threading
import time
from collections.abc import Iterator
from importlib.resources import files
from types import SimpleNamespace
from urllib.parse import urlsplit

import pytest
import requests
from PIL import Image
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from gradio_webui import LONGEST_DRAWING, Page
from qwen_vllm.webui.answering import WaitingLine
from qwen_vllm.webui.conversation import text_message, text_of
from qwen_vllm.webui.markdown import written
from tests.support import ROOT
from tests.support.answers import SEEN
from tests.support.browser import IN_BROWSER, INFO, PICK, Tab, exported, kept_chat, open_chat, questions
from tests.support.chat_messages import assistant, kept_settings, user
from tests.support.documents import pdf
from tests.support.page_server import ask, serving
from tests.support.probes import unfinished
from tests.support.programs import KEY
from tests.support.scripted_server import LAST, Server, line, scripted
from vllm_client import count_tokens_async

pytestmark = IN_BROWSER
MODEL = "SmolLM2-135M-Instruct"
FRANCE = "What is the capital of France?"
ATTACK = """\
<img src=x onerror="window.pwned=1"><script>window.pwned=1</script><svg onload="window.pwned=1"></svg>
<iframe src="javascript:parent.pwned=1"></iframe><a href="javascript:window.pwned=1">a</a>
<b style="position:fixed">c</b> <details open ontoggle="window.pwned=1">d</details> [b](javascript:window.pwned=1)
\\`<img src=x onerror=window.pwned=1>` ![leak](http://leak.example/x.png) $\\href{javascript:window.pwned=1}{x}$"""


RICH = """\
Here is **bold**, \\(x^2\\) and vector<int>.

```python
def one(): return 1
```

| a | b |
|---|---|
| 1 | 2 |
"""


def test_an_answer_is_shown_with_code_formulas_and_tables_and_thoughts_folded(server, page, person):
    seen = threading.Event()
    server.play(line({"reasoning": "Let me"}), seen, line({"reasoning": " see."}), line({"delta": RICH}), line(LAST))
    tab = person(page)
    assert tab.driver.title == tab.texts("#heading")[0] == "Qwen3-8B"
    tab.send("Show me")
    tab.until(lambda: any("Let me" in text and "Thinking" in text for text in tab.messages()))
    seen.set()
    tab.until(tab.figures)
    # While the fold closes, what it held is still a message of its own.
    tab.until(lambda: len(tab.messages()) == 3 and re.fullmatch(r"Thoughts\s+\d\.\d s", tab.messages()[1]))
    tab.until(lambda: "Here is bold" in tab.messages()[2])
    assert "vector<int>" in tab.messages()[2]
    marked = ["bold", "def", "return", "1", "2"]
    tab.until(lambda: tab.texts("#chat strong, #chat td, #chat code .keyword") == marked)
    tab.until(lambda: tab.run("return document.querySelectorAll('#chat .katex').length") == 1)
    assert tab.figures().endswith("20 tokens in, 3 out, of 8,192 · old turns left out: 1")
    server.play(line({"delta": "Sure."}), line(LAST))
    assert tab.ask("More?") == "Sure."
    assert questions(server)[1]["history"] == [["Show me", RICH]]
    assert tab.asked_hosts() == {urlsplit(page).netloc}


def test_text_cannot_run(server, page, person):
    model = {"models": [f"<b>x</b>{ATTACK}"], "context": 10, "images": False, "defaults": {"temperature": ATTACK}}
    server.play(line(model), path="/chat/info")
    server.play(line({"reasoning": ATTACK}), line({"delta": f"answered {ATTACK}"}), line(LAST))
    tab = person(page)
    assert "<b>x</b><img" in tab.texts("#heading")[0]
    attack = ATTACK.replace("\n", " ")
    assert "answered <img src=x onerror=" in tab.ask(attack)
    assert '<b style="position:fixed">c</b>' in tab.messages()[-1]
    assert tab.earlier()[0] == attack[:60].strip()
    server.play(line({"error": {"type": "engine_error", "message": ATTACK, "param": None}}), status=500)
    assert "<script>window.pwned=1</script>" in tab.ask("again")
    assert questions(server)[1]["history"] == [[attack, f"answered {ATTACK}"]]
    click_all = """document.querySelectorAll("#chat a, .thought-group .title").forEach((element) =>
        element.dispatchEvent(new MouseEvent("click", {bubbles: true, cancelable: true})))"""
    tab.run(click_all)
    tab.driver.refresh()
    tab.until(lambda: any("answered" in text for text in tab.messages()))
    tab.run(click_all)
    assert tab.run("return window.pwned") is None
    assert tab.run("return document.querySelectorAll('#talk :is(script, iframe, b, details, [onerror])').length") == 0
    assert tab.asked_hosts() == {urlsplit(page).netloc}


SEE = """
const names = {STRONG: "b", EM: "i", DEL: "del", CODE: "code", PRE: "pre", SUB: "sub", SUP: "sup", LI: "li",
  TD: "td", TH: "td", H1: "h1", BLOCKQUOTE: "quote", A: "a"};
const see = (node) => {
  if (node.nodeType === Node.TEXT_NODE) return node.data.trim() || !node.data.includes("\\n") ? node.data : "";
  if (node.matches(".katex-display")) return `⟦${see(node.firstChild)}⟧`;
  if (node.matches(".katex")) return `⟦${node.querySelector("annotation").textContent.trim()}⟧`;
  if (node.matches("br")) return "\\n";
  if (node.matches("input")) return node.checked ? "☑" : "☐";
  if (node.matches("button")) return "";
  const inner = [...node.childNodes].map(see).join("");
  const name = node.matches("pre > code") ? undefined : names[node.tagName];
  if (!name) return inner;
  const link = name === "a" ? `${node.getAttribute("href")} ` : "";
  return `‹${name} ${link}${name === "pre" ? inner.trimEnd() : inner}›`;
};
dispatchEvent(new Event("beforeprint"));  // formulas off the screen are drawn too
return [...document.querySelectorAll("#chat [data-testid=bot] .md")].map(see);"""
"""The answers on the page in the notation of `SEEN`."""
COPY = """
const done = arguments[0], copies = [];
navigator.clipboard.writeText("").then(async () => {
  for (const button of document.querySelectorAll("#chat [aria-label='Copy message']")) {
    button.click();
    await new Promise((resolve) => setTimeout(resolve));
    copies.push(await navigator.clipboard.readText());
  }
  done(copies);
});"""


def test_an_answer_looks_as_its_author_meant_and_is_copied_and_saved_as_it_was_written(server, page, person):
    talk = [message for text in SEEN for message in (text_message("user", text), text_message("assistant", text))]
    tab = person(page)
    tab.run("localStorage[`qwen-vllm/chat/${sessionStorage['qwen-vllm/open']}`] = JSON.stringify(arguments[0])", talk)
    tab.driver.refresh()
    for shown in range(10, len(SEEN), 10):
        tab.until(lambda shown=shown: len(tab.messages()) == 2 * shown and tab.is_ready())
        tab.press("#more")
    tab.until(lambda: [written(text) for text in tab.run(SEE)] == list(SEEN.values()))
    grant = {"permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"], "origin": page}
    tab.driver.execute_cdp_cmd("Browser.grantPermissions", grant)
    assert tab.driver.execute_async_script(COPY) == [text for text in SEEN for _ in ("question", "answer")]
    assert json.loads(exported(tab, "#to-json"))["history"] == [[text, text] for text in SEEN]
    assert all(f"## Assistant\n\n{text}\n" in exported(tab, "#to-markdown") for text in list(SEEN)[:2])
    tab.run("[...document.querySelectorAll('#chat [aria-label=Edit]')].at(0).click()")
    tab.until(lambda: tab.run("return document.querySelector('#chat textarea')?.value") == next(iter(SEEN)))


def test_what_is_copied_is_what_was_written(server, page, person):
    server.play(line({"reasoning": "Hm."}), line({"delta": "A vector<int>, *see* `<b>`."}), line(LAST))
    tab = person(page)
    tab.ask("Hi")
    grant = {"permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"], "origin": page}
    tab.driver.execute_cdp_cmd("Browser.grantPermissions", grant)
    tab.run("navigator.clipboard.writeText('')")
    tab.press("#chat [aria-label='Copy message']")
    read = "navigator.clipboard.readText().then(arguments[0])"
    assert tab.until(lambda: tab.driver.execute_async_script(read)) == "A vector<int>, *see* `<b>`."


def test_formulas_are_drawn_where_they_are_to_be_seen_and_are_text_elsewhere(server, page, person):
    answer = "\n\n".join(f"Step {n}: $x_{{{n}}}^2$ and `${n}$`." for n in range(200))
    server.play(line({"delta": answer}), line(LAST))
    tab = person(page)
    tab.send("Go on")
    tab.until(lambda: tab.figures() and tab.is_ready())
    formula = "(e) => [e.textContent, e.querySelector('.katex annotation')?.textContent]"
    formulas = f"return [...document.querySelectorAll('#chat .formula')].map({formula})"
    tab.until(lambda: [tex for _, tex in tab.run(formulas)][-2:] == ["x_{198}^2", "x_{199}^2"])
    assert written(tab.run(formulas)[0][0]) == "$x_{0}^2$"
    tab.run("document.querySelector('#talk').scrollTop = -1e6")
    tab.until(lambda: tab.run(formulas)[0][1] == "x_{0}^2" and tab.run(formulas)[199][1] is None)
    assert written(tab.run(formulas)[199][0]) == "$x_{199}^2$"


GROWING = """\
1. One **bold** and `code`.
2. Two $x_1$ and ~~gone~~,
   - [a link](https://a.cn) and *more*

| n | value |
|---|---|
| 1 | **a** |
| 2 | $y_2$ |

> He said: $z_3$ and 3~5.

```python
def one(): return 1
```

In one paragraph $a_1$ and $b_2$ and **then** $c_3$, the end."""


def test_an_answer_that_grew_by_small_pieces_is_the_same_as_one_that_comes_whole(server, page, person):
    tab, whole = person(page), threading.Event()

    def pieces() -> Iterator[bytes | threading.Event]:
        for start in range(0, len(GROWING), 3):
            time.sleep(0.02)  # as a model writes: what comes at once is drawn at once
            yield line({"delta": GROWING[start : start + 3]})
        yield from (whole, line(LAST))

    server.scripts["/chat"] = [(200, pieces())]
    tab.send("Go on")
    tab.until(lambda: tab.messages()[-1].endswith("the end."))
    look = "return document.querySelector('{} .bot .md').innerHTML"
    tab.until(lambda: tab.run(look.format("#running")).count('class="katex"') == 6)
    grown = tab.run(look.format("#running"))
    whole.set()
    tab.until(lambda: tab.figures() and tab.is_ready())
    assert tab.until(lambda: tab.run(look.format("#chat"))) == grown


def test_what_stands_there_stays_while_an_answer_grows(server, page, person):
    tab, more, end = person(page), threading.Event(), threading.Event()
    talk = "| a | b |\n|---|---|\n| 1 | $x^2$ |\n", "| 2 | $y^2$ |\n\nThe sum is $z^2$"
    server.play(line({"delta": talk[0]}), more, line({"delta": talk[1]}), end, line(LAST))
    tab.send("Go on")
    formula = "document.querySelector('#running td .katex')"
    tab.until(lambda: tab.run(f"return {formula} !== null"))
    tab.run(f"window.before = {formula}; getSelection().selectAllChildren(document.querySelector('#running td'))")
    more.set()
    tab.until(lambda: tab.run("return document.querySelectorAll('#running .katex').length") == 3)
    assert tab.run(f"return {formula} === before")
    assert tab.run("return String(getSelection())") == "1"
    end.set()


DRAWN = """
return [...document.querySelectorAll("#chat .formula")].map((e) => e.querySelector(".katex annotation")?.textContent)"""


def test_formulas_of_a_turn_that_was_left_are_drawn_as_it_is_opened_again(server, page, person):
    server.play(line({"delta": "It is $x^2$ and\n\n- $y_1$\n"}), ...)
    tab = person(page)
    tab.send("What is $q$?")
    tab.until(lambda: tab.run("return document.querySelectorAll('#running .katex').length") == 3)
    tab.press("#new")
    gone = "return [...mended.running.keys()].every((turn) => !turn.querySelector('.katex'))"
    tab.until(lambda: tab.run(gone))  # the browser has told that they are off the page
    tab.press("#earlier input")
    tab.until(lambda: tab.run(DRAWN) == ["q", "x^2", "y_1"])


def test_formulas_far_above_stay_text_as_a_long_turn_ends(server, page, person):
    def steps(*numbers: int) -> bytes:
        return line({"delta": "".join(f"Step {n}: we have $x_{{{n}}}$, and so on. " for n in range(*numbers))})

    go_on, end = threading.Event(), threading.Event()
    server.play(steps(20), go_on, steps(20, 400), end, line(LAST))
    tab = person(page)
    tab.send("Show me")
    drawn = "return [...document.querySelectorAll('#talk .formula')].map((e) => Boolean(e.firstElementChild))"
    tab.until(lambda: tab.run(drawn) == [True] * 20)
    go_on.set()
    tab.until(lambda: tab.run(drawn)[:20] == [False] * 20 and tab.run(drawn)[-1])
    end.set()
    tab.until(lambda: tab.run("return document.querySelectorAll('#chat .formula').length") == 400 and tab.is_ready())
    tab.until(lambda: tab.run(drawn)[-1])
    assert tab.run(drawn)[:20] == [False] * 20


def test_formulas_are_drawn_beside_code_whose_colours_come_late(server, page, person):
    server.play(line({"delta": "One: $x^2$"}), line(LAST))
    tab = person(page)
    tab.ask("Show me")
    server.play(line({"delta": "Two: $y^2$\n\n```java\nreturn;\n```\n"}), line(LAST))
    with tab.on_a_slow_line():
        tab.ask("Show me more")
        tab.until(lambda: tab.texts("#chat code .keyword") == ["return"])
        tab.until(lambda: tab.run(DRAWN) == ["x^2", "y^2"])


def test_a_long_block_of_code_is_shown_whole_with_colours_at_its_beginning(server, page, person):
    code = "".join(f"def f{n}(x): return x < {n} and '<b>&amp;'\n" for n in range(500))
    server.play(line({"delta": f"```python\n{code}```"}), line(LAST))
    tab = person(page)
    tab.ask("Show me")
    tab.until(lambda: tab.run("return document.querySelector('#chat code')?.textContent") == code)
    assert 100 < len(tab.texts("#chat code .keyword")) < 1000


def test_a_busy_server_is_asked_again_and_stop_works_meanwhile(server, page, person):
    busy = line({"error": {"type": "overloaded", "message": "the server is busy", "param": None}})
    server.headers["Retry-After"] = "1"
    server.play(busy, status=503)
    server.then_play(line({"delta": "At last."}), line(LAST))
    tab = person(page)
    tab.send("Hello")
    tab.until(lambda: "The server is busy. Asking again in" in tab.messages()[-1])
    tab.until(lambda: tab.messages()[-1] == "At last.")
    server.headers["Retry-After"] = "60"
    server.play(busy, status=503)
    tab.send("Hello?")
    tab.until(lambda: "Asking again in" in tab.messages()[-1])
    tab.press("#box .stop-button")
    tab.until(lambda: "Stopped before the answer began" in tab.messages()[-1], 2)
    server.play(line({"delta": "Yes."}), line(LAST))
    tab.retry()
    tab.until(lambda: tab.messages()[-1] == "Yes.")
    assert questions(server)[-1]["history"] == [["Hello", "At last."]]


FAILURES = {
    "wrong key": (401, [line({"error": {"type": "unauthorized", "message": "x"}})], "does not accept this page's key"),
    "too long": (400, [line({"error": {"type": "invalid_request", "message": "only 10 fit"}})], "only 10 fit"),
    "engine": (500, [line({"error": {"type": "engine_error", "message": "it died"}})], "could not finish"),
    "broken off": (200, [line({"delta": "Half"}), None], "broke off"),
    "no server": (0, [None], "broke off"),
}


def test_what_went_wrong_stands_where_the_answer_would_and_the_chat_goes_on(server, page, person):
    server.play(line({"delta": "Hello."}), line(LAST))
    tab = person(page)
    tab.ask("Hi")
    for status, script, told in FAILURES.values():
        server.play(*script, status=status)
        assert told in tab.ask("Can you hear me?")
    server.play(line({"delta": "Back."}), line(LAST))
    assert tab.ask("And now?") == "Back."
    assert questions(server)[-1]["history"] == [["Hi", "Hello."]]
    assert tab.messages()[:2] == ["Hi", "Hello."]


WATCH = """
window.work = {read: 0, changed: 0, styled: 0};
const parse = DOMParser.prototype.parseFromString;  // with which Gradio cleans each text that it draws
DOMParser.prototype.parseFromString = function (text, ...kind) {
  work.read += text.length;
  return parse.call(this, text, ...kind);
};
new MutationObserver((changes) => changes.forEach(({addedNodes}) => { work.changed += addedNodes.length; }))
  .observe(document.querySelector("#talk"), {subtree: true, childList: true});
// Each time it is set, the browser styles all of the message anew.
new MutationObserver((changes) => { work.styled += changes.length; })
  .observe(document.querySelector("#talk"), {subtree: true, attributeFilter: ["dir"]});"""


def cost_of_a_piece(server: Server, tab: Tab, turns: int) -> tuple[int, dict[str, int]]:
    """What the second piece of an answer costs in a chat of so many turns: the bytes that come, and the work."""
    pair = text_message("user", "And?"), text_message("assistant", "a " * 500)
    pieces = [threading.Event(), threading.Event()]
    server.play(line({"delta": "one"}), pieces[0], line({"delta": " two"}), pieces[1], line(LAST))
    chat = "localStorage[`qwen-vllm/chat/${sessionStorage['qwen-vllm/open']}`] = JSON.stringify(arguments[0])"
    tab.run(chat, [*pair * turns])
    tab.driver.refresh()
    tab.until(lambda: len(tab.messages()) == 2 * min(turns, 10) and tab.is_ready())
    tab.run(WATCH)
    tab.send("Go on")
    tab.until(lambda: tab.messages()[-1] == "one")
    tab.driver.get_log("performance")
    tab.run("work.read = work.changed = work.styled = 0")
    pieces[0].set()
    tab.until(lambda: tab.messages()[-1] == "one two")
    events = [json.loads(entry["message"])["message"] for entry in tab.driver.get_log("performance")]
    received = sum(event["params"]["dataLength"] for event in events if event["method"] == "Network.dataReceived")
    work = tab.run("return work")
    pieces[1].set()
    tab.until(lambda: tab.figures() and tab.is_ready())
    return received, work


def test_a_hidden_page_which_has_no_frames_gets_its_answer_without_delay(server, page, person):
    tab, pieces = person(page), [threading.Event() for _ in range(3)]
    place = tab.driver.get_window_rect()
    server.play(*[step for n, piece in enumerate(pieces) for step in (line({"delta": f"{n} "}), piece)], line(LAST))
    tab.box().send_keys("go on", Keys.ENTER)
    for n, piece in enumerate(pieces):
        tab.until(lambda n=n: tab.messages()[-1:] == [" ".join("012"[: n + 1])], LONGEST_DRAWING / 2)
        tab.driver.minimize_window()
        piece.set()
    tab.until(lambda: tab.figures() and tab.is_ready(), LONGEST_DRAWING / 2)
    assert tab.run("return document.hidden")
    tab.driver.set_window_rect(**place)
    tab.until(lambda: not tab.run("return document.hidden"))


@pytest.mark.long
def test_a_piece_of_an_answer_costs_the_same_whatever_came_before(server, page, person):
    received, work = cost_of_a_piece(server, person(page), 1)
    assert work["read"] < 100
    assert not work["styled"]
    after_many = cost_of_a_piece(server, person(page), 50)
    assert after_many[1] == work
    assert abs(after_many[0] - received) < 500


def test_settings_are_sent_and_kept(server, page, person):
    server.play(line({"delta": "Arr."}), line(LAST))
    tab = person(page)
    assert tab.run("return document.querySelector('#temperature textarea, #temperature input').placeholder") == "0.6"
    tab.fill("#system textarea", "You are a pirate.")
    tab.fill("#temperature textarea, #temperature input", "0.1")
    tab.fill("#stop textarea", "END\nSTOP")
    tab.until(lambda: "pirate" in tab.run("return localStorage['qwen-vllm/settings'] ?? ''"))
    tab.driver.refresh()
    tab.ask("Hi")
    sent = {"query": "Hi", "history": [], "stream": True, "keep_alive": True}
    sent |= {"system": "You are a pirate.", "temperature": 0.1, "stop": ["END", "STOP"]}
    assert questions(server) == [sent]
    tab.fill("#temperature textarea, #temperature input", "hot")
    assert "temperature: Input should be a valid number" in tab.ask("Hi again")


def test_settings_that_a_full_browser_cannot_keep_hold_for_this_page(server, page, person):
    server.play(line({"delta": "Hello."}), line(LAST))
    tab = person(page)
    fill = "for (let size = 1 << 22, n = 0; size >= 1; size >>= 1) "
    tab.run(fill + "try { while (true) localStorage[`full${n++}`] = 'x'.repeat(size); } catch { }")
    tab.fill("#temperature textarea, #temperature input", "0.123456")
    tab.until(lambda: "storage is full" in tab.notice())
    assert tab.ask("Hi") == "Hello."
    assert questions(server)[-1]["temperature"] == 0.123456


def test_shift_enter_breaks_the_line(server, page, person):
    server.play(line({"delta": "Yes."}), line(LAST))
    tab = person(page)
    tab.box().send_keys("one", Keys.SHIFT, Keys.ENTER, Keys.SHIFT, "two", Keys.ENTER)
    tab.until(lambda: tab.messages()[-1:] == ["Yes."])
    assert questions(server)[0]["query"] == "one\ntwo"


def test_a_chinese_browser_gets_a_chinese_page(server, page, person):
    server.play(line({"error": {"type": "unauthorized", "message": "x"}}), status=401)
    tab = person(page, "zh-CN")
    assert tab.box().get_attribute("placeholder") == "请输入问题（Shift-回车换行）"
    assert "没有回答" in tab.ask("你好")
    with serving("--server-url", server.url, "--lang", "zh", "--title", "问答") as url:
        tab = person(url)
        assert tab.driver.title == "问答"
        assert tab.run("return document.querySelector('#new').textContent").strip() == "新对话"


def test_a_page_with_a_password_lets_only_those_in_who_know_it(server, person):
    with serving("--server-url", server.url, "--auth", "ada:secret", "--auth", "bob:other") as url:
        for path in ("/config", "/gradio_api/queue/join", "/gradio_api/info"):
            assert requests.post(url + path, json={}, timeout=10).status_code in (401, 405)
        for user, password, status in (("ada", "other", 400), ("ada", "secret", 200), ("bob", "other", 200)):
            form = {"username": user, "password": password}
            assert requests.post(f"{url}/login", data=form, timeout=10).status_code == status


@pytest.mark.long
def test_a_hundred_people_are_answered_at_once(server):
    server.play(line({"delta": "Hi"}), ...)
    with serving("--server-url", server.url, "--concurrency", "100") as url:
        ask(url, *map(str, range(100)))
        deadline = time.monotonic() + 30
        while len(questions(server)) < 100:
            assert time.monotonic() < deadline, f"only {len(questions(server))} are answered"
            time.sleep(0.05)


def test_a_model_is_chosen_where_there_are_several(server, page, person):
    tab = person(page)
    assert tab.run("return document.querySelector('#model input')") is None
    server.play(line(INFO | {"models": ["base", "poet"]}), path="/chat/info")
    server.play(line({"delta": "A rose."}), line(LAST))
    tab.driver.refresh()
    tab.until(lambda: tab.run("return document.querySelector('#model input')"))
    tab.press("#settings .toggle-button")
    tab.choose("#model", 2, of=2)
    tab.press("#settings .toggle-button")
    assert tab.ask("A poem?") == "A rose."
    assert questions(server)[0]["model"] == "poet"


def test_how_deep_the_model_thinks_is_one_menu_of_what_it_knows(server, page, person):
    choice = INFO | {"defaults": {"enable_thinking": True}}
    server.play(line(choice | {"reasoning_efforts": ["low", "medium", "xhigh"]}), path="/chat/info")
    server.play(line({"delta": "Yes."}), line(LAST))
    tab = person(page)
    tab.press("#settings .toggle-button")
    tab.choose("#reasoning_effort", 3, of=5)
    tab.fill("#thinking_budget textarea, #thinking_budget input", "64")
    tab.press("#settings .toggle-button")
    tab.until(lambda: '"64"' in tab.run("return localStorage['qwen-vllm/settings'] ?? ''"))
    tab.driver.refresh()
    assert tab.ask("Deep?") == "Yes."
    depth = "return document.querySelector('#reasoning_effort input')?.value"
    assert tab.run(depth) == "low"
    server.play(line(choice), path="/chat/info")
    tab.driver.refresh()
    tab.press("#settings .toggle-button")
    tab.choose("#reasoning_effort", 2, of=3)
    tab.press("#settings .toggle-button")
    tab.ask("And off?")
    server.play(line(INFO), path="/chat/info")
    tab.driver.refresh()
    tab.ask("And now?")
    assert tab.run(depth) is None
    names = "reasoning_effort", "enable_thinking", "thinking_budget"
    asked = [tuple(body.get(name) for name in names) for body in questions(server)]
    assert asked == [("low", None, 64), (None, False, 64), (None, None, 64)]


def test_reasoning_goes_along_where_the_server_keeps_it_also_after_a_reload(server, page, person):
    server.play(line({"reasoning": "A <b>."}), line({"delta": "one"}), line(LAST | {"keeps_reasoning": True}))
    server.then_play(line({"reasoning": "Hm."}), line({"delta": "two"}), line(LAST))
    server.then_play(line({"delta": "three"}), line(LAST))
    tab = person(page)
    tab.ask("first")
    tab.driver.refresh()
    tab.until(lambda: "one" in tab.messages())
    tab.ask("second")
    tab.ask("third")
    tab.retry()
    tab.until(lambda: len(questions(server)) == 4 and tab.is_ready())
    first, second = ["first", "one", "A <b>."], ["second", "two"]
    assert [body["history"] for body in questions(server)] == [[], [first], [first, second], [first, second]]
    assert json.loads(exported(tab, "#to-json"))["history"] == [first, second, ["third", "three"]]


def test_an_answer_that_is_cut_in_its_reasoning_says_what_to_set(server, page, person):
    server.play(line({"reasoning": "Let me see"}), line(LAST | {"finish_reason": "length", "dropped_reasoning": 2}))
    tab = person(page)
    tab.send("Hard?")
    tab.until(lambda: "still thinking when it reached the token limit" in tab.messages()[-1])
    tab.until(lambda: "turns without their thoughts: 2 · cut at the token limit" in tab.figures())
    server.play(line({"delta": "Yes."}), line(LAST))
    assert tab.ask("Easy?") == "Yes."
    assert questions(server)[-1]["history"] == []


def pictured(server: Server) -> list[tuple[list[str], str]]:
    """(images as base64, text) of the last question of each request with images."""
    asked = [body["messages"][-1]["content"] for path, _, body in server.requests if path == "/v1/chat/completions"]
    images = [[part["image_url"]["url"] for part in parts if part["type"] == "image_url"] for parts in asked]
    texts = ["".join(part["text"] for part in parts if part["type"] == "text") for parts in asked]
    return list(zip(images, texts, strict=True))


def test_images_are_taken_where_the_model_takes_them_and_stay_with_their_question(server, page, person, tmp_path):
    tab = person(page)
    server.play(line(INFO | {"images": True}), path="/chat/info")
    chunk = {"choices": [{"delta": {"content": "A dot."}, "finish_reason": "stop"}]}
    usage = {"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 3}}
    server.play(b"data: " + line(chunk) + b"\ndata: " + line(usage) + b"\n", path="/v1/chat/completions")
    image = tmp_path / "dot.png"
    Image.new("RGB", (8, 8), "red").save(image)
    dots = ["data:image/png;base64," + base64.b64encode(image.read_bytes()).decode()]
    tab.driver.refresh()
    tab.until(lambda: tab.run("return document.querySelector('#heading [data-images]')"))
    tab.driver.find_element(By.CSS_SELECTOR, "#box input[type=file]").send_keys(str(image))
    tab.until(lambda: tab.run("return document.querySelectorAll('#box .thumbnails img').length"))
    assert tab.ask("What is this?") == "A dot."
    tab.edit("What colour?")
    tab.until(lambda: len(pictured(server)) == 2 and "What colour?" in tab.messages() and tab.versions() == ["2 / 2"])
    tab.press(".versions [aria-label='Earlier version']")
    tab.until(lambda: "What is this?" in tab.messages() and tab.run("return document.querySelector('#chat img')"))
    tab.press(".versions [aria-label='Later version']")
    tab.until(lambda: "What colour?" in tab.messages())
    tab.press("#chat [aria-label=Undo]")
    tab.until(lambda: tab.run("return document.querySelectorAll('#box .thumbnails img').length"))
    tab.box().send_keys(" And size?", Keys.ENTER)
    tab.until(lambda: len(pictured(server)) == 3)
    assert pictured(server) == [(dots, "What is this?"), (dots, "What colour?"), (dots, "What colour? And size?")]
    tab.until(tab.is_ready)
    tab.press("#all-chats > button")
    saved = exported(tab, "#export-all")
    clear = "store.all().then((all) => store.remove(all.map(({id}) => id))).then(arguments[0])"
    tab.driver.execute_async_script(clear)
    tab.press("#new")
    tab.until(lambda: tab.messages() == [] and tab.earlier() == [])
    tab.run(PICK, saved)
    tab.press("#import-all")
    tab.until(lambda: len(tab.earlier()) == 1)
    open_chat(tab, 1)
    tab.retry()
    tab.until(lambda: len(pictured(server)) == 4)
    assert pictured(server)[3] == (dots, "What colour? And size?")


CARDS = "#cards label"
DOT = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNkYPhfDwAChwGA60e6kgAAAABJRU5ErkJggg=="
GIVE = """
const [how, name, type, content] = arguments, files = new DataTransfer(), box = document.querySelector("#box textarea");
files.items.add(new File([Uint8Array.from(atob(content), (byte) => byte.charCodeAt(0))], name, {type}));
const event = how === "drop" ? new DragEvent("drop", {dataTransfer: files, bubbles: true, cancelable: true})
  : new ClipboardEvent("paste", {clipboardData: files, bubbles: true, cancelable: true});
box.dispatchEvent(event);"""


def give(tab: Tab, how: str, name: str, content: bytes, kind: str = "text/plain") -> None:
    """Drops or pastes a file."""
    tab.run(GIVE, how, name, kind, base64.b64encode(content).decode())


def test_documents_are_chosen_dropped_and_pasted_and_stay_with_their_question(server, page, person, tmp_path):
    server.play(line({"count": 1240}), path="/tokenize")
    server.play(line({"delta": "Both."}), line(LAST))
    tab = person(page)
    (tmp_path / "报告.md").write_text("# 营收 <|im_end|>\n<b>12 亿</b>")
    tab.driver.find_element(By.CSS_SELECTOR, "#box input[type=file]").send_keys(str(tmp_path / "报告.md"))
    tab.until(lambda: tab.texts(CARDS) == ["📄 报告.md · 1,240 tokens"])
    give(tab, "drop", "b.csv", "姓名,城市\n张三,北京".encode("gb18030"))
    tab.until(lambda: len(tab.texts(CARDS)) == 2)
    give(tab, "paste", "c.pdf", pdf("Third"), "application/pdf")
    cards = ["📄 报告.md · 1,240 tokens", "📄 b.csv · 1,240 tokens", "📄 c.pdf · 1,240 tokens"]
    tab.until(lambda: tab.texts(CARDS) == cards)
    tab.press("#cards label:nth-of-type(3) input")
    tab.until(lambda: tab.texts(CARDS) == cards[:2])
    assert tab.ask("What?") == "Both."
    texts = {"报告.md": "# 营收 <|im_end|>\n<b>12 亿</b>", "b.csv": "姓名,城市\n张三,北京"}
    frames = [f"<details><summary>{name}</summary>\n\n```\n{text}\n```\n\n</details>" for name, text in texts.items()]
    asked = "\n\n".join([*frames, "What?"])
    assert questions(server)[0]["query"] == asked
    assert tab.messages() == ["报告.md", "b.csv", "What?", "Both."]
    tab.until(lambda: tab.texts(CARDS) == [])
    assert tab.earlier() == ["📄 报告.md 📄 b.csv What?"]
    tab.driver.refresh()
    tab.until(lambda: tab.messages() == ["报告.md", "b.csv", "What?", "Both."])
    assert json.loads(exported(tab, "#to-json"))["history"] == [[asked, "Both."]]
    tab.retry()
    tab.until(lambda: len(questions(server)) == 2 and tab.is_ready() and tab.messages()[-1] == "Both.")
    tab.run("[...document.querySelectorAll('#chat [aria-label=Edit]')].at(-1).click()")
    tab.until(lambda: tab.texts("#chat textarea"))
    tab.fill("#chat textarea", "And?")
    tab.press("#chat [aria-label=Submit]")
    tab.until(lambda: tab.messages() == ["报告.md", "b.csv", "And?", "Both."] and tab.is_ready())
    tab.press("#chat [aria-label=Undo]")
    tab.until(lambda: tab.texts(CARDS) == cards[:2])
    tab.box().send_keys(" Now?", Keys.ENTER)
    tab.until(lambda: len(questions(server)) == 4)
    queries = [body["query"] for body in questions(server)]
    assert queries == [asked, asked, asked.replace("What?", "And?"), asked.replace("What?", "And? Now?")]


def drop_too_much(server: Server, tab: Tab) -> Tab:
    """Drops a document that does not fit, of which the first 6,000 tokens do."""
    server.play(line({"count": 12400}), path="/tokenize")
    server.then_play(line({"count": 6000}), path="/tokenize")
    server.play(line({"delta": "Long."}), line(LAST))
    give(tab, "drop", "long.txt", b"word " * 12400)
    tab.until(lambda: "12,400 tokens, and the context has 8,192" in "".join(tab.texts("#cut")))
    return tab


def agree_and_send(tab: Tab) -> None:
    """Lets the first part go along."""
    tab.press("#cut input")
    tab.until(lambda: tab.run("return document.querySelector('#cut input').checked"))
    tab.box().send_keys(Keys.ENTER)


def test_a_document_that_does_not_fit_goes_along_in_part_only_where_the_person_agrees(server, page, person):
    tab = drop_too_much(server, person(page))
    tab.box().send_keys("What?", Keys.ENTER)
    tab.until(lambda: "Nothing was sent" in "".join(tab.texts("#told")))
    assert (questions(server), tab.messages(), tab.box().get_attribute("value")) == ([], [], "What?")
    agree_and_send(tab)
    tab.until(lambda: tab.messages()[-1:] == ["Long."])
    [asked] = questions(server)
    assert "long.txt (the first 6,000 of 12,400 tokens)" in asked["query"]
    assert 5900 < asked["query"].count("word") < 6100


def test_a_question_right_after_one_that_was_refused_is_answered(server, page, person):
    tab = drop_too_much(server, person(page))
    with tab.on_a_slow_line():
        tab.box().send_keys("What?", Keys.ENTER)
        tab.until(lambda: "Nothing was sent" in "".join(tab.texts("#told")))
        agree_and_send(tab)
        tab.until(lambda: tab.messages() == ["long.txt (the first 6,000 of 12,400 tokens)", "What?", "Long."])
        tab.until(tab.is_ready)
    assert len(questions(server)) == 1


@pytest.mark.long
def test_a_file_without_text_is_told_in_the_persons_language_and_the_question_goes_on(server, page, person):
    server.play(line({"count": 3}), path="/tokenize")
    server.play(line({"delta": "Yes."}), line(LAST))
    locked = pdf("x", encrypted=True)
    for language, told in (("en", "locked.pdf: This file has a password."), ("zh-CN", "locked.pdf: 文件有密码。")):
        tab = person(page, language)
        give(tab, "drop", "locked.pdf", locked, "application/pdf")
        tab.until(lambda told=told, tab=tab: told in "".join(tab.texts("#told")))
        give(tab, "drop", "dot.png", base64.b64decode(DOT), "image/png")
        tab.until(lambda tab=tab: "dot.png" in "".join(tab.texts("#told")))
        assert tab.texts(CARDS) == []
        assert tab.ask("Go on?") == "Yes."
    assert [body["query"] for body in questions(server)] == ["Go on?", "Go on?"]


@pytest.mark.long
def test_a_page_that_chromium_prints_is_read(server, page, person, tmp_path):
    server.play(line({"count": 9}), path="/tokenize")
    server.play(line({"delta": "Two."}), line(LAST))
    tab = person(page)
    text = "<p>第一季度营收</p><div style='columns: 2'><p>left one<p>left two<p>right one<p>right two</div>"
    tab.driver.get(f"data:text/html;charset=utf-8,{text}")
    printed = tab.driver.execute_cdp_cmd("Page.printToPDF", {})["data"]
    tab.open(page)
    give(tab, "drop", "printed.pdf", base64.b64decode(printed), "application/pdf")
    tab.until(lambda: tab.texts(CARDS))
    tab.ask("What?")
    asked = questions(server)[0]["query"].replace("\n", "")
    assert "第一季度营收left oneleft tworight oneright two" in asked


def test_the_browser_knows_each_rule_of_the_style_sheet(server, page, person):
    style = files("qwen_vllm.webui").joinpath("page.css").read_text("utf-8")
    rules = re.findall(r"([^{}]+) {([^{}]+)}", style)
    assert len(rules) == style.count("{") == style.count("}")
    conditions = [f"selector({selector.strip()})" for selectors, _ in rules for selector in selectors.split(",")]
    conditions += [
        f"({declaration.strip()})" for _, body in rules for declaration in body.split(";") if declaration.strip()
    ]
    unknown = "return arguments[0].filter((condition) => !CSS.supports(condition))"
    assert person(page).run(unknown, conditions) == []


def test_a_phone_shows_all_of_the_page(server, page, person):
    server.play(line({"delta": "```\n" + "long " * 100 + "\n```\n" + "w" * 300}), line(LAST))
    tab = person(page)
    phone = {"width": 390, "height": 780, "deviceScaleFactor": 1, "mobile": True}
    tab.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
    tab.ask("Hi")
    assert tab.run("return document.documentElement.scrollWidth") == 390
    tab.press("#chats .toggle-button")
    tab.until(lambda: tab.run("return Boolean(document.querySelector('#chats.open'))"))
    tab.press("#new")
    tab.until(lambda: not tab.run("return Boolean(document.querySelector('#chats.open'))"))
    tab.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_the_keys_stop_the_answer_and_are_listed(server, page, person):
    server.play(line({"delta": "It grows"}), ...)
    tab = person(page)
    tab.box().send_keys(Keys.CONTROL, "/")
    assert tab.texts("#keys[open] dt") == ["Enter", "Shift-Enter", "Esc", "Ctrl-/"]
    ActionChains(tab.driver).send_keys(Keys.ESCAPE).perform()
    tab.until(lambda: not tab.texts("#keys[open]"))
    tab.send("Go on")
    tab.until(lambda: tab.messages()[-1] == "It grows")
    ActionChains(tab.driver).send_keys(Keys.ESCAPE).perform()
    tab.until(lambda: server.left == [True], 2)
    tab.until(lambda: tab.figures() == "stopped")


def test_enter_that_ends_a_composition_does_not_send(server, page, person):
    server.play(line({"delta": "Yes."}), line(LAST))
    tab = person(page)
    composed = "const key = {key: 'Enter', isComposing: true, bubbles: true, cancelable: true};"
    tab.run(composed + "document.querySelector('#box textarea').dispatchEvent(new KeyboardEvent('keydown', key))")
    assert tab.ask("Done?") == "Yes."
    assert len(questions(server)) == 1


AXE = "axe-core@4.14.1"


@pytest.fixture(scope="session")
def axe() -> str:
    """The script that looks for what hinders people who use the keyboard or a screen reader."""
    script = ROOT / ".tools/node_modules/axe-core/axe.min.js"
    if not script.exists():
        subprocess.run(["npm", "install", "--no-audit", "--no-fund", "--prefix", ROOT / ".tools", AXE], check=True)
    return script.read_text("utf-8")


@pytest.mark.long
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_a_phone_and_a_screen_reader_find_every_control(server, page, person, axe, width, scheme):
    server.play(line({"reasoning": "Hm."}), line({"delta": RICH}), line(LAST))
    tab = person(page)
    screen = {"width": width, "height": 780, "deviceScaleFactor": 1, "mobile": width == 390}
    tab.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    look = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    tab.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", look)
    chats = [kept_chat("Roses", "Red", pinned=True), kept_chat("A title as long as a title of a chat can be", "Yes")]
    tab.driver.execute_async_script("store.merge(arguments[0]).then(arguments[1])", chats)
    tab.driver.refresh()
    tab.send("Show me")
    tab.until(lambda: tab.figures() and tab.is_ready())
    tab.run(axe)
    steps = [
        lambda: None,
        lambda: tab.press("#chats .toggle-button"),
        lambda: (tab.press("#all-chats > button"), tab.press("#several .wrap input")),
        lambda: (tab.press("#chats .toggle-button"), tab.press("#settings .toggle-button")),
        lambda: (tab.press("#settings .toggle-button"), tab.box().send_keys(Keys.CONTROL, "/")),
    ]
    for step in steps:
        step()
        tab.until(lambda: not tab.run("return document.getAnimations().length"))
        found = tab.driver.execute_async_script("axe.run().then(({violations}) => arguments[0](violations))")
        serious = [
            (rule["help"], [node["html"] for node in rule["nodes"]])
            for rule in found
            if rule["impact"] in ("serious", "critical")
        ]
        assert serious == []
    tab.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    tab.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


@pytest.fixture
def real_page(demo_server: str) -> Iterator[str]:
    with serving("--server-url", demo_server, "--api-key", KEY) as url:
        yield url


def test_the_real_server_answers_is_stopped_and_a_reload_keeps_the_chat(demo_server, real_page, person):
    tab = person(real_page)
    assert tab.driver.title == MODEL
    tab.fill("#temperature textarea, #temperature input", "0")
    assert tab.ask(FRANCE) == "The capital of France is Paris."
    figures = r"first token \d+\.\d\d s · \d+\.\d tokens/s · \d+ tokens in, \d+ out, of 8,192"
    assert re.fullmatch(figures, tab.figures())
    tab.send("Write a long story about a dragon.")
    tab.until(lambda: len(tab.messages()) == 4 and len(tab.messages()[3]) > 20)
    assert unfinished(demo_server, KEY) == 1
    tab.press("#box .stop-button")
    tab.until(lambda: unfinished(demo_server, KEY) == 0, 2)
    tab.until(tab.is_ready)
    assert tab.figures() == "stopped"
    shown = tab.messages()
    assert len(shown[3]) > 20
    tab.driver.refresh()
    tab.until(lambda: tab.messages() == shown)
    tab.retry()
    tab.until(lambda: tab.figures() == "" and len(tab.messages()) == 4 and not tab.is_ready())
    tab.until(lambda: unfinished(demo_server, KEY) == 1)
    tab.driver.switch_to.new_window("tab")
    rest = tab.driver.window_handles
    tab.driver.switch_to.window(rest[0])
    tab.driver.close()
    tab.driver.switch_to.window(rest[1])
    tab.until(lambda: unfinished(demo_server, KEY) == 0, 2)
    tab.open(real_page)
    tab.press("#earlier label input")
    tab.until(lambda: tab.messages()[:2] == [FRANCE, "The capital of France is Paris."])


def test_the_real_server_counts_the_tokens_of_a_text(demo_server):
    texts = FRANCE, f"{FRANCE} {FRANCE}"
    assert [asyncio.run(count_tokens_async(demo_server, text, KEY)) for text in texts] == [7, 14]


@pytest.mark.long
def test_two_people_do_not_wait_for_each_other(demo_server, real_page, person):
    ada, bob = person(real_page), person(real_page)
    ada.send("Write a long story about a dragon.")
    ada.until(lambda: len(ada.messages()) == 2)
    bob.fill("#temperature textarea, #temperature input", "0")
    assert bob.ask(FRANCE) == "The capital of France is Paris."
    assert not ada.is_ready()
    assert ada.messages()[0] == "Write a long story about a dragon."
    ada.press("#box .stop-button")
    ada.until(lambda: unfinished(demo_server, KEY) == 0, 2)


@pytest.mark.long
def test_twenty_conversations_at_once_do_not_mix(demo_server):
    page = Page(demo_server, KEY, None, None, WaitingLine(20, 0))
    examples = [said for n in ("48213", "99120", "30577") for said in (user(f"Repeat: {n}"), assistant(n))]

    async def answer(n: int) -> bool:
        nonce = str(7_919 * (n + 11))
        request = SimpleNamespace(session_hash=nonce, headers={})
        settings = kept_settings("You repeat.", temperature="0")
        parts = page.answer(nonce, examples, [user(f"Repeat: {nonce}")], settings, request)
        *_, (chat, messages, _) = [part async for part in parts]
        assert chat == nonce
        return text_of(messages[-1]) == nonce

    async def all_answers() -> list[bool]:
        return await asyncio.gather(*map(answer, range(20)))

    assert asyncio.run(all_answers()) == [True] * 20


def test_a_server_that_is_gone_is_told_and_the_chat_goes_on_when_it_is_back(person):
    with scripted() as server:
        port = server.server_address[1]
    with serving("--server-url", server.url) as page:
        with scripted(port) as server:
            server.play(line(INFO), path="/chat/info")
            server.play(line({"delta": "Paris."}), line(LAST))
            server.then_play(line({"delta": "Once upon a time"}), None)
            tab = person(page)
            tab.ask(FRANCE)
            assert "broke off" in tab.ask("Write a long story about a dragon.")
        assert "does not answer" in tab.ask("Are you there?")
        with scripted(port) as back:
            back.play(line({"delta": "Yes."}), line(LAST))
            tab.retry()
            tab.until(lambda: tab.messages()[-1] == "Yes.")
            assert questions(back)[0]["history"] == [[FRANCE, "Paris."]]
