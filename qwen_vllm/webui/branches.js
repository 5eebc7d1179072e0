// The versions of a conversation. A chat has `turns`, each {id, parent, messages}: a question and what stands under it.
// Turns with the same parent are versions of each other. `leaf` is the id of the last turn that is shown, or null.
const branches = {
  // The turns that are shown, from the first to the leaf.
  path({turns, leaf}) {
    const byId = new Map(turns.map((turn) => [turn.id, turn])), path = [];
    for (let turn = byId.get(leaf); turn; turn = byId.get(turn.parent)) path.push(turn);
    return path.toReversed();
  },
  messages: (chat) => branches.path(chat).flatMap((turn) => turn.messages),
  versions: ({turns}, {parent}) => turns.filter((turn) => turn.parent === parent),

  // Show the turn `id` (null: the first), and under it the newest ones.
  show(chat, id) {
    chat.leaf = id;
    for (let next; (next = chat.turns.findLast(({parent}) => parent === chat.leaf));) chat.leaf = next.id;
  },
  // Show the first `count` turns of those that are shown.
  cut(chat, count) { chat.leaf = branches.path(chat)[count - 1]?.id ?? null; },

  // Put a turn under the leaf, and show it. One with the same question that got no answer goes: it is no version.
  add(chat, turn) {
    const last = {...turn, parent: chat.leaf};
    const failed = (other) => other.parent === last.parent && asks(other) === asks(last) && !isAnswered(other)
      && !chat.turns.some(({parent}) => parent === other.id);
    Object.assign(chat, {turns: [...chat.turns.filter((other) => !failed(other)), last], leaf: last.id});
  },
  // The turns of a chat that has no versions yet. Their ids are the same each time.
  of(messages) {
    const turns = [];
    for (const message of messages) {
      if (message.role === "user" || !turns.length) {
        turns.push({id: String(turns.length), parent: turns.at(-1)?.id ?? null, messages: []});
      }
      turns.at(-1).messages.push(message);
    }
    return {turns, leaf: turns.at(-1)?.id ?? null};
  },
};

const asks = ({messages: [question]}) => JSON.stringify(question.content.map((part) => part.text ?? part.file?.path));
const isAnswered = ({messages}) => messages.slice(1).some(({metadata}) => metadata?.id !== "no-answer");

Object.assign(window, {branches});
