// Keeps Gradio from work that changes nothing, so that long answers stay smooth. mended.py puts the calls into its scripts.
const COLOURED = 10000;  // characters of a block of code that have colours: each of those is an element

const mended = {
  // Return the entries of the states that have changed since they were asked for.
  states: {},
  changed: (states) => Object.entries(states).filter(([id, state]) => {
    const before = mended.states[id];
    mended.states[id] = JSON.stringify(state);
    return mended.states[id] !== before;
  }),
  // What is drawn of the turn on its way, by its elements: a text, its blocks, and what they were read with.
  running: new Map(),
  stands(element, drawn) {
    if (!element.closest("#running")) return;
    [...mended.running.keys()].filter(({isConnected}) => !isConnected).forEach((gone) => mended.running.delete(gone));
    mended.running.set(element, drawn);
  },
  // Move into `element` of the chat what was drawn of its text, in a turn that has gone from its place.
  moved(text, element) {
    if (!element?.matches("#chat :empty")) return null;
    const [before, drawn] = [...mended.running].find(([{isConnected}, each]) => !isConnected && text.startsWith(each.text)) ?? [];
    if (drawn) element.append(...drawn.blocks.flatMap(({nodes}) => nodes));
    mended.running.delete(before);
    return drawn;
  },
  // Call `see` with all tokens of marked, and with those inside of them. Returns what it returned.
  walkTokens(marked, tokens, see) {
    const seen = [], walk = (token) => {
      seen.push(...[see.call(marked, token)].flat());
      const parts = marked.defaults.extensions?.childTokens?.[token.type];
      if (token.type === "table") [...token.header, ...token.rows.flat()].forEach((cell) => cell.tokens.forEach(walk));
      else if (token.type === "list") token.items.forEach(walk);
      else if (parts) parts.forEach((part) => token[part].flat(Infinity).forEach(walk));
      else token.tokens?.forEach(walk);
    };
    tokens.forEach(walk);
    return seen;
  },
  // Put the first of the `fresh` blocks in the place of the first of the `old` ones. Returns the old ones that are to go.
  grow(old, fresh) {
    if (!old.length || !fresh.length) return old;
    fresh[0].nodes = graft(old[0].nodes, fresh[0].nodes);
    return old.slice(1);
  },
  // Return a block of code as HTML with colours at its beginning, which are found once.
  code: null,
  coloured(prism, code, language) {
    const beginning = code.slice(0, COLOURED);
    if (mended.code?.beginning !== beginning || mended.code.language !== language) {
      mended.code = {beginning, language, html: prism.highlight(beginning, prism.languages[language], language)};
    }
    return mended.code.html + prism.util.encode(code.slice(COLOURED));
  },
};

// Keep the old nodes that are, or can become, like the fresh ones: the browser then lays out what came, and a selection
// stays. Returns the nodes to have now. Those of the fresh ones are to be put behind the old ones.
function graft(old, fresh) {
  let kept = 0;
  while (kept < old.length && kept < fresh.length && become(old[kept], fresh[kept])) kept++;
  fresh.slice(0, kept).forEach((node) => node.remove());
  old.slice(kept).forEach((node) => node.remove());
  return [...old.slice(0, kept), ...fresh.slice(kept)];
}
function become(node, fresh) {
  const isSame = node.dataset?.formula ? node.dataset.formula === fresh.dataset?.formula : node.isEqualNode(fresh);
  if (isSame || !node.tagName || !node.cloneNode().isEqualNode(fresh.cloneNode())) return isSame;
  const nodes = graft([...node.childNodes], [...fresh.childNodes]);
  node.append(...nodes.filter(({parentNode}) => parentNode !== node));
  return true;
}

// Gradio sets the `dir` of a message again at each of its drawings: the browser would style all of it again.
const dir = Object.getOwnPropertyDescriptor(HTMLElement.prototype, "dir");
Object.defineProperty(HTMLElement.prototype, "dir", {...dir, set(value) {
  if (value !== this.dir) dir.set.call(this, value);
}});
// Gradio copies each value of each piece by `structuredClone`, which takes its time for a text too: there is nothing to copy.
const clone = structuredClone;
window.structuredClone = (value, ...options) => Object(value) === value ? clone(value, ...options) : value;
Object.assign(window, {mended});
