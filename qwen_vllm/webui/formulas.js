// Draws formulas, in the place of Gradio's module, which draws all of them at once: a formula far from the screen stays
// text, as markdown.py marked it.
import katex from "KATEX";

const FORMULA = /((?:\$\$|\\\[|\\\(|\$)\u2060[^]+?\u2060(?:\$\$|\\\]|\\\)|\$))/;
const KEPT = 24;  // formulas, which are drawn at once when they come again: a growing answer is set anew for each piece

const kept = new Map(), texts = new WeakMap(), onPage = new Set();
const watch = (rootMargin, see) => new IntersectionObserver((entries) => {
  for (const {target, isIntersecting} of entries) see(target, isIntersecting);
}, {root: document.querySelector("#talk"), rootMargin});
// A drawn formula takes another room than its text, and moves itself: so it goes later than it comes.
const watches = [
  watch("20% 0%", (element, isNear) => { if (isNear) draw(element); }),
  watch("100% 0%", (element, isNear) => {
    onPage.add(element);
    if (!isNear) element.textContent = texts.get(element);
  }),
];
addEventListener("beforeprint", () => onPage.forEach(draw));

function draw(element) {
  if (element.firstElementChild) return;
  const text = texts.get(element), formula = kept.get(text) ?? rendered(text);
  kept.delete(text);
  kept.set(text, formula);
  if (kept.size > KEPT) kept.delete(kept.keys().next().value);
  element.replaceChildren(formula.cloneNode(true));
}

function rendered(text) {
  const formula = document.createElement("span"), displayMode = /^(\$\$|\\\[)/.test(text);
  const tex = text.slice(text.indexOf("\u2060") + 1, text.lastIndexOf("\u2060"));
  katex.render(tex, formula, {displayMode, throwOnError: false});
  return formula;
}

function placed(text) {
  const element = Object.assign(document.createElement("span"), {className: "formula", textContent: text});
  texts.set(element, text);
  if (kept.has(text)) draw(element);
  watches.forEach((each) => each.observe(element));
  return element;
}

// Gradio calls this with each block of Markdown that has a formula.
export default function render(block) {
  for (const gone of [...onPage].filter(({isConnected}) => !isConnected)) {
    watches.forEach((each) => each.unobserve(gone));
    onPage.delete(gone);
  }
  const walker = document.createTreeWalker(block, NodeFilter.SHOW_TEXT), found = [];
  while (walker.nextNode()) found.push(walker.currentNode);
  for (const node of found.filter(({parentElement}) => !parentElement?.closest("code"))) {
    node.replaceWith(...node.data.split(FORMULA).map((text, n) => n % 2 ? placed(text) : text));
  }
}
