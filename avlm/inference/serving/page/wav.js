// Sound as a WAV file: 16 bits, one channel (http://soundfile.sapp.org/doc/WaveFormat/).

const HEADER = 44;

/**
 * @param {Float32Array} samples  -1..1
 * @param {number} rate  in Hz
 * @returns {Blob}
 */
export function wav(samples, rate) {
  const view = new DataView(new ArrayBuffer(HEADER + 2 * samples.length));
  const tag = (offset, text) => [...text].forEach((letter, i) => view.setUint8(offset + i, letter.charCodeAt(0)));
  tag(0, "RIFF");
  view.setUint32(4, HEADER - 8 + 2 * samples.length, true);
  tag(8, "WAVEfmt ");
  view.setUint32(16, 16, true);
  view.setUint16(20, 1, true);
  view.setUint16(22, 1, true);
  view.setUint32(24, rate, true);
  view.setUint32(28, 2 * rate, true);
  view.setUint16(32, 2, true);
  view.setUint16(34, 16, true);
  tag(36, "data");
  view.setUint32(40, 2 * samples.length, true);
  samples.forEach((sample, i) => view.setInt16(HEADER + 2 * i, Math.round(32767 * Math.max(-1, Math.min(1, sample))), true));
  return new Blob([view], { type: "audio/wav" });
}

/** The same sound at another rate, by the browser's own resampling. */
export async function resampled(samples, rate, wanted) {
  if (rate === wanted || !samples.length) return samples;
  const context = new OfflineAudioContext(1, Math.ceil((samples.length * wanted) / rate), wanted);
  const buffer = context.createBuffer(1, samples.length, rate);
  buffer.copyToChannel(samples, 0);
  const source = context.createBufferSource();
  source.buffer = buffer;
  source.connect(context.destination);
  source.start();
  return (await context.startRendering()).getChannelData(0);
}
