// Talking with the model: a strip that says what it does, and the words of the conversation as they come.

import { look, still } from "./camera.js";
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

const WIDTH = 640; // of what it sees
const QUALITY = 0.85;

export class Talk {
  /** @param {{key: () => string, failed: (fault: Fault) => void}} acts */
  constructor(acts) {
    this.acts = acts;
    this.dialog = byId("talk-dialog");
    this.words = byId("talk-words");
    this.view = byId("talk-view");
    byId("talk-hush").addEventListener("click", () => this.hearing?.hush());
    byId("talk-see").addEventListener("click", () => (this.unsee ? this.shut() : this.see()));
    this.dialog.addEventListener("close", () => {
      this.shut();
      this.hearing?.end();
    });
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

  /** Let it see what the camera sees, from now on. */
  async see() {
    const { hearing } = this;
    try {
      const end = await look(this.view, WIDTH);
      if (this.hearing !== hearing || !this.dialog.open || this.unsee) return end();
      this.unsee = end;
    } catch (fault) {
      return this.wrong(`${fault.title}. ${fault.detail}`);
    }
    this.seen(true);
  }

  shut() {
    if (!this.unsee) return;
    this.unsee();
    this.unsee = null;
    this.hearing?.send({ type: "image" });
    this.seen(false);
  }

  seen(on) {
    this.view.hidden = !on;
    byId("talk-see").setAttribute("aria-pressed", String(on));
  }

  /** What stands before the camera when somebody begins to speak is what is spoken about. */
  show() {
    const canvas = this.unsee && still(this.view);
    if (canvas) this.hearing.send({ type: "image", url: canvas.toDataURL("image/jpeg", QUALITY) });
  }

  heard() {
    this.state("heard");
    this.show();
  }

  wrong(words) {
    this.words.append(make("p.wrong", { role: "alert" }, words));
  }

  take(event) {
    const { number, text } = event;
    if (event.event === "heard") this.heard();
    else if (event.event === "state") this.state(event.state);
    else if (event.event === "answer_begins") this.begin(number);
    else if (event.event === "piece") this.grow(number, text);
    else if (event.event === "interrupted") this.finish(number, "Interrupted");
    else if (event.event === "answer_ends") this.finish(number, "");
    else if (event.event === "gated" && !event.kept) this.state("listening");
    else if (event.event === "error") this.wrong(event.message);
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
