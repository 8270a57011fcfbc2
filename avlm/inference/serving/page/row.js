// The conversation as a row of JSON that `avlm data check` and training read; media are in it, as data URLs.

import { message } from "./conversation.js";
import { dataUrl } from "./media.js";

const part = async (medium) => ({ type: medium.kind, path: await dataUrl(medium) });

/** @returns {Promise<string>} one line */
export async function row(id, conversation, instructions) {
  const said = await Promise.all(conversation.pairs().flat().map((turn) => message(turn, part)));
  const before = instructions ? [{ role: "system", content: instructions }] : [];
  return `${JSON.stringify({ id, messages: [...before, ...said] })}\n`;
}

/** Give the user a file. */
export function download(name, text) {
  const url = URL.createObjectURL(new Blob([text], { type: "application/jsonl" }));
  const link = document.createElement("a");
  link.href = url;
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(url), 60000);
}
