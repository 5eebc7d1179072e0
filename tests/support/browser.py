"""A real browser in front of the page, and what a person does there."""

import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement

from qwen_vllm.webui.conversation import text_message
from qwen_vllm.webui.markdown import written
from tests.support.scripted_server import Server

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
IN_BROWSER = pytest.mark.skipif(
    not (BROWSER and DRIVER), reason="no browser to test the page in: apt install chromium chromium-driver"
)
INFO = {"models": ["Qwen3-8B"], "context": 8192, "images": False, "defaults": {"temperature": 0.6, "max_tokens": 2048}}
PICK = """
const files = new DataTransfer();
files.items.add(new File([arguments[0]], "backup.json"));
const click = HTMLInputElement.prototype.click;
HTMLInputElement.prototype.click = function () {
  HTMLInputElement.prototype.click = click;
  this.files = files.files;
  this.dispatchEvent(new Event("change"));
};"""
"""The next file that is asked for is this one."""


class Tab:
    """A person's tab with the page open: what the person does, and what there is to see."""

    def __init__(self, driver: webdriver.Chrome) -> None:
        self.driver = driver

    def open(self, url: str) -> "Tab":
        self.driver.get(url)
        self.until(self.is_ready)
        return self

    def until(self, condition: Callable[[], Any], seconds: float = 30) -> Any:
        """The condition's value, as soon as it holds."""
        deadline = time.monotonic() + seconds
        while not (value := condition()):
            assert time.monotonic() < deadline, f"not within {seconds} s; the page shows {self.messages()}"
            time.sleep(0.05)
        return value

    def run(self, script: str, *args: Any) -> Any:
        return self.driver.execute_script(script, *args)

    @contextmanager
    def on_a_slow_line(self) -> Iterator[None]:
        """Each request takes 0.3 s longer."""
        line = {"offline": False, "downloadThroughput": -1, "uploadThroughput": -1}
        self.driver.execute_cdp_cmd("Network.enable", {})
        self.driver.execute_cdp_cmd("Network.emulateNetworkConditions", {**line, "latency": 300})
        try:
            yield
        finally:
            self.driver.execute_cdp_cmd("Network.emulateNetworkConditions", {**line, "latency": 0})

    def texts(self, selector: str) -> list[str]:
        """What the elements show, without what is folded away and what is invisible; off the screen, what they hold."""
        text = "(element.innerText || element.textContent).trim()"
        script = f"return [...document.querySelectorAll(arguments[0])].map((element) => {text})"
        return [written(text) for text in self.run(script, selector)]

    def messages(self) -> list[str]:
        return self.texts("#talk [data-testid=user], #talk [data-testid=bot]")

    def figures(self) -> str:
        return "".join(self.texts("#figures"))

    def earlier(self) -> list[str]:
        return self.run("return [...document.querySelectorAll('#earlier label')].map((e) => e.textContent.trim())")

    def box(self) -> WebElement:
        return self.driver.find_element(By.CSS_SELECTOR, "#box textarea")

    def is_ready(self) -> bool:
        return self.run(
            """const box = document.querySelector("#box textarea"), title = document.querySelector("#heading h1");
            return Boolean(box && !box.disabled && title && sessionStorage["qwen-vllm/open"]);"""
        )

    def send(self, text: str) -> None:
        self.until(self.is_ready)
        self.box().send_keys(text, Keys.ENTER)
        self.until(lambda: not self.box().get_attribute("value"))

    def ask(self, text: str) -> str:
        """Asks, waits for the whole answer, and returns it."""
        before = len(self.messages())
        self.send(text)
        self.until(lambda: len(self.messages()) >= before + 2 and self.is_ready())
        return self.messages()[-1]

    def press(self, selector: str) -> None:
        """Presses a button, also one in a panel that is folded away."""
        self.until(lambda: self.run("return Boolean(document.querySelector(arguments[0]))", selector))
        self.run("[...document.querySelectorAll(arguments[0])].at(-1).click()", selector)

    def retry(self) -> None:
        """Asks the last question again, once the page is done with it."""
        self.until(self.is_ready)
        self.press("#chat [aria-label=Retry]")

    def edit(self, text: str) -> None:
        """Asks the first question anew, with another text."""
        self.run("document.querySelector('#chat [aria-label=Edit]').click()")
        self.until(lambda: self.texts("#chat textarea"))
        self.fill("#chat textarea", text)
        self.press("#chat [aria-label=Submit]")

    def versions(self) -> list[str]:
        """Which version of how many the questions are that have some, as soon as no answer is on its way."""
        texts = self.run("return [...document.querySelectorAll('.versions')].map((e) => e.textContent.slice(1, -1))")
        return texts if self.is_ready() else []

    def notice(self) -> str:
        return "".join(self.texts("#notice"))

    def choose(self, menu: str, n: int, of: int) -> None:
        """Picks the nth choice of a menu that is to be seen."""
        field = self.until(lambda: self.driver.find_elements(By.CSS_SELECTOR, f"{menu} input"))[0]
        self.until(
            lambda: self.run("return arguments[0].getBoundingClientRect().right < innerWidth", field)
        )  # it moves
        field.click()
        choices = self.until(lambda: self.driver.find_elements(By.CSS_SELECTOR, f"{menu} [role=option]"))
        assert len(choices) == of
        choices[n - 1].click()

    def fill(self, selector: str, text: str) -> None:
        self.run(
            """const field = document.querySelector(arguments[0]);
            field.value = arguments[1];
            field.dispatchEvent(new Event("input", {bubbles: true}));""",
            selector,
            text,
        )

    def asked_hosts(self) -> set[str]:
        """The hosts that were asked since this was last asked; what the page's own policy held back was not."""
        events = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        held = [e["params"]["requestId"] for e in events if e["params"].get("blockedReason") == "csp"]
        sent = [e["params"] for e in events if e["method"] == "Network.requestWillBeSent"]
        urls = [urlsplit(request["request"]["url"]) for request in sent if request["requestId"] not in held]
        return {url.netloc for url in urls if url.scheme not in ("data", "blob")}


