// What the user chose, kept in this browser; the key only as long as the tab.

import { byId } from "./dom.js";

const PLACE = "avlm.settings";
const KEY = "avlm.key";
const DEFAULTS = { maxTokens: 512, temperature: 0, instructions: "", theme: "auto", model: "" };

function read() {
  try {
    return { ...DEFAULTS, ...JSON.parse(localStorage.getItem(PLACE) ?? "{}") };
  } catch {
    return { ...DEFAULTS }; // what lies there is not ours, or the browser keeps nothing
  }
}

export class Settings {
  constructor(changed) {
    Object.assign(this, read());
    try {
      this.key = sessionStorage.getItem(KEY) ?? "";
    } catch {
      this.key = "";
    }
    this.dialog = byId("settings");
    this.changed = changed;
    this.paint();
    byId("settings-form").addEventListener("submit", () => this.take());
  }

  /** @param {string} note  why it was opened, if the user did not */
  open(note = "") {
    byId("settings-note").textContent = note;
    byId("max-tokens").value = this.maxTokens;
    byId("temperature").value = this.temperature;
    byId("instructions").value = this.instructions;
    byId("key").value = this.key;
    byId("theme").value = this.theme;
    this.dialog.showModal();
    if (note) byId("key").focus();
  }

  take() {
    this.maxTokens = byId("max-tokens").valueAsNumber;
    this.temperature = byId("temperature").valueAsNumber;
    this.instructions = byId("instructions").value.trim();
    this.theme = byId("theme").value;
    this.key = byId("key").value.trim();
    this.save();
    this.paint();
    this.changed();
  }

  save() {
    const { maxTokens, temperature, instructions, theme, model } = this;
    try {
      localStorage.setItem(PLACE, JSON.stringify({ maxTokens, temperature, instructions, theme, model }));
      sessionStorage.setItem(KEY, this.key);
    } catch {
      // a browser that keeps nothing: they hold until the page is left
    }
  }

  paint() {
    if (this.theme === "auto") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = this.theme;
  }
}
