// The strip in the composer while the microphone listens: how loud, how long, keep or discard.

import { byId } from "./dom.js";
import { clock } from "./figures.js";
import { LONGEST_S, Recording } from "./microphone.js";

const BAR_PX = 3;
const STEP_PX = 5;

export class Recorder {
  /** @param {{kept: (file: File) => Promise, failed: (fault: Fault) => void, ended: () => void}} acts */
  constructor({ kept, failed, ended }) {
    this.kept = kept;
    this.failed = failed;
    this.ended = ended;
    this.recording = null;
    byId("keep").addEventListener("click", () => this.end(true));
    byId("discard").addEventListener("click", () => this.end(false));
  }

  get on() {
    return this.recording !== null;
  }

  async toggle() {
    if (this.on) return this.end(true);
    this.levels = [];
    try {
      this.recording = await Recording.begin((level, seconds) => this.heard(level, seconds));
    } catch (fault) {
      return this.failed(fault);
    }
    this.heard(0, 0);
    this.seen(true);
    byId("keep").focus();
  }

  async end(keep) {
    const recording = this.recording;
    if (!recording) return;
    this.recording = null;
    this.seen(false);
    this.ended();
    if (!keep) return recording.discard();
    try {
      await this.kept(await recording.keep());
    } catch (fault) {
      this.failed(fault);
    }
  }

  seen(on) {
    byId("recording").hidden = !on;
    const button = byId("microphone");
    button.setAttribute("aria-pressed", String(on));
    button.title = on ? "End the recording" : "Record a sound";
  }

  heard(level, seconds) {
    byId("recorded").textContent = clock(seconds);
    this.levels.push(level);
    draw(byId("meter"), this.levels);
    if (seconds >= LONGEST_S) this.end(true);
  }
}

function draw(canvas, levels) {
  const scale = devicePixelRatio;
  const [width, height] = [canvas.clientWidth * scale, canvas.clientHeight * scale];
  Object.assign(canvas, { width, height });
  const pen = canvas.getContext("2d");
  pen.fillStyle = getComputedStyle(canvas).color;
  const shown = levels.slice(-Math.floor(width / (STEP_PX * scale)));
  shown.forEach((level, i) => {
    const tall = Math.max(2 * scale, Math.min(1, 5 * level) * height);
    pen.beginPath();
    pen.roundRect(i * STEP_PX * scale, (height - tall) / 2, BAR_PX * scale, tall, BAR_PX);
    pen.fill();
  });
}