def start_browser() -> webdriver.Chrome:
    """A browser that is cut off from the network."""
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    options.add_argument("--headless=new")
    options.add_argument("--no-sandbox")
    options.add_argument("--disable-dev-shm-usage")
    options.add_argument("--window-size=1280,800")
    options.add_argument("--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1")
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    return webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))


def questions(server: Server) -> list[dict[str, Any]]:
    """The bodies of all that was asked of `/chat`."""
    return [body for path, _, body in server.requests if path == "/chat"]


def exported(tab: Tab, button: str) -> str:
    """The text of the file that the button offers."""
    tab.run("URL.createObjectURL = (blob) => { blob.text().then((text) => { window.saved = text; }); return '#'; };")
    tab.run("window.saved = null")
    tab.press(button)
    return tab.until(lambda: tab.run("return window.saved"))


def open_chat(tab: Tab, n: int) -> list[str]:
    """Opens the nth chat of the list, and returns its messages."""
    label, opening = f"#earlier label:nth-of-type({n})", tab.run("return chats.shown.opening")
    if not tab.run("return document.querySelector(arguments[0]).matches('.selected')", label):
        tab.press(f"{label} input")
        tab.until(lambda: tab.run("return chats.shown.opening") != opening)
    kept = tab.run("return branches.messages(chats.shown.chat).map(textOf)")
    tab.until(lambda: [text for text in tab.messages() if text] == kept)
    return kept


def kept_chat(title: str, answer: str, **fields: Any) -> dict[str, Any]:
    """A chat as the browser keeps it."""
    turn = {"id": "0", "parent": None, "messages": [text_message("user", title), text_message("assistant", answer)]}
    chat = {"id": title, "name": "", "title": title, "pinned": False, "saved": 1, "version": ""}
    return chat | {"turns": [turn], "leaf": "0"} | fields
