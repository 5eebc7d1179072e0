// Draws formulas, in the place of Gradio's module, which draws all of them at once: a formula far from the screen stays
// text, as markdown.py marked it.
import katex from "KATEX";

const talk = document.querySelector("#talk"), parts = new WeakMap(), onPage = new Set(), drawn = new Map();  // by their text
const watch = (rootMargin, see) => new IntersectionObserver(see, {root: talk, rootMargin});
// A drawn formula takes another room than its text, and moves itself: so it goes later than it comes.
const watches = [
  watch("20% 0%", (entries) => entries.filter((entry) => entry.isIntersecting).forEach(({target}) => draw(target))),
  watch("100% 0%", (entries) => {
    for (const {target, isIntersecting} of entries) {
      onPage.add(target);
      if (!isIntersecting && target.firstElementChild) target.textContent = release(target);
    }
    [...onPage].filter(({isConnected}) => !isConnected).forEach(forget);
  }),
];
addEventListener("beforeprint", () => onPage.forEach(draw));
// A formula may come long after it was placed, as when its message waits for what colours code; and it may come again, as
// a turn does that was left and is opened from the chat. One of an answer that keeps what it has does not come at all.
new MutationObserver((changes) => {
  for (const node of changes.flatMap(({addedNodes}) => [...addedNodes])) {
    if (parts.has(node)) come(node);
    else node.querySelectorAll?.(".formula").forEach(come);
  }
}).observe(talk, {subtree: true, childList: true});

// One that stood elsewhere, as in a turn that has ended, is there at once.
function come(element) {
  if (drawn.has(parts.get(element).text)) draw(element);
  watches.forEach((each) => each.observe(element));
}

// Let another of its text be drawn anew. Returns the text.
function release(element) {
  const {text} = parts.get(element);
  if (drawn.get(text) === element) drawn.delete(text);
  return text;
}

function forget(element) {
  release(element);
  watches.forEach((each) => each.unobserve(element));
  onPage.delete(element);
}

function draw(element) {
  if (element.firstElementChild) return;
  const {text, tex, displayMode} = parts.get(element), before = drawn.get(text), formula = before?.firstElementChild;
  if (formula) element.replaceChildren(before.isConnected ? formula.cloneNode(true) : formula);
  else katex.render(tex, element, {displayMode, throwOnError: false});
  drawn.set(text, element);
}

function place(text, delimiters) {
  const {left, right, display} = delimiters.find((each) => text.startsWith(each.left));
  const element = Object.assign(document.createElement("span"), {className: "formula", textContent: text});
  element.dataset.formula = text;
  parts.set(element, {text, tex: text.slice(left.length, -right.length), displayMode: display});
  return element;
}

const escaped = (text) => text.replace(/[.*+?^${}()|[\]\\]/g, "\\$&");

// Gradio calls this with each block of Markdown that has a formula, and with what formulas begin and end with.
export default function render(block, {delimiters}) {
  const formula = delimiters.map(({left, right}) => `${escaped(left)}[^]+?${escaped(right)}`).join("|");
  const walker = document.createTreeWalker(block, NodeFilter.SHOW_TEXT), found = [];
  while (walker.nextNode()) found.push(walker.currentNode);
  for (const node of found.filter(({parentElement}) => !parentElement?.closest("code"))) {
    const texts = node.data.split(new RegExp(`(${formula})`));
    node.replaceWith(...texts.map((text, n) => n % 2 ? place(text, delimiters) : text));
  }
}
