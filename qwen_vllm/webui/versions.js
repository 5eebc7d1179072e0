// The arrows under a question that has versions: ‹ 2 / 3 ›.
const versions = {
  moved: null,  // the turn that an arrow was pressed for, until it is drawn

  // The shown turns, each with the place of its arrows: beside the question's buttons. An image is a row of its own.
  placed() {
    const rows = [...document.querySelectorAll("#chat .message-row")], path = branches.path(chats.shown.chat);
    const last = rows.filter((row, n) => row.matches(".user-row") && !rows[n + 1]?.matches(".user-row"));
    return last.map((row, n) => ({row, place: row.nextElementSibling, turn: path.at(n - last.length)}))
      .filter(({place, turn}) => place && turn);
  },
  draw() {
    if (!chats.shown) return;
    for (const {row, place, turn} of versions.placed()) {
      const all = branches.versions(chats.shown.chat, turn), n = all.indexOf(turn);
      const text = all.length > 1 ? `${n + 1} / ${all.length}` : "";
      let arrows = place.querySelector(".versions");
      if ((arrows?.dataset.text ?? "") !== text) {
        arrows?.remove();
        arrows = text && place.appendChild(versions.arrows(text, n, all.length));
      }
      if (versions.moved?.id !== turn.id) continue;
      row.scrollIntoView({block: "nearest"});
      [...arrows.querySelectorAll("button:enabled")].at(versions.moved.by > 0 ? -1 : 0).focus({preventScroll: true});
      versions.moved = null;
    }
  },
  arrows(text, n, count) {
    const arrows = document.createElement("div");
    Object.assign(arrows, {className: "versions", role: "group", ariaLabel: words.versions}).dataset.text = text;
    const button = (sign, ariaLabel, by, disabled) => {
      const made = Object.assign(document.createElement("button"), {textContent: sign, ariaLabel, disabled});
      made.addEventListener("click", () => versions.step(arrows.parentElement, by));
      return made;
    };
    const earlier = button("‹", words.earlier_version, -1, n === 0);
    arrows.append(earlier, text, button("›", words.later_version, 1, n === count - 1));
    return arrows;
  },
  step(place, by) {
    const {turn} = versions.placed().find((placed) => placed.place === place);
    const all = branches.versions(chats.shown.chat, turn), other = all[all.indexOf(turn) + by];
    if (document.querySelector("#box textarea").disabled) return;  // an answer is on its way
    branches.show(chats.shown.chat, other.id);
    chats.change({});
    chats.keep();
    versions.moved = {id: other.id, by};
    chats.redraw();
  },
};

Object.assign(window, {versions});
