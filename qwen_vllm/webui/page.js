// The page's own script. WORDS (what the page says, by language) is set before it.
const words = Object.entries(WORDS).find(([language]) => navigator.language.startsWith(language))?.[1] ?? WORDS.en;
const TURNS = 10;  // turns that a chat opens with

// Chats are kept in the browser under their ids: the messages, and apart from them a card for the list.
// So the list opens without parsing the messages. What the functions return goes to Gradio's components.
const chats = {
  key: (id) => `qwen-vllm/chat/${id}`,
  card: (id) => `qwen-vllm/card/${id}`,
  newId: () => Date.now().toString(36) + Math.random().toString(36).slice(2),
  // The chat on the page: the ids of this opening and of the chat, what of it is kept, its messages, the turn on its way,
  // and from which message on the page has them.
  shown: null,

  list(open) {
    const cards = Object.keys(localStorage).filter((key) => key.startsWith(chats.card("")))
      .map((key) => JSON.parse(localStorage[key])).sort((a, b) => b.saved - a.saved);
    return {__type__: "update", choices: cards.map(({title, id}) => [title, id]), value: open};
  },
  open(id) {
    chats.keep();
    sessionStorage["qwen-vllm/open"] = id;
    if (innerWidth < 768) document.querySelector("#chats.open .toggle-button")?.click();  // it covers a phone's page
    const kept = localStorage[chats.key(id)] ?? "[]", messages = JSON.parse(kept);
    chats.shown = {opening: chats.newId(), id, kept, messages, running: [], from: 0};
    return [chats.shown.opening, chats.newest(TURNS), [], "", chats.list(id)];
  },
  // Gradio handles all messages of a chatbot at each change, so it gets the newest turns, and others when they are asked for.
  newest(turns) {
    const {shown} = chats, asked = [...shown.messages.keys()].filter((n) => shown.messages[n].role === "user");
    shown.from = asked.at(-turns) ?? 0;
    document.documentElement.toggleAttribute("data-more", shown.from > 0);
    return shown.messages.slice(shown.from);
  },
  turns: () => chats.shown.messages.slice(chats.shown.from).filter(({role}) => role === "user").length,
  more: () => [chats.newest(chats.turns() + TURNS)],
  withEarlier: (messages) => [...chats.shown.messages.slice(0, chats.shown.from), ...messages],
  fresh: () => chats.open(chats.newId()),
  remove() {
    if (!confirm(words.delete_sure)) return [];
    chats.forget(chats.shown.id);
    chats.shown = null;
    return chats.fresh();
  },
  forget: (id) => [chats.key(id), chats.card(id)].forEach((key) => localStorage.removeItem(key)),

  save(opening, messages) {
    if (!chats.shown) return [];
    if (opening !== chats.shown.opening) return chats.open(chats.shown.id);
    chats.shown.messages = chats.withEarlier(messages);
    chats.keep();
    return [undefined, undefined, undefined, undefined, chats.list(chats.shown.id)];
  },
  grow(opening, running) {
    if (!chats.shown) return [];
    // The last piece of an answer may come after another chat was opened: then the opened one stays on the page.
    if (opening !== chats.shown.opening) return chats.open(chats.shown.id);
    chats.shown.running = running;
    chats.soon ??= setTimeout(chats.keep, 1000);  // a long chat takes its time to write: not for each piece of an answer
    return [];
  },
  finish(opening, messages, running) {
    if (opening !== chats.shown?.opening || !running.length) return [];
    Object.assign(chats.shown, {messages: [...chats.withEarlier(messages), ...running], running: []});
    return [chats.newest(chats.turns() > 2 * TURNS ? TURNS : chats.turns()), []];
  },
  keep() {
    clearTimeout(chats.soon);
    chats.soon = null;
    const {shown} = chats, text = JSON.stringify(shown ? [...shown.messages, ...shown.running] : []);
    if (!shown || text === shown.kept) return;
    // Another tab went on with this chat: that stays, and what is shown here becomes a chat of its own.
    if ((localStorage[chats.key(shown.id)] ?? "[]") !== shown.kept) shown.id = chats.newId();
    sessionStorage["qwen-vllm/open"] = shown.id;
    if (text === "[]") chats.forget(shown.id);
    else {
      const question = written(JSON.parse(text)[0].content.map(documents.titled).join(" ")).trim();
      const card = {id: shown.id, title: question.slice(0, 60) || "🖼", saved: Date.now()};
      try {
        localStorage[chats.key(shown.id)] = text;
        localStorage[chats.card(shown.id)] = JSON.stringify(card);
      } catch {
        if (!chats.warned) alert(words.storage_full);
        chats.warned = true;
      }
    }
    shown.kept = localStorage[chats.key(shown.id)] ?? "[]";
  },
  attached: (message) => message.content.filter((part) => part.type === "file" || documents.is(part)),
  // Gradio drops the images and documents of a question that is edited.
  edited: (messages) => [messages.map((message, n) => chats.attached(message).length ? message
    : {...message, content: [...chats.attached(chats.before[n]), ...message.content]})],

  keepSettings: (...settings) => { localStorage["qwen-vllm/settings"] = JSON.stringify(settings); },
  restore(...settings) {
    for (const name of ["chats", "settings"]) document.querySelector(`#${name} .toggle-button`).ariaLabel = words[name];
    const open = sessionStorage["qwen-vllm/open"], kept = JSON.parse(localStorage["qwen-vllm/settings"] ?? "[]");
    const shown = open ? chats.open(open) : chats.fresh();
    return [...shown, ...settings.map((setting, n) => kept[n] ?? setting)];
  },
  saveMarkdown: (text) => chats.download("chat.md", text),
  saveJson: (text) => chats.download("chat.json", text),
  download(name, text) {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text]));
    link.download = name;
    link.click();
    URL.revokeObjectURL(link.href);
  },
};

