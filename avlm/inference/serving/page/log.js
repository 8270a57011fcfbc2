// The conversation as it is seen and heard: one article for each turn.

import { act, icon, make } from "./dom.js";
import { costs } from "./figures.js";
import { player } from "./player.js";
import { show } from "./prose.js";

const NEAR_PX = 96;

export class Log {
  /** @param {{edit, again, copy, key}} acts  what the buttons of a turn do */
  constructor(element, latest, acts) {
    this.element = element;
    this.latest = latest;
    this.acts = acts;
    this.articles = new Map();
    this.atEnd = true;
    addEventListener("scroll", () => this.look(), { passive: true });
    latest.addEventListener("click", () => this.toEnd());
  }

  /** Show these turns and no others. */
  set(turns) {
    this.articles.clear();
    this.element.replaceChildren();
    for (const turn of turns) this.add(turn);
    this.toEnd();
  }

  add(turn) {
    const article = make(`article.turn.${turn.role}`, { data: { id: turn.id } });
    this.articles.set(turn.id, article);
    this.element.append(article);
    this.draw(turn);
  }

  /** Show a turn anew. */
  draw(turn) {
    const article = this.articles.get(turn.id);
    article.replaceChildren(...(turn.role === "user" ? this.question(turn) : this.answer(turn)));
    if (turn.role === "assistant") this.element.setAttribute("aria-busy", String(!turn.finish));
    this.follow();
  }

  /** Show what an answer has become, while it comes. */
  grow(turn) {
    const answer = this.articles.get(turn.id).querySelector(".answer");
    if (!answer.classList.contains("streaming")) answer.replaceChildren();
    answer.classList.add("streaming");
    show(answer, turn.text.trimStart());
    this.follow();
  }

  /** Mark what an edited question will replace; nothing, without an id. */
  fade(id) {
    let behind = false;
    for (const [known, article] of this.articles) {
      behind ||= known === id;
      article.classList.toggle("replaced", behind);
    }
  }

  question(turn) {
    const media = turn.media.map(player);
    return [
      make("h2.sr", {}, "You"),
      media.length ? make("ul.media", { aria: { label: "With it" } }, ...media) : null,
      turn.text ? make("div.said", { dir: "auto" }, turn.text) : null,
      make(
        "div.acts",
        {},
        act("edit", "Edit this question", () => this.acts.edit(turn)),
        turn.text ? act("copy", "Copy this question", (event) => this.copied(event, turn)) : null,
      ),
    ].filter(Boolean);
  }

  answer(turn) {
    const answer = make("div.answer");
    show(answer, turn.text.trimStart());
    if (!turn.finish && !turn.text) answer.append(waiting());
    return [
      make("h2.sr", {}, "Answer"),
      answer,
      turn.fault ? this.fault(turn) : null,
      remark(turn) ? make("p.aside", {}, remark(turn)) : null,
      turn.finish ? this.below(turn) : null,
    ].filter(Boolean);
  }

  below(turn) {
    const again = act("again", turn.fault ? "Try again" : "Answer again", () => this.acts.again(turn));
    if (turn.fault) again.append("Try again");
    const acts = make(
      "div.acts",
      {},
      turn.text ? act("copy", "Copy the answer", (event) => this.copied(event, turn)) : null,
      again,
    );
    const found = costs(turn.usage, turn.times).map(({ kind, text }) =>
      make("li", {}, kind ? make(`span.dot.${kind}`) : null, text),
    );
    return make("div.below", {}, acts, found.length ? make("ul.figures", { aria: { label: "What it took" } }, ...found) : null);
  }

  fault(turn) {
    const { title, detail, status } = turn.fault;
    const key = status === 401 ? make("button.text", { type: "button", on: { click: this.acts.key } }, "Enter the key") : null;
    return make("div.fault", { role: "alert" }, make("b", {}, title), detail, key);
  }

  async copied(event, turn) {
    const button = event.currentTarget;
    if (!(await this.acts.copy(turn.text.trim()))) return;
    button.replaceChildren(icon("done"));
    setTimeout(() => button.replaceChildren(icon("copy")), 1500);
  }

  look() {
    const page = document.scrollingElement;
    this.atEnd = page.scrollHeight - page.scrollTop - page.clientHeight < NEAR_PX;
    this.latest.hidden = this.atEnd;
  }

  follow() {
    if (this.atEnd) this.toEnd();
    else this.look();
  }

  toEnd() {
    const page = document.scrollingElement;
    page.scrollTop = page.scrollHeight;
    this.look();
  }
}

function waiting() {
  const bars = make("i", { aria: { hidden: "true" } }, ...Array.from({ length: 5 }, () => make("b")));
  return make("p.waiting", {}, bars, "Looking and listening");
}

/** What is to be said about how an answer ended. */
function remark(turn) {
  if (turn.finish === "length") return "The longest answer of the settings was reached.";
  if (turn.finish === "stopped") return turn.text ? "Stopped." : "Stopped before a word. The model will not be told of this question.";
  if (turn.finish === "failed" && turn.text) return "What had come stays.";
  if (turn.finish === "stop" && !turn.text.trim()) return "The model said nothing.";
  return "";
}
