// A recording: from the microphone to a WAV file of 16 kHz, which every model that hears can read.

import { Fault } from "./faults.js";
import { resampled, wav } from "./wav.js";

const RATE = 16000;
export const LONGEST_S = 600;

/** Why a browser gave no camera or microphone, in words. */
export function denied(error, what) {
  if (!navigator.mediaDevices?.getUserMedia) {
    return new Fault(`The browser gives this page no ${what}`, "It does so at localhost and over https only. Open the page there, or add a file.");
  }
  const reasons = {
    NotAllowedError: `Allow the ${what} for this page in the browser's settings, or add a file.`,
    NotFoundError: `There is no ${what} here. Add a file.`,
    NotReadableError: `Another program is using the ${what}. Close it and try again, or add a file.`,
  };
  return new Fault(`The browser gives this page no ${what}`, reasons[error?.name] ?? "Add a file.");
}

export class Recording {
  /** @param {(level: number, seconds: number) => void} heard  how loud it was (0..1) and how long it is by now */
  static async begin(heard) {
    let stream;
    let context;
    try {
      stream = await navigator.mediaDevices.getUserMedia({ audio: { channelCount: 1 } });
      context = new AudioContext();
      await context.audioWorklet.addModule(new URL("listener.js", import.meta.url));
      await context.resume();
    } catch (error) {
      stream?.getTracks().forEach((track) => track.stop());
      context?.close();
      throw denied(error, "microphone");
    }
    return new Recording(stream, context, heard);
  }

  constructor(stream, context, heard) {
    this.stream = stream;
    this.context = context;
    this.chunks = [];
    this.length = 0;
    this.listener = new AudioWorkletNode(context, "listener", { numberOfOutputs: 0, processorOptions: { samples: 2048 } });
    this.whole = new Promise((resolve) => {
      this.listener.port.onmessage = ({ data: { samples, last } }) => {
        this.chunks.push(samples);
        this.length += samples.length;
        heard(Math.hypot(...samples) / Math.sqrt(samples.length || 1), this.length / context.sampleRate);
        if (last) resolve();
      };
    });
    context.createMediaStreamSource(stream).connect(this.listener);
  }

  /** End it. @returns {Promise<File>} */
  async keep() {
    this.listener.port.postMessage("end");
    await this.whole;
    const samples = new Float32Array(this.length);
    let filled = 0;
    for (const chunk of this.chunks) {
      samples.set(chunk, filled);
      filled += chunk.length;
    }
    const rate = this.context.sampleRate;
    this.discard();
    if (!this.length) throw new Fault("Nothing was heard", "Record for a little longer.");
    return new File([wav(await resampled(samples, rate, RATE), RATE)], "recording.wav", { type: "audio/wav" });
  }

  discard() {
    this.stream.getTracks().forEach((track) => track.stop());
    this.context.close();
  }
}
