// Where a turn is written: its words and media, from the keyboard, files, the clipboard, the camera, the microphone.

import { snapshot } from "./camera.js";
import { byId, icon, make } from "./dom.js";
import { KINDS } from "./figures.js";
import { address, mediumOf } from "./media.js";
import { measure } from "./player.js";
import { Recorder } from "./recorder.js";

const TOUCH = matchMedia("(hover: none) and (pointer: coarse)");

export class Composer {
  /** @param {{send, stop, fault, recall}} acts */
  constructor(acts) {
    this.acts = acts;
    this.media = [];
    this.busy = false;
    this.question = byId("question");
    this.recorder = new Recorder({ kept: (file) => this.add([file]), failed: acts.fault, ended: () => this.focus() });
    this.listen();
    this.paint();
  }

  get text() {
    return this.question.value.trim();
  }

  get empty() {
    return !this.text && !this.media.length;
  }

  /** Put a turn here, to be changed. */
  fill({ text = "", media = [] } = {}) {
    this.question.value = text;
    this.media = [...media];
    this.paint();
  }

  /** Be ready for words; not where that would raise a keyboard over half of the screen. */
  focus() {
    if (!TOUCH.matches) this.question.focus({ preventScroll: true });
  }

  setBusy(busy) {
    this.busy = busy;
    this.paint();
  }

  async add(files) {
    for (const file of files) {
      try {
        this.media.push(await mediumOf(file));
      } catch (fault) {
        this.acts.fault(fault);
      }
    }
    this.paint();
    this.focus();
  }

  choose() {
    byId("files").click();
  }

  async shoot() {
    try {
      const file = await snapshot();
      if (file) await this.add([file]);
    } catch (fault) {
      this.acts.fault(fault);
    }
  }

  record() {
    return this.recorder.toggle();
  }

  async send() {
    if (this.recorder.on) await this.recorder.end(true);
    if (this.busy || this.empty) return;
    const said = { text: this.text, media: this.media };
    this.fill();
    this.acts.send(said);
  }

  listen() {
    byId("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      if (this.busy) this.acts.stop();
      else this.send();
    });
    byId("add").addEventListener("click", () => this.choose());
    byId("camera").addEventListener("click", () => this.shoot());
    byId("microphone").addEventListener("click", () => this.record());
    byId("files").addEventListener("change", ({ target }) => {
      this.add([...target.files]);
      target.value = "";
    });
    this.question.addEventListener("input", () => this.paint());
    this.question.addEventListener("keydown", (event) => this.typed(event));
    addEventListener("paste", (event) => {
      const files = [...(event.clipboardData?.files ?? [])];
      if (!files.length || document.querySelector("dialog[open]")) return;
      event.preventDefault();
      this.add(files);
    });
    this.takeDrops();
  }

  typed(event) {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing && !TOUCH.matches) {
      event.preventDefault();
      this.send();
    } else if (event.key === "ArrowUp" && this.empty) {
      event.preventDefault();
      this.acts.recall();
    }
  }

  takeDrops() {
    let depth = 0;
    const over = (by) => {
      depth = by ? Math.max(0, depth + by) : 0;
      byId("drop").classList.toggle("over", depth > 0);
    };
    const holdsFiles = (event) => event.dataTransfer?.types.includes("Files");
    addEventListener("dragenter", (event) => holdsFiles(event) && over(1));
    addEventListener("dragleave", (event) => holdsFiles(event) && over(-1));
    addEventListener("dragover", (event) => holdsFiles(event) && event.preventDefault());
    addEventListener("drop", (event) => {
      if (!holdsFiles(event)) return;
      event.preventDefault();
      over(0);
      this.add([...event.dataTransfer.files]);
    });
  }

  paint() {
    const tray = byId("tray");
    tray.hidden = !this.media.length;
    tray.replaceChildren(...this.media.map((medium) => this.piece(medium)));
    const send = byId("send");
    const label = this.busy ? "Stop" : "Send";
    send.setAttribute("aria-label", label);
    send.title = label;
    send.disabled = !this.busy && this.empty;
    byId("send-icon").setAttribute("href", this.busy ? "#i-stop" : "#i-send");
    if (!CSS.supports("field-sizing", "content")) {
      this.question.style.height = "auto";
      this.question.style.height = `${this.question.scrollHeight}px`;
    }
  }

  piece(medium) {
    const seen = medium.kind !== "audio";
    const view = medium.kind === "image" ? make("img", { src: address(medium), alt: "" }) : make("video", { src: address(medium), muted: true, preload: "metadata", tabIndex: -1, aria: { hidden: "true" } });
    const remove = make(
      "button",
      { type: "button", title: "Remove", aria: { label: `Remove the ${KINDS[medium.kind]} ${medium.name}` }, on: { click: () => this.remove(medium) } },
      icon("close"),
    );
    const words = make("p", {}, make("b", {}, medium.name), make("span", {}, `${KINDS[medium.kind]}, ${measure(medium)}`));
    return make(seen ? "li.piece.seen" : "li.piece", {}, seen ? view : icon("sound"), words, remove);
  }

  remove(medium) {
    this.media = this.media.filter((known) => known !== medium);
    this.paint();
    this.focus();
  }
}
