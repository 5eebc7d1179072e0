// All chats as one file, with their images.
const CHATS_FORMAT = "qwen-vllm chats, version 1";

const transfer = {
  async save() {
    const all = await store.all().catch(chats.tellFailure);
    if (!all) return [];
    for (const part of filesOf(all)) part.file.data = await fetchData(part.file);
    chats.download("chats.json", JSON.stringify({format: CHATS_FORMAT, chats: all}));
    return [];
  },
  async load() {
    const file = await chosenFile();
    try {
      if (file) chats.tell(await transfer.read(file));
    } catch (error) {
      if (!(error instanceof Refused)) chats.tellFailure(error);
      else chats.tell(words.import_refused.replace("{file}", file.name).replace("{reason}", error.message));
    }
    return chats.list();
  },
  // Add a file's chats to those of this browser. Returns what there is to say of it.
  async read(file) {
    const added = checked(await file.text());
    for (const part of filesOf(added)) await uploadFile(part);
    const count = await store.merge(added);
    chats.announce();
    return words.imported.replace("{count}", count).replace("{known}", added.length - count);
  },
};

class Refused extends Error {}

const filesOf = (all) => all.flatMap(({turns}) => turns).flatMap(({messages}) => messages)
  .flatMap(({content}) => content).filter(({type}) => type === "file");
const pageServer = () => window.gradio_config.root;

async function fetchData({path}) {
  const answer = await fetch(`${pageServer()}/gradio_api/file=${encodeURI(path)}`).catch(() => null);
  if (!answer?.ok) return null;
  const reader = new FileReader(), blob = await answer.blob();
  return new Promise((done) => {
    reader.addEventListener("load", () => done(reader.result));
    reader.readAsDataURL(blob);
  });
}

// Give a file of a question back to the page's server, which tells the path that it has now.
async function uploadFile(part) {
  const {data, orig_name: name} = part.file, form = new FormData(), blob = await (await fetch(data)).blob();
  form.append("files", blob, name);
  const answer = await fetch(`${pageServer()}/gradio_api/upload`, {method: "POST", body: form});
  if (!answer.ok) throw new Refused(words.no_upload);
  const [path] = await answer.json();
  const url = `${pageServer()}/gradio_api/file=${path}`;
  part.file = {path, url, orig_name: name, mime_type: blob.type, meta: {_type: "gradio.FileData"}};
}

const chosenFile = () => new Promise((done) => {
  const input = Object.assign(document.createElement("input"), {type: "file", accept: ".json"});
  input.addEventListener("change", () => done(input.files[0]));
  input.addEventListener("cancel", () => done(null));
  input.click();
});

// The chats of a file, with nothing in them that a chat does not have.
function checked(text) {
  let read;
  try {
    read = JSON.parse(text);
  } catch {
    throw new Refused(words.not_json);
  }
  if (read?.format !== CHATS_FORMAT || !Array.isArray(read.chats)) throw new Refused(words.not_chats);
  return read.chats.map((chat, n) => {
    try {
      return cleanChat(chat);
    } catch {
      throw new Refused(words.bad_chat.replace("{n}", n + 1));
    }
  });
}

const need = (holds) => { if (!holds) throw new TypeError("not a chat"); };
const asText = (value) => { need(typeof value === "string"); return value; };

function cleanChat({id, name, title, pinned, saved, turns, leaf}) {
  const ids = new Set([null]), clean = turns.map((turn) => {
    need(ids.has(turn.parent) && !ids.has(turn.id) && turn.messages[0].role === "user");
    ids.add(asText(turn.id));
    return {id: turn.id, parent: turn.parent, messages: turn.messages.map(cleanMessage)};
  });
  need(clean.length && ids.has(leaf) && Number.isFinite(saved));
  const card = {id: asText(id), name: asText(name), title: asText(title), pinned: pinned === true, saved};
  return {...card, version: "imported", turns: clean, leaf};
}

function cleanMessage({role, content, metadata}) {
  need(["user", "assistant"].includes(role));
  const kept = ["title", "id", "status", "log"].filter((name) => metadata?.[name]).map((name) => [name, asText(metadata[name])]);
  return {role, content: content.map(cleanPart), metadata: metadata && Object.fromEntries(kept)};
}

const inert = (text) => asText(text).replace(/<(?=[a-z/!?])/gi, "<\u2060");  // no tag is one

function cleanPart({type, text, file}) {
  const document = /^(<details><summary>)([^]*?)(<\/summary>\n\n)([^]*)(\n\n<\/details>)$/.exec(text);
  if (document) return {type: "text", text: document.slice(1).map((part, n) => n % 2 ? inert(part) : part).join("")};
  if (type !== "file") return {type: "text", text: inert(text)};
  if (!file.data) return {type: "text", text: "🖼"};  // its image was gone
  need(file.data.startsWith("data:"));
  return {type: "file", file: {data: file.data, orig_name: (file.orig_name ?? file.path).split("/").pop()}};
}

Object.assign(window, {transfer});
