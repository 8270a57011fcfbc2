// A conversation by voice: what the microphone hears goes to the server as it is heard, what the server says comes back.

import { Fault, gone } from "./faults.js";
import { denied } from "./microphone.js";

const RATE = 16000;
const PIECE = 512; // samples sent at once: 32 ms

/** Spoken answers, one piece behind the other, until they are stopped. */
class Speaker {
  constructor(context, played) {
    this.context = context;
    this.played = played;
    this.until = 0;
    this.sources = new Set();
  }

  say(samples) {
    const buffer = this.context.createBuffer(1, samples.length, RATE);
    buffer.copyToChannel(samples, 0);
    const source = this.context.createBufferSource();
    source.buffer = buffer;
    source.connect(this.context.destination);
    this.until = Math.max(this.until, this.context.currentTime);
    source.start(this.until);
    this.until += buffer.duration;
    this.sources.add(source);
    source.onended = () => {
      this.sources.delete(source);
      if (!this.sources.size) this.played();
    };
  }

  hush() {
    for (const source of this.sources) {
      source.onended = null;
      source.stop();
    }
    this.sources.clear();
    this.until = 0;
  }
}

export class Hearing {
  /**
   * @param {{event: (event: object) => void, level: (level: number) => void, over: (fault: Fault|null) => void}} acts
   */
  static async begin(key, acts) {
    let stream;
    let context;
    try {
      stream = await navigator.mediaDevices.getUserMedia({ audio: { channelCount: 1, echoCancellation: true } });
      context = new AudioContext({ sampleRate: RATE });
      await context.audioWorklet.addModule(new URL("listener.js", import.meta.url));
      await context.resume();
    } catch (error) {
      stream?.getTracks().forEach((track) => track.stop());
      context?.close();
      throw denied(error, "microphone");
    }
    return new Hearing(stream, context, key, acts);
  }

  constructor(stream, context, key, acts) {
    this.stream = stream;
    this.context = context;
    this.acts = acts;
    this.speaker = new Speaker(context, () => this.send({ type: "played" }));
    const at = new URL("v1/live", document.baseURI);
    at.protocol = at.protocol.replace("http", "ws");
    this.socket = this.reach(at, ["avlm-live", ...(key ? [`avlm-key.${key}`] : [])]);
    this.socket.binaryType = "arraybuffer";
    this.socket.onmessage = ({ data }) => this.take(data);
    this.socket.onopen = () => this.listen();
    this.socket.onclose = () => this.end(this.opened ? null : gone());
  }

  reach(at, protocols) {
    try {
      return new WebSocket(at, protocols);
    } catch {
      this.release();
      throw new Fault("The key cannot be sent when talking", "Browsers send letters, digits, - and _ there. Give the server such a key.");
    }
  }

  listen() {
    this.opened = true;
    this.listener = new AudioWorkletNode(this.context, "listener", { numberOfOutputs: 0, processorOptions: { samples: PIECE } });
    this.listener.port.onmessage = ({ data: { samples } }) => {
      this.acts.level(Math.hypot(...samples) / Math.sqrt(samples.length || 1));
      if (this.socket.readyState === WebSocket.OPEN) this.socket.send(pcm(samples));
    };
    this.context.createMediaStreamSource(this.stream).connect(this.listener);
  }

  take(data) {
    if (typeof data !== "string") return this.speaker.say(waves(data));
    const event = JSON.parse(data);
    if (event.event === "interrupted") this.speaker.hush();
    this.acts.event(event);
  }

  send(message) {
    if (this.socket.readyState === WebSocket.OPEN) this.socket.send(JSON.stringify(message));
  }

  /** No more of this answer. */
  hush() {
    this.speaker.hush();
    this.send({ type: "stop" });
  }

  end(fault = null) {
    if (this.ended) return;
    this.ended = true;
    this.speaker.hush();
    this.release();
    this.socket.close();
    this.acts.over(fault);
  }

  release() {
    this.stream.getTracks().forEach((track) => track.stop());
    this.context.close();
  }
}

/** Samples as 16 bits, little-endian, as the server takes them. */
function pcm(samples) {
  const view = new DataView(new ArrayBuffer(2 * samples.length));
  samples.forEach((sample, i) => view.setInt16(2 * i, Math.round(32767 * Math.max(-1, Math.min(1, sample))), true));
  return view;
}

function waves(data) {
  const view = new DataView(data);
  return Float32Array.from({ length: data.byteLength >> 1 }, (_, i) => view.getInt16(2 * i, true) / 32768);
}
