"""The chats of a browser: turns and versions, earlier chats, search, export, in a real browser."""

import json
import threading

import pytest
from selenium.webdriver.common.by import By
from selenium.webdriver.support.expected_conditions import alert_is_present
from selenium.webdriver.support.ui import WebDriverWait

from qwen_vllm.webui.conversation import text_message, text_of
from tests.support.browser import IN_BROWSER, PICK, exported, kept_chat, open_chat, questions
from tests.support.scripted_server import LAST, line

pytestmark = IN_BROWSER


def test_retry_edit_and_undo(server, page, person):
    server.play(line({"reasoning": "a"}), line({"delta": "one"}), line(LAST))
    server.then_play(line({"delta": "two"}), line(LAST))
    server.then_play(line({"delta": "three"}), line(LAST))
    server.then_play(line({"delta": "four"}), line(LAST))
    tab = person(page)
    tab.ask("first")
    tab.ask("second")
    tab.retry()
    tab.until(lambda: tab.messages()[-1] == "three" and tab.is_ready())
    tab.edit("first, better")
    tab.until(lambda: tab.messages() == ["first, better", "four"] and tab.is_ready())
    asked = [(body["query"], body["history"]) for body in questions(server)]
    second = ("second", [["first", "one"]])
    assert asked == [("first", []), second, second, ("first, better", [])]
    tab.press("#chat [aria-label=Undo]")
    tab.until(lambda: tab.box().get_attribute("value") == "first, better")
    assert tab.messages() == []


def test_earlier_versions_of_a_question_and_of_an_answer_are_kept_and_switched(server, page, person):
    for answer in ("one", "two", "two again", "uno"):
        server.then_play(line({"delta": answer}), line(LAST))
    tab = person(page)
    tab.ask("first")
    tab.ask("second")
    tab.retry()
    tab.until(lambda: tab.versions() == ["2 / 2"])
    tab.edit("first, better")
    tab.until(lambda: tab.messages() == ["first, better", "uno"] and tab.versions() == ["2 / 2"])
    tab.press(".versions [aria-label='Earlier version']")
    again = ["first", "one", "second", "two again"]
    tab.until(lambda: tab.messages() == again and tab.versions() == ["1 / 2", "2 / 2"])
    tab.press(".versions [aria-label='Earlier version']")
    tab.until(lambda: tab.messages() == ["first", "one", "second", "two"] and tab.versions() == ["1 / 2", "1 / 2"])
    assert json.loads(exported(tab, "#to-json"))["history"] == [["first", "one"], ["second", "two"]]
    assert tab.earlier() == ["first"]
    tab.driver.refresh()
    tab.until(lambda: tab.versions() == ["1 / 2", "1 / 2"])
    server.play(line({"error": {"type": "engine_error", "message": "x"}}), status=500)
    tab.ask("third")
    assert questions(server)[-1]["history"] == [["first", "one"], ["second", "two"]]
    server.play(line({"delta": "three"}), line(LAST))
    tab.retry()
    tab.until(lambda: tab.messages()[-2:] == ["third", "three"] and tab.is_ready())
    assert tab.versions() == ["1 / 2", "1 / 2"]  # what failed is no version


def test_chats_are_kept_opened_exported_and_deleted(server, page, person):
    server.play(line({"delta": "A **red** rose."}), line(LAST))
    tab = person(page)
    tab.ask("About roses")
    server.play(line({"delta": "It grows"}), ...)
    tab.send("Go on")
    tab.until(lambda: tab.messages()[-1] == "It grows")
    tab.press("#new")  # while the answer is on its way
    tab.until(lambda: tab.messages() == [] and tab.is_ready())
    tab.until(lambda: server.left == [True], 2)
    server.play(line({"delta": "Blue."}), line(LAST))
    tab.ask("About the sky")
    tab.until(lambda: tab.earlier() == ["About the sky", "About roses"])
    tab.driver.refresh()
    tab.until(lambda: tab.messages() == ["About the sky", "Blue."])
    tab.press("#earlier label:nth-of-type(2) input")
    roses = ["About roses", "A red rose.", "Go on", "It grows"]
    tab.until(lambda: tab.messages() == roses)
    history = [["About roses", "A **red** rose."], ["Go on", "It grows"]]
    assert json.loads(exported(tab, "#to-json")) == {"system": "You are a helpful assistant.", "history": history}
    assert "## User\n\nAbout roses\n\n## Assistant\n\nA **red** rose.\n" in exported(tab, "#to-markdown")
    tab.press("#delete")
    WebDriverWait(tab.driver, 10).until(alert_is_present()).accept()
    tab.until(lambda: tab.messages() == [] and tab.earlier() == ["About the sky"])


