// Draws formulas, in the place of Gradio's module, which draws all of them at once: a formula far from the screen stays
// text, as markdown.py marked it.
import katex from "KATEX";

const FORMULA = /((?:\$\$|\\\[|\\\(|\$)\u2060[^]+?\u2060(?:\$\$|\\\]|\\\)|\$))/;
const KEPT = 24;  // formulas, which are drawn at once when they come again: a growing answer is set anew for each piece

const kept = new Map(), texts = new WeakMap();
const nearby = new IntersectionObserver((entries) => {
  for (const {target, isIntersecting} of entries) {
    if (!isIntersecting) target.textContent = texts.get(target);
    else if (!target.firstElementChild) draw(target);
  }
}, {root: document.querySelector("#talk"), rootMargin: "20% 0%"});
addEventListener("beforeprint", () => document.querySelectorAll("#talk .formula").forEach(draw));

function draw(element) {
  const text = texts.get(element), formula = kept.get(text) ?? rendered(text);
  kept.delete(text);
  kept.set(text, formula);
  if (kept.size > KEPT) kept.delete(kept.keys().next().value);
  element.replaceChildren(formula.cloneNode(true));
}

function rendered(text) {
  const formula = document.createElement("span"), displayMode = /^(\$\$|\\\[)/.test(text);
  katex.render(text.replace(/^.+?\u2060|\u2060.+?$/g, ""), formula, {displayMode, throwOnError: false});
  return formula;
}

function placed(text) {
  const element = Object.assign(document.createElement("span"), {className: "formula", textContent: text});
  texts.set(element, text);
  if (kept.has(text)) draw(element);
  nearby.observe(element);
  return element;
}

// Gradio calls this with each block of Markdown that has a formula.
export default function render(block) {
  const walker = document.createTreeWalker(block, NodeFilter.SHOW_TEXT), found = [];
  while (walker.nextNode()) found.push(walker.currentNode);
  for (const node of found.filter(({parentElement}) => !parentElement?.closest("code"))) {
    node.replaceWith(...node.data.split(FORMULA).map((text, n) => n % 2 ? placed(text) : text));
  }
}