const showTitle = () => { document.title = document.querySelector("#heading").textContent.trim(); };
const painted = () => new Promise((done) => requestAnimationFrame(() => setTimeout(done, 0, [])));
const focusBox = () => document.querySelector("#box textarea").focus();

// Copies and edits hold what was written, without the invisible characters of markdown.py.
const written = (text) => text.replace(/([\u2060\ufeff])(\1?)/g, "$2");
const clipboard = navigator.clipboard, copy = clipboard?.writeText.bind(clipboard);
if (copy) clipboard.writeText = (text) => copy(written(text));
addEventListener("copy", (event) => {
  const text = String(getSelection());
  if (text === written(text)) return;
  event.clipboardData.setData("text/plain", written(text));
  event.preventDefault();
});
addEventListener("click", () => setTimeout(() => {  // by then Gradio has opened the field of a question to edit
  const field = document.querySelector("#chat textarea");
  if (!field || field.written) return;
  field.written = true;
  field.value = written(field.value);
  field.dispatchEvent(new Event("input", {bubbles: true}));
  chats.before = JSON.parse(JSON.stringify(chats.shown.messages.slice(chats.shown.from)));
}));

// The keys of the page, in a dialog.
const keys = document.createElement("dialog");
keys.id = "keys";
keys.innerHTML = ["send", "line", "stop", "list"].map((name) => words[`key_${name}`].split(" | "))
  .map(([key, does]) => `<dt><kbd>${key}</kbd></dt><dd>${does}</dd>`).join("");
keys.innerHTML = `<h2>${words.keys}</h2><dl>${keys.innerHTML}</dl><form method="dialog"><button>${words.close}</button></form>`;
addEventListener("keydown", (event) => {
  if (event.isComposing) event.stopPropagation();  // Enter and Esc are then for the input method: Gradio would send
  else if (event.key === "Escape" && !keys.open) document.querySelector("#box .stop-button")?.click();
  else if (event.key === "/" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    document.body.append(keys);
    keys.showModal();
  }
}, true);
addEventListener("pagehide", () => chats.keep());

Object.assign(window, {chats, showTitle, painted, focusBox});  // the page's events call these by name
