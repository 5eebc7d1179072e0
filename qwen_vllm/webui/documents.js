const DOCUMENT = "<details><summary>";  // how a document begins in a question
const isPicture = (type) => /^image\/(?!svg)/.test(type);

// Documents that are attached to a question, until it is asked.
const documents = {
  isImage: ({mime_type: type}) => isPicture(type) && document.querySelector("#heading [data-images]"),
  // Moves what is no image out of the box.
  take(box, dropped) {
    const files = box.files.filter((file) => !documents.isImage(file));
    if (!files.length) return [];
    const known = JSON.parse(dropped), isNew = ({path}) => known.every(({id}) => id !== path);
    const added = files.filter(isNew).map(({path, orig_name: name}) => ({id: path, name}));
    const rest = {...box, files: box.files.filter(documents.isImage)};
    return [rest, JSON.stringify([...known, ...added]), added.length ? words.documents_reading : undefined];
  },
  keep: (ids, dropped) => JSON.stringify(JSON.parse(dropped).filter(({id}) => ids.includes(id))),
  is: (part) => part.text?.startsWith(DOCUMENT),
  titled: (part) => documents.is(part) ? `📄 ${part.text.slice(DOCUMENT.length, part.text.indexOf("</summary>"))}` : part.text ?? "",
};

// Gradio would tell in English alone which file is too large.
const refuse = (event) => {
  const large = [...(event.dataTransfer ?? event.target).files ?? []].find(({size}) => size > 20e6);
  if (!large || !event.target.closest?.("#box")) return;
  event.preventDefault();
  event.stopImmediatePropagation();
  alert(`${large.name}: ${words.document_large.replace("{megabytes}", 20)}`);
};
for (const kind of ["drop", "change"]) addEventListener(kind, refuse, true);

// Gradio's box takes images alone from the clipboard: other files come to it as if they were dropped.
addEventListener("paste", (event) => {
  const box = event.target.closest("#box"), dataTransfer = new DataTransfer();
  for (const file of event.clipboardData.files) if (!isPicture(file.type)) dataTransfer.items.add(file);
  if (!box || !dataTransfer.items.length) return;
  event.preventDefault();
  event.target.dispatchEvent(new DragEvent("drop", {dataTransfer, bubbles: true, cancelable: true}));
}, true);

Object.assign(window, {documents});
