"""Whether the page keeps up in a slow browser: long answers, long chats, typing and stop meanwhile.

    python -m benchmarks.page [CASE …] [--turns 0 200] [--throttle 4]

A scripted server sends each answer in pieces while a person types. Prints a row a case, in ms: the longest time between
two paints of the answer, from Enter on; between a key and the next paint; from the last piece to the end on the page;
and, in a second answer, from a press of stop halfway to the end.
"""

import argparse
import json
import time
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from selenium.webdriver.common.keys import Keys

from qwen_vllm.webui.conversation import text_message
from tests.support.browser import INFO, Tab, start_browser
from tests.support.page_server import serving
from tests.support.scripted_server import LAST, Server, line, scripted

SECONDS, PIECES = 60, 6000
"""How long an answer comes, and in how many pieces."""
WORDS = "All the leaves are **brown** and the `sky` is grey, 天是灰的。 "
FORMULA = "$\\frac{{a_{n}}}{{b_{n}^2}} + \\sqrt{{x_{n}}} = \\sum_{{i=0}}^{{{n}}} i$"
ANSWERS = {
    "short": "All right, that is it.",
    "prose": "\n\n".join([WORDS * 8] * 135),
    "code": "```python\n" + "".join(f"def f{n}(x, y): return x + {n} * y  # adds them\n" for n in range(1250)) + "```",
    "formulas": "\n\n".join(f"Step {n}: we have {FORMULA.format(n=n)} and so on." for n in range(400)),
    "paragraph": " ".join(f"Step {n}: we have {FORMULA.format(n=n)}." for n in range(400)),
    "table": "| n | name | value |\n|---|---|---|\n"
    + "\n".join(f"| {n} | the name of {n} | **{n * n}** and some more |" for n in range(500)),
}
WATCH = """
const seen = window.seen = {paints: [], keys: []}, watched = {childList: true, subtree: true, characterData: true};
let waiting = false;
new MutationObserver(() => {
  if (waiting) return;
  waiting = true;
  // Right after the frame: a timer would wait behind the next piece's.
  const painted = () => { waiting = false; seen.paints.push(Date.now()); };
  requestAnimationFrame(() => scheduler.postTask(painted, {priority: "user-blocking"}));
}).observe(document.querySelector("#talk"), watched);
new MutationObserver(() => {
  if (document.querySelector("#figures .prose").textContent.trim()) seen.end ??= Date.now();
}).observe(document.querySelector("#figures"), watched);
new PerformanceObserver((list) => seen.keys.push(...list.getEntries().map((entry) => entry.duration)))
  .observe({type: "event", durationThreshold: 16});
addEventListener("keydown", ({key}) => { if (key === "Enter") seen.paints = [Date.now()]; }, true);
addEventListener("click", () => { seen.stopped ??= Date.now(); }, true);"""


class Sender:
    """The script of an answer that comes at its pace. It knows when the last piece was sent."""

    def __init__(self, answer: str) -> None:
        size = -(-len(answer) // PIECES)
        self._pieces = [answer[start : start + size] for start in range(0, len(answer), size)]
        self._pause = SECONDS / max(PIECES // 10, len(self._pieces))  # a short answer comes in a moment
        self.sent = 0.0

    def __iter__(self) -> Iterator[bytes]:
        began = time.monotonic()
        for number, piece in enumerate(self._pieces):
            time.sleep(max(0, began + self._pause * number - time.monotonic()))
            yield line({"delta": piece})
        self.sent = time.time()
        yield line(LAST)


def ask(tab: Tab, server: Server, answer: str, stop: bool) -> dict[str, Any]:
    """Ask, type until the answer has ended or was stopped, and return what the browser saw."""
    sender = Sender(answer)
    server.scripts["/chat"] = [(200, sender)]  # type: ignore[list-item]
    tab.run(WATCH)
    tab.box().send_keys("Go on?", Keys.ENTER)
    began = time.monotonic()
    while not (tab.run("return seen.end") and tab.is_ready()):
        for kind in ("rawKeyDown", "keyUp"):
            tab.driver.execute_cdp_cmd("Input.dispatchKeyEvent", {"type": kind, "key": "a", "code": "KeyA"})
        time.sleep(0.2)
        if stop and time.monotonic() > began + SECONDS / 2:
            tab.run("document.querySelector('#box .stop-button').click()")
            stop = False
    time.sleep(2)  # until the turn stands where it stays
    return tab.run("return seen") | {"sent": 1000 * sender.sent}


def measure(tab: Tab, server: Server, name: str, turns: int, throttle: float) -> list[float]:
    """Return the row of a case behind so many turns."""
    talk = [text_message("user", "And?"), text_message("assistant", "\n\n".join([WORDS * 4] * 2))] * turns
    runs = []
    for stop in (False, True)[: 1 + (name != "short")]:
        tab.driver.execute_cdp_cmd("Emulation.setCPUThrottlingRate", {"rate": 1})
        chat = f"{name}-{turns}-{stop}"
        tab.run("sessionStorage['qwen-vllm/open'] = arguments[0]", chat)
        tab.run("localStorage[`qwen-vllm/chat/${arguments[0]}`] = arguments[1]", chat, json.dumps(talk))
        tab.driver.refresh()
        tab.until(lambda: tab.is_ready() and bool(tab.messages()) == bool(talk), 120)
        time.sleep(2)
        tab.driver.execute_cdp_cmd("Emulation.setCPUThrottlingRate", {"rate": throttle})
        runs.append(ask(tab, server, ANSWERS[name], stop))
    whole, stopped = runs[0], runs[-1]
    gap = max(later - earlier for earlier, later in pairwise(whole["paints"]))
    row = [gap, max(whole["keys"]), whole["end"] - whole["sent"]]
    return [*row, stopped["end"] - stopped["stopped"]] if len(runs) == 2 else row


def main() -> None:
    """Measure the cases that are named, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", default=list(ANSWERS), metavar="CASE", help=", ".join(ANSWERS))
    parser.add_argument("--turns", nargs="*", type=int, default=[0, 200], help="earlier turns")
    parser.add_argument("--throttle", type=float, default=4, help="how many times slower the browser is")
    args = parser.parse_args()
    print("| answer | earlier turns | gap | key | end | stop |\n|---|---|---|---|---|---|")
    with scripted() as server:
        server.play(line(INFO), path="/chat/info")
        with serving("--server-url", server.url) as url, start_browser() as driver:
            for name in args.cases:
                for turns in args.turns:
                    row = measure(Tab(driver).open(url), server, name, turns, args.throttle)
                    print(f"| {name} | {turns} | {' | '.join(f'{ms:,.0f}' for ms in row)} |", flush=True)


if __name__ == "__main__":
    main()
