// Runs beside the page's own thread: hands on what the microphone takes up, 20 ms at a time, at 16 kHz.
class Ear extends AudioWorkletProcessor {
  constructor() {
    super();
    this.step = sampleRate / 16000;
    this.at = 0; // where the next sample lies, in samples of the microphone behind `last`
    this.last = 0;
    this.frame = new Int16Array(320);
    this.filled = 0;
  }

  process(inputs) {
    const taken = inputs[0][0];
    if (!taken) return true;
    // Between two samples the line that joins them; the browser has filtered what a microphone takes up already.
    while (this.at < taken.length) {
      const whole = Math.floor(this.at);
      const before = whole === 0 ? this.last : taken[whole - 1];
      const value = before + (taken[whole] - before) * (this.at - whole);
      this.frame[this.filled++] = Math.max(-32768, Math.min(32767, Math.round(value * 32768)));
      if (this.filled === this.frame.length) {
        this.port.postMessage(this.frame.slice().buffer);
        this.filled = 0;
      }
      this.at += this.step;
    }
    this.at -= taken.length;
    this.last = taken[taken.length - 1];
    return true;
  }
}

registerProcessor("avlm-ear", Ear);