def test_a_chat_that_is_open_in_two_tabs_loses_no_turn(server, page, person):
    server.play(line({"delta": "one"}), line(LAST))
    tab = person(page)
    tab.ask("first")
    tab.driver.switch_to.new_window("tab")
    first, second = tab.driver.window_handles
    tab.open(page)
    tab.press("#earlier label input")
    tab.until(lambda: tab.messages() == ["first", "one"])
    server.play(line({"delta": "of the second"}), line(LAST))
    tab.ask("second tab")
    tab.driver.switch_to.window(first)
    seen = ["first", "one", "second tab", "of the second"]
    tab.until(lambda: tab.messages() == seen)
    ends = [threading.Event(), threading.Event()]
    for end in ends:
        server.play(line({"delta": "At once"}), end, line({"delta": "."}), line(LAST))
        tab.send(f"Tab {ends.index(end)}")
        tab.until(lambda: tab.messages()[-1] == "At once")
        tab.driver.switch_to.window(second)
    for end, window in zip(ends, (first, second), strict=True):
        end.set()
        tab.driver.switch_to.window(window)
        tab.until(tab.is_ready)
    tab.until(lambda: tab.earlier() == ["first", "first"])
    told = {tuple(open_chat(tab, n)) for n in (1, 2)}
    assert told == {(*seen, f"Tab {n}", "At once.") for n in (0, 1)}
    tab.driver.close()
    tab.driver.switch_to.window(first)


@pytest.mark.long
def test_chats_of_the_earlier_storage_are_moved_over_whatever_comes_between(server, page, person):
    tab = person(page)
    for n in range(3):
        talk = [text_message("user", f"Question {n}"), text_message("assistant", f"Answer {n}")]
        tab.run("localStorage[`qwen-vllm/chat/${arguments[0]}`] = JSON.stringify(arguments[1])", n, talk)
        card = {"id": str(n), "title": f"Question {n}", "saved": n}
        tab.run("localStorage[`qwen-vllm/card/${arguments[0]}`] = JSON.stringify(arguments[1])", n, card)
    kept = "return Object.keys(localStorage).filter((key) => /(chat|card)/.test(key)).length"
    cut = (
        "const put = store.put; let count = 0; store.put = (...chat) => { if (count++) throw Error(); put(...chat); };"
    )
    tab.driver.execute_async_script(f"{cut} store.moveOver().catch(() => arguments[0]());")
    assert tab.run(kept) == 4  # one is over, then it was cut
    tab.driver.refresh()
    tab.until(lambda: tab.earlier() == ["Question 2", "Question 1", "Question 0"])
    assert tab.run(kept) == 0
    assert open_chat(tab, 3) == ["Question 0", "Answer 0"]


def test_chats_are_searched_named_pinned_and_deleted_together(server, page, person):
    tab = person(page)
    chats = [kept_chat(f"Chat {n}", "Nothing", saved=n) for n in range(300)]
    chats += [
        kept_chat("问候", "今天天气很好，我们去公园散步。", saved=400),
        kept_chat("Prices", "ＡＢＣ costs 3~5元", saved=401),
    ]
    tab.driver.execute_async_script("store.merge(arguments[0]).then(chats.announce).then(arguments[1])", chats)
    tab.driver.refresh()
    tab.until(lambda: len(tab.earlier()) == 302)
    for words, found in (("天气很", ["问候"]), ("abc", ["Prices"]), (" 3~5元", ["Prices"]), ("chat 29", ["Chat 299"])):
        tab.fill("#search :is(input, textarea)", words)
        tab.until(lambda found=found: tab.earlier()[:1] == found)
    assert len(tab.earlier()) == 11
    tab.press("#earlier label:nth-of-type(11) input")
    tab.until(lambda: tab.messages() == ["Chat 29", "Nothing"])
    tab.press("#rename")
    prompt = WebDriverWait(tab.driver, 10).until(alert_is_present())
    prompt.send_keys("第二十九")
    prompt.accept()
    tab.fill("#search :is(input, textarea)", "")
    tab.until(lambda: len(tab.earlier()) == 302)
    tab.press("#pin")
    tab.until(lambda: tab.earlier()[:2] == ["★ 第二十九", "Prices"])
    tab.fill("#search :is(input, textarea)", "CHAT 1")
    tab.until(lambda: len(tab.earlier()) == 111)
    tab.press("#all-chats > button")
    tab.until(lambda: len(tab.texts("#several .wrap label")) == 111)
    tab.run("[...document.querySelectorAll('#several .wrap label input')].slice(-2).forEach((box) => box.click())")
    tab.press("#delete-several")
    question = WebDriverWait(tab.driver, 10).until(alert_is_present())
    assert question.text == "Delete 2 chats for good?"
    question.accept()
    tab.until(lambda: len(tab.earlier()) == 109)
    tab.driver.refresh()
    tab.until(lambda: len(tab.earlier()) == 300 and tab.messages() == ["Chat 29", "Nothing"])


