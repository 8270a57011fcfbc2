// What was said, and what of it the model is told.

/**
 * A turn: {id, role, text, media} and, of an answer, {finish, fault, usage, times}.
 * `finish` is "" while it comes, then what the server says ("stop", "length"), "stopped" by the user, or "failed".
 */
let made = 0;
export const turn = (role, text = "", media = []) => ({ id: `t${Date.now()}-${made++}`, role, text, media, finish: "" });

export class Conversation {
  constructor(turns = []) {
    this.turns = turns;
  }

  /** Everything from this turn on is taken away. @returns what was */
  cut(id) {
    const from = this.turns.findIndex((known) => known.id === id);
    return from < 0 ? [] : this.turns.splice(from);
  }

  /** Questions with their answers; a question that got none was never said, as turns alternate. */
  pairs() {
    const found = [];
    for (let i = 0; i + 1 < this.turns.length; i += 2) {
      if (this.turns[i + 1].text) found.push([this.turns[i], this.turns[i + 1]]);
    }
    return found;
  }

  /** What came before the question that is being answered, and that question. */
  told() {
    return [...this.pairs().flat(), this.turns.at(-2)];
  }
}

/** A turn as a message: media before the words, as models are trained. */
export async function message(said, part) {
  if (!said.media.length) return { role: said.role, content: said.text };
  const words = said.text ? [{ type: "text", text: said.text }] : [];
  return { role: said.role, content: [...(await Promise.all(said.media.map(part))), ...words] };
}
