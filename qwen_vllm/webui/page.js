// The page's own script. WORDS (what the page says, by language) is set before it.
const words = Object.entries(WORDS).find(([language]) => navigator.language.startsWith(language))?.[1] ?? WORDS.en;

const TURNS = 10;  // turns that a chat opens with
const left = ({opening}) => `qwen-vllm/left/${opening}`;

// The chat on the page, and the list of all. What the functions return goes to Gradio's components.
const chats = {
  // The chat on the page, the id of this opening of it, the turn on its way, how often it changed,
  // up to where it is kept, and from which turn on the page has it.
  shown: null,
  sought: "",
  saving: Promise.resolve(),

  async list() {
    const cards = await store.cards(chats.sought).catch(chats.tellFailure) ?? [];
    const choices = cards.map(({id, title, pinned}) => [`${pinned ? "★ " : ""}${title}`, id]);
    return {__type__: "update", choices, value: chats.shown?.chat.id};
  },
  async view(turns = TURNS) {
    const {opening, chat} = chats.shown, figures = branches.path(chat).at(-1)?.figures ?? "";
    return [opening, chats.newest(turns), [], figures, await chats.list()];
  },
  // Gradio handles all messages of a chatbot at each change, and changes some: it gets copies of the newest turns, and of
  // others when they are asked for.
  newest(turns) {
    const {shown} = chats;
    shown.from = Math.max(0, branches.path(shown.chat).length - turns);
    document.documentElement.toggleAttribute("data-more", shown.from > 0);
    return structuredClone(chats.onPage());
  },
  onPage: () => branches.path(chats.shown.chat).slice(chats.shown.from).flatMap(({messages}) => messages),
  turns: () => branches.path(chats.shown.chat).length - chats.shown.from,
  more: () => [chats.newest(chats.turns() + TURNS)],
  withEarlier: (messages) => [
    ...branches.path(chats.shown.chat).slice(0, chats.shown.from).flatMap((turn) => turn.messages), ...messages],
  listed: async () => [undefined, undefined, undefined, undefined, await chats.list()],

  async open(id) {
    await chats.keep();
    if (innerWidth < 768) document.querySelector("#chats.open .toggle-button")?.click();  // it covers a phone's page
    chats.tell("");
    await chats.load(id);
    return chats.view();
  },
  async load(id) {
    const kept = await store.get(id).catch(chats.tellFailure);
    const chat = kept ?? {id, name: "", pinned: false, saved: 0, version: "", turns: [], leaf: null};
    branches.show(chat, chat.leaf);
    chats.keep();  // what came meanwhile
    chats.shown = {opening: newId(), chat, running: null, changes: 0, kept: 0, from: 0};
    sessionStorage["qwen-vllm/open"] = id;
  },
  fresh: () => chats.open(newId()),
  async remove() {
    if (!confirm(words.delete_sure)) return [];
    await chats.forget([chats.shown.chat.id]);
    return chats.fresh();
  },
  async forget(ids) {
    if (ids.includes(chats.shown.chat.id)) chats.shown = null;
    await chats.saving;
    await store.remove(ids).then(chats.announce, chats.tellFailure);
  },

  save(opening, messages) {
    if (!chats.shown) return [];
    if (opening !== chats.shown.opening) return chats.view();
    const {chat} = chats.shown, {leaf} = chat;
    branches.cut(chat, chats.shown.from + messages.filter(({role}) => role === "user").length);
    if (chat.leaf !== leaf) chats.shown.changes++;
    versions.draw();
    return chats.keep().then(chats.listed);
  },
  grow(opening, running) {
    if (!chats.shown) return;
    // The last piece of an answer may come after another chat was opened: then the opened one stays on the page.
    if (opening !== chats.shown.opening) chats.redraw();
    else if (running.length) {
      chats.shown.running = {id: chats.shown.running?.id ?? newId(), messages: running};
      chats.shown.changes++;
      chats.soon ??= setTimeout(chats.keep, 1000);  // a long chat takes its time to write: not for each piece of an answer
    }
  },
  finish(opening, messages, running, figures) {
    if (opening !== chats.shown?.opening || !running.length) return [];
    chats.grow(opening, running);
    chats.shown.running.figures = figures;
    Object.assign(chats.shown, {chat: chats.whole(chats.shown), running: null});
    return [chats.newest(chats.turns() > 2 * TURNS ? TURNS : chats.turns()), []];
  },
  // The chat with the turn on its way.
  whole({chat, running}) {
    const whole = {...chat, saved: running ? Date.now() : chat.saved};
    if (running) branches.add(whole, running);
    const first = branches.path(whole)[0] ?? whole.turns[0];
    return {...whole, title: chat.name || (first ? titleOf(first) : "")};
  },
  keep() {
    clearTimeout(chats.soon);
    chats.soon = null;
    const {shown} = chats;
    chats.saving = chats.saving.then(() => shown && chats.write(shown));
    return chats.saving;
  },
  async write(shown) {
    const {changes} = shown;
    try {
      const whole = chats.whole(shown);
      if (changes === shown.kept || !whole.turns.length) return;
      const kept = await store.save(whole, shown.opening);
      Object.assign(shown.chat, kept);
      shown.kept = changes;
      localStorage.removeItem(left(shown));
      if (shown === chats.shown) sessionStorage["qwen-vllm/open"] = shown.chat.id;
      if (!shown.running) chats.announce();
    } catch (error) {
      chats.tellFailure(error);
    }
  },
  // What cannot be written any more as the page is left is written when it is opened again.
  leave() {
    const {shown} = chats, whole = shown && chats.whole(shown);
    if (!whole?.turns.length || shown.changes === shown.kept) return;
    try {
      localStorage[left(shown)] = JSON.stringify([whole, shown.opening]);
    } catch { /* too large: then the last second is not kept */ }
    chats.keep();
    chats.announce();
  },

  // Other tabs show what this one changed, and this one what they did, except while somebody is at work here.
  redraw() {
    chats.isStale = true;
    refresh();
  },
  announce: () => chats.tabs.postMessage(""),
  async refresh() {
    const {shown, isStale} = chats, isBusy = shown.changes !== shown.kept || document.querySelector("#box textarea").disabled
      || document.querySelector("#chat textarea");
    chats.isStale = false;
    const kept = isBusy || isStale ? undefined : await store.get(shown.chat.id).catch(chats.tellFailure);
    if (isStale) return chats.view(chats.turns());
    if (!kept || kept.version === shown.chat.version || shown !== chats.shown) return chats.listed();
    await chats.load(kept.id);
    return chats.view();
  },

  async search(text) {
    const sought = searched(text.trim());
    chats.sought = sought;
    const list = chats.shown ? await chats.list() : [];
    return sought === chats.sought ? list : [];  // else somebody went on typing
  },
  async choices() {
    const list = await chats.list();
    for (const box of document.querySelectorAll("#several .select-all-checkbox")) box.ariaLabel = words.all_chats;  // Gradio gives a title only
    return {...list, value: []};
  },
  async rename() {
    const {chat} = chats.shown, name = chat.turns.length && prompt(words.rename_to, chats.whole(chats.shown).title);
    if (name) chats.change({name: name.trim()});
    return chats.keep().then(chats.list);
  },
  pin() {
    chats.change({pinned: !chats.shown.chat.pinned});
    return chats.keep().then(chats.list);
  },
  change(what) {
    Object.assign(chats.shown.chat, what);
    chats.shown.changes++;
  },
  async removeSeveral(ids) {
    if (!ids.length || !confirm(words.delete_several_sure.replace("{count}", ids.length))) return [];
    const isOpen = ids.includes(chats.shown.chat.id);
    await chats.forget(ids);
    return [...await (isOpen ? chats.fresh() : chats.listed()), await chats.choices()];
  },

  tell(line) {
    const notice = document.querySelector("#notice [role]");
    if (notice.textContent !== line) notice.textContent = line;
  },
  tellFailure: (error) => chats.tell(error?.name === "QuotaExceededError" ? words.storage_full : words.storage_missing),

  // Gradio drops the images and documents of a question that is edited.
  attached: (message) => message.content.filter((part) => part.type === "file" || documents.is(part)),
  edited: (messages) => [messages.map((message, n) => chats.attached(message).length ? message
    : {...message, content: [...chats.attached(chats.onPage()[n]), ...message.content]})],

  keepSettings(...settings) {
    const all = JSON.stringify(settings);
    try { localStorage["qwen-vllm/settings"] = all; } catch (error) { chats.tellFailure(error); }
    return all;
  },
  async restore(...settings) {
    const open = sessionStorage["qwen-vllm/open"], kept = JSON.parse(localStorage["qwen-vllm/settings"] ?? "[]");
    for (const name of ["chats", "settings"]) document.querySelector(`#${name} .toggle-button`).ariaLabel = words[name];
    new MutationObserver(versions.draw).observe(document.querySelector("#chat"), {subtree: true, childList: true});
    const failed = await store.moveOver().catch((error) => error);
    const shown = await (open ? chats.open(open) : chats.fresh());
    if (failed) chats.tellFailure(failed);
    const restored = settings.map((setting, n) => kept[n] ?? setting);
    return [...shown, ...restored, JSON.stringify(restored)];
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
const nextFrame = (then) => document.hidden ? then() : requestAnimationFrame(then);  // a hidden page has no frames
const painted = () => new Promise((done) => nextFrame(() => setTimeout(done, 0, [])));
const focusBox = () => document.querySelector("#box textarea").focus();

// Copies and edits hold what was written, without the invisible characters of markdown.py.
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
const refresh = () => {
  store.texts = null;
  if (chats.shown) document.querySelector("#refresh").click();
};
chats.tabs = new BroadcastChannel("qwen-vllm");
chats.tabs.addEventListener("message", refresh);
addEventListener("focus", refresh);
addEventListener("pagehide", chats.leave);

Object.assign(window, {chats, showTitle, painted, focusBox});  // the page's events call these by name
