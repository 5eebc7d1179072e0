// Draws formulas, in the place of Gradio's module, which draws all of them at once: a formula far from the screen stays
// text, as markdown.py marked it.
import katex from "KATEX";

const KEPT = 24;  // formulas, which are drawn at once when they come again: a growing answer is set anew for each piece

const kept = new Map(), parts = new WeakMap(), onPage = new Set();
const watch = (rootMargin, see) => new IntersectionObserver(see, {root: document.querySelector("#talk"), rootMargin});
// A drawn formula takes another room than its text, and moves itself: so it goes later than it comes.
const watches = [
  watch("20% 0%", (entries) => entries.filter((entry) => entry.isIntersecting).forEach(({target}) => draw(target))),
  watch("100% 0%", (entries) => {
    for (const {target, isIntersecting} of entries) {
      onPage.add(target);
      if (!isIntersecting) target.textContent = parts.get(target).text;
    }
    [...onPage].filter(({isConnected}) => !isConnected).forEach(forget);
  }),
];
addEventListener("beforeprint", () => onPage.forEach(draw));

function forget(element) {
  watches.forEach((each) => each.unobserve(element));
  onPage.delete(element);
}

function draw(element) {
  if (element.firstElementChild) return;
  const {text} = parts.get(element), formula = kept.get(text) ?? rendered(parts.get(element));
  kept.delete(text);
  kept.set(text, formula);
  if (kept.size > KEPT) kept.delete(kept.keys().next().value);
  element.replaceChildren(formula.cloneNode(true));
}

function rendered({tex, displayMode}) {
  const formula = document.createElement("span");
  katex.render(tex, formula, {displayMode, throwOnError: false});
  return formula;
}

function placed(text, delimiters) {
  const {left, right, display} = delimiters.find((each) => text.startsWith(each.left));
  const element = Object.assign(document.createElement("span"), {className: "formula", textContent: text});
  parts.set(element, {text, tex: text.slice(left.length, -right.length), displayMode: display});
  if (kept.has(text)) draw(element);
  watches.forEach((each) => each.observe(element));
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
    node.replaceWith(...texts.map((text, n) => n % 2 ? placed(text, delimiters) : text));
  }
}
