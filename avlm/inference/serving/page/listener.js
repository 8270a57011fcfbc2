// Runs beside the page, in the thread of the sound: hands on what the microphone hears, some samples at a time.

class Listener extends AudioWorkletProcessor {
  constructor({ processorOptions }) {
    super();
    this.held = new Float32Array(processorOptions.samples);
    this.filled = 0;
    this.port.onmessage = () => {
      this.port.postMessage({ samples: this.held.slice(0, this.filled), last: true });
      this.over = true;
    };
  }

  process([channels]) {
    const heard = channels[0];
    if (heard) {
      for (const sample of heard) {
        this.held[this.filled++] = sample;
        if (this.filled === this.held.length) {
          this.port.postMessage({ samples: this.held.slice(), last: false });
          this.filled = 0;
        }
      }
    }
    return !this.over;
  }
}

registerProcessor("listener", Listener);
