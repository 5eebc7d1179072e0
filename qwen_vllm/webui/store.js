// Keeps the chats of this browser, in IndexedDB. A chat is {id, name, title, pinned, saved, version, turns, leaf}.
// Its parts are apart: a card for the list, the turns, and the text that is searched. Functions reject where that fails.
const newId = () => Date.now().toString(36) + Math.random().toString(36).slice(2);
const written = (text) => text.replace(/([\u2060\ufeff])(\1?)/g, "$2");  // without the invisible characters of markdown.py
const textOf = (message) => written(message.content.map((part) => part.text ?? "").join(" ")).trim();
const searched = (text) => text.normalize("NFKC").toLowerCase();

const resultOf = (request) => new Promise((done, fail) => {
  request.addEventListener("success", () => done(request.result));
  request.addEventListener("error", () => fail(request.error));
});

const store = {
  opened: null,
  texts: null,
  async open() {
    const request = indexedDB.open("qwen-vllm", 1);
    request.addEventListener("upgradeneeded", () => ["cards", "chats", "texts"].forEach((name) => {
      request.result.createObjectStore(name, {keyPath: "id"});
    }));
    const database = await resultOf(request);
    database.addEventListener("close", () => { store.opened = null; });
    return database;
  },
  // Do the work in one transaction. It is done as a whole, or not at all.
  async transact(mode, work) {
    store.opened ??= store.open().catch((error) => { store.opened = null; throw error; });
    const transaction = (await store.opened).transaction(["cards", "chats", "texts"], mode);
    const ended = new Promise((done, fail) => {
      transaction.addEventListener("complete", done);
      transaction.addEventListener("abort", () => fail(transaction.error));
    });
    const worked = (async () => work((name) => transaction.objectStore(name)))().catch((error) => {
      transaction.abort();
      throw error;
    });
    return (await Promise.all([worked, ended]))[0];
  },
  put(of, {id, name, title, pinned, saved, version, turns, leaf}) {
    const said = turns.flatMap(({messages}) => messages.filter(({metadata}) => !metadata?.title));
    of("cards").put({id, name, title, pinned, saved, version});
    of("chats").put({id, turns, leaf});
    store.texts = null;
    of("texts").put({id, text: searched([title, ...said.map(textOf)].join("\n"))});
  },

  // The cards of the chats in which `words` stand, if there are any: the pinned ones first, then the newest.
  async cards(words) {
    const read = (name) => store.transact("readonly", (of) => resultOf(of(name).getAll()));
    store.texts = words ? store.texts ?? read("texts") : null;  // read once, and again after a change
    const [cards, texts] = await Promise.all([read("cards"), store.texts ?? []]);
    const found = new Set(texts.filter(({text}) => text.includes(words)).map(({id}) => id));
    return cards.filter(({id}) => !words || found.has(id)).sort((a, b) => b.pinned - a.pinned || b.saved - a.saved);
  },
  get: (id) => store.transact("readonly", async (of) => {
    const [card, chat] = await Promise.all([resultOf(of("cards").get(id)), resultOf(of("chats").get(id))]);
    return card && {...card, ...chat};
  }),
  all: () => store.transact("readonly", async (of) => {
    const [cards, all] = await Promise.all(["cards", "chats"].map((name) => resultOf(of(name).getAll())));
    return cards.map((card, n) => ({...card, ...all[n]}));  // both are in the order of their ids
  }),
  remove: (ids) => store.transact("readwrite", (of) => {
    for (const name of ["cards", "chats", "texts"]) ids.forEach((id) => of(name).delete(id));
  }),
  // Write a chat that was opened as `opening`. If another tab has gone on with it since, that stays, and this
  // becomes a chat of its own. Returns the id and the version that it has now.
  save: (chat, opening) => store.transact("readwrite", async (of) => {
    const version = (await resultOf(of("cards").get(chat.id)))?.version ?? "";
    const isMine = version === chat.version || version.startsWith(`${opening}/`);
    const kept = {id: isMine ? chat.id : newId(), version: `${opening}/${newId()}`};
    store.put(of, {...chat, ...kept});
    return kept;
  }),
  // Add chats from elsewhere. One that is here already is left out; one that is here with other turns stands beside it.
  // Returns how many were added.
  merge: (added) => store.transact("readwrite", async (of) => {
    let count = 0;
    for (const chat of added) {
      const kept = await resultOf(of("chats").get(chat.id));
      if (kept && chat.turns.every((turn) => kept.turns.some((other) => isSame(other, turn)))) continue;
      store.put(of, kept ? {...chat, id: newId()} : chat);
      count++;
    }
    return count;
  }),

  // Earlier versions of the page kept chats in localStorage; a page that is left keeps there what it could not write.
  // Each is deleted there once it is written here.
  async moveOver() {
    for (const key of Object.keys(localStorage).filter((name) => /^qwen-vllm\/(chat|left)\//.test(name))) {
      let kept;
      try { kept = JSON.parse(localStorage[key]); } catch { continue; }
      if (key.startsWith("qwen-vllm/left/")) await store.save(...kept);
      else {
        const id = key.slice("qwen-vllm/chat/".length), card = `qwen-vllm/card/${id}`;
        const {saved} = JSON.parse(localStorage[card] ?? "{}"), {turns, leaf} = branches.of(kept);
        const chat = {id, name: "", pinned: false, saved: saved ?? Date.now(), version: "moved", turns, leaf};
        if (turns.length) await store.merge([{...chat, title: titleOf(turns[0])}]);
        localStorage.removeItem(card);
      }
      localStorage.removeItem(key);
    }
  },
};

const titleOf = ({messages: [question]}) => written(question.content.map(documents.titled).join(" ")).trim().slice(0, 60) || "🖼";
const isSame = (one, other) => one.id === other.id && one.parent === other.parent
  && JSON.stringify(one.messages.map(textOf)) === JSON.stringify(other.messages.map(textOf));

Object.assign(window, {store, newId, searched, textOf, titleOf, written});
