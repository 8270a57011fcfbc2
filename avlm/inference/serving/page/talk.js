// Talking with the model: a strip that says what it does, and the words of the conversation as they come.

import { byId, make } from "./dom.js";
import { Hearing } from "./hearing.js";
import { show } from "./prose.js";

const STATES = {
  listening: "Listening",
  heard: "Somebody speaks",
  noise: "That was not for it",
  question: "That was for it",
  typed: "Reading",
  answering: "Answering",
};

export class Talk {
  /** @param {{key: () => string, failed: (fault: Fault) => void}} acts */
  constructor(acts) {
    this.acts = acts;
    this.dialog = byId("talk-dialog");
    this.words = byId("talk-words");
    byId("talk-hush").addEventListener("click", () => this.hearing?.hush());
    this.dialog.addEventListener("close", () => this.hearing?.end());
  }

  async open() {
    this.answers = new Map();
    this.words.replaceChildren();
    this.state("listening");
    try {
      this.hearing = await Hearing.begin(this.acts.key(), {
        event: (event) => this.take(event),
        level: (level) => byId("talk-level").style.setProperty("--level", Math.min(1, 5 * level).toFixed(2)),
        over: (fault) => this.over(fault),
      });
      this.dialog.showModal();
    } catch (fault) {
      this.acts.failed(fault);
    }
  }

  over(fault) {
    this.hearing = null;
    if (this.dialog.open) this.dialog.close();
    if (fault) this.acts.failed(fault);
  }

  take(event) {
    const { number, text } = event;
    if (event.event === "heard") this.state("heard");
    else if (event.event === "state") this.state(event.state);
    else if (event.event === "answer_begins") this.begin(number);
    else if (event.event === "piece") this.grow(number, text);
    else if (event.event === "interrupted") this.finish(number, "Interrupted");
    else if (event.event === "answer_ends") this.finish(number, "");
    else if (event.event === "gated" && !event.kept) this.state("listening");
    else if (event.event === "error") this.words.append(make("p.wrong", { role: "alert" }, event.message));
  }

  begin(number) {
    this.state("answering");
    byId("talk-hush").disabled = false;
    this.words.setAttribute("aria-busy", "true");
    const answer = make("div.answer.streaming");
    this.answers.set(number, { answer, text: "" });
    this.words.append(answer);
  }

  grow(number, text) {
    const known = this.answers.get(number);
    if (!known) return;
    known.text += text;
    show(known.answer, known.text.trimStart());
    this.words.scrollTop = this.words.scrollHeight;
  }

  finish(number, remark) {
    this.answers.get(number)?.answer.classList.remove("streaming");
    if (remark) this.words.append(make("p.aside", {}, remark));
    this.words.setAttribute("aria-busy", "false");
    byId("talk-hush").disabled = true;
    this.state("listening");
  }

  state(name) {
    byId("talk-state").textContent = STATES[name];
    this.dialog.dataset.state = name;
  }
}
