// Numbers as people read them.

export const KINDS = { image: "picture", audio: "sound", video: "video" };

const whole = new Intl.NumberFormat("en");

export const count = (number, noun) => `${whole.format(number)} ${noun}${number === 1 ? "" : "s"}`;

/** 0.21 s, 3.4 s, 75 s */
export function seconds(value) {
  return `${value < 1 ? value.toFixed(2) : value < 10 ? value.toFixed(1) : Math.round(value)} s`;
}

/** 0:07, 12:30 */
export function clock(value) {
  const all = Math.floor(value);
  return `${Math.floor(all / 60)}:${String(all % 60).padStart(2, "0")}`;
}

/** 512 B, 14 kB, 3.1 MB */
export function bytes(value) {
  if (value < 1000) return `${value} B`;
  if (value < 1e6) return `${Math.round(value / 1e3)} kB`;
  return `${(value / 1e6).toFixed(value < 1e7 ? 1 : 0)} MB`;
}

/**
 * What an answer cost: tokens that were read, by medium, and how fast it was written.
 * @returns {{kind: string, text: string}[]}
 */
export function costs(usage, times) {
  const found = [];
  const details = usage?.prompt_tokens_details ?? {};
  let words = usage?.prompt_tokens ?? 0; // what is not of a medium
  for (const [kind, noun] of Object.entries(KINDS)) {
    const tokens = details[`${kind}_tokens`] ?? 0;
    words -= tokens;
    if (tokens) found.push({ kind, text: `${noun} ${whole.format(tokens)}` });
  }
  words = details.text_tokens ?? words;
  if (words > 0) found.push({ kind: "words", text: `words ${whole.format(words)}` });
  if (details.cached_tokens) found.push({ kind: "", text: `remembered ${whole.format(details.cached_tokens)}` });
  if (usage?.completion_tokens !== undefined) found.push({ kind: "", text: count(usage.completion_tokens, "token") });
  const pace = speed(usage, times);
  if (pace) found.push({ kind: "", text: `${pace} tokens/s` });
  if (times?.first) found.push({ kind: "", text: `first after ${seconds(times.first)}` });
  return found;
}

/** Tokens a second behind the first one, whose time is told by itself; "" where there is nothing to measure. */
function speed(usage, times) {
  const tokens = (usage?.completion_tokens ?? 0) - 1;
  const took = (times?.last ?? 0) - (times?.first ?? 0);
  if (tokens < 3 || took < 0.02) return ""; // too little to be a speed
  const found = tokens / took;
  return found < 100 ? found.toFixed(1) : whole.format(Math.round(found));
}