def test_all_chats_are_saved_to_one_file_and_read_from_it(server, page, person):
    tab = person(page)
    answer = "<b>Red</b> <img src=x onerror='window.pwned=1'>"
    chats = [kept_chat("Roses", answer, pinned=True), kept_chat("问候", "你好")]
    tab.driver.execute_async_script("store.merge(arguments[0]).then(arguments[1])", chats)
    tab.press("#all-chats > button")
    saved = exported(tab, "#export-all")
    tab.driver.execute_async_script("store.remove(['Roses']).then(arguments[0])")
    tab.run(PICK, saved.replace("\u2060", ""))
    tab.press("#import-all")
    tab.until(lambda: tab.notice() == "Chats added: 1. Here already: 1." and tab.earlier() == ["★ Roses", "问候"])
    assert open_chat(tab, 1) == ["Roses", answer]
    damaged = json.loads(saved)
    damaged["chats"][1]["turns"][0]["parent"] = "nobody"
    for bad, told in (
        (saved[:-9], "it is no JSON, or cut off"),
        ('{"history": []}', "it is no file of “Export all”"),
        (json.dumps(damaged), "its chat number 2 is damaged"),
    ):
        tab.run(PICK, bad)
        tab.press("#import-all")
        tab.until(lambda told=told: tab.notice() == f"Nothing was imported from backup.json: {told}.")
    assert tab.earlier() == ["★ Roses", "问候"]
    assert tab.run("return window.pwned") is None


def test_a_browser_that_keeps_nothing_or_is_full_is_told_and_the_chat_goes_on(server, page, person):
    server.play(line({"delta": "Hello."}), line(LAST))
    tab = person(page)
    tab.run("IDBObjectStore.prototype.put = () => { throw new DOMException('', 'QuotaExceededError'); }")
    assert tab.ask("Hi") == "Hello."
    tab.until(lambda: "storage is full" in tab.notice())
    hide = "Object.defineProperty(window, 'indexedDB', {value: undefined})"
    script = tab.driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": hide})
    tab.open(page)
    tab.until(lambda: "keeps no chats for this page" in tab.notice())
    assert [tab.ask("Hi"), tab.ask("And again?")] == ["Hello.", "Hello."]
    assert questions(server)[-1]["history"] == [["Hi", "Hello."]]
    tab.driver.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", script)
    tab.driver.refresh()
    tab.until(lambda: tab.earlier() == ["Hi", "Hi"])  # what could not be written is as soon as it can be


def test_a_long_chat_opens_with_its_newest_turns_and_loses_none(server, page, person):
    server.play(line({"delta": "Sure."}), line(LAST))
    talk = [said for n in range(25) for said in (text_message("user", f"q{n}"), text_message("assistant", f"a{n}"))]
    tab = person(page)
    tab.run("localStorage[`qwen-vllm/chat/${sessionStorage['qwen-vllm/open']}`] = JSON.stringify(arguments[0])", talk)
    tab.driver.refresh()
    tab.until(lambda: tab.messages() == [text_of(said) for said in talk[-20:]] and tab.is_ready())
    tab.run("document.querySelector('#chat [aria-label=Edit]').click()")
    tab.until(lambda: tab.texts("#chat textarea"))
    tab.fill("#chat textarea", "better")
    tab.press("#chat [aria-label=Submit]")
    tab.until(lambda: tab.messages() == ["better", "Sure."] and tab.is_ready())
    history = [[f"q{n}", f"a{n}"] for n in range(15)]
    assert questions(server)[0]["history"] == history
    for shown in (11, 16):
        tab.press("#more")
        tab.until(lambda shown=shown: len(tab.messages()) == 2 * shown)
    assert not tab.driver.find_element(By.ID, "more").is_displayed()
    assert json.loads(exported(tab, "#to-json"))["history"] == [*history, ["better", "Sure."]]
    tab.driver.refresh()
    tab.until(lambda: len(tab.messages()) == 20)
