// Documents that are attached to a question, until it is asked.
const documents = {
  isImage: ({mime_type: type}) => /^image\/(?!svg)/.test(type) && document.querySelector("#heading [data-images]"),
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
  is: (part) => part.text?.startsWith("<details><summary>"),
  titled: (part) => documents.is(part) ? `📄 ${part.text.slice(18, part.text.indexOf("</summary>"))}` : part.text ?? "",
};

// Gradio's box takes images alone from the clipboard: other files come to it as if they were dropped.
addEventListener("paste", (event) => {
  const box = event.target.closest("#box"), dataTransfer = new DataTransfer();
  for (const file of event.clipboardData.files) if (!/^image\/(?!svg)/.test(file.type)) dataTransfer.items.add(file);
  if (!box || !dataTransfer.items.length) return;
  event.preventDefault();
  box.querySelector("[role=group]").dispatchEvent(new DragEvent("drop", {dataTransfer, cancelable: true}));
}, true);

Object.assign(window, {documents});
