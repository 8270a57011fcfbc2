// Answers as they are meant to be read: paragraphs, lists, headings, code. What is not one of these stays as it is
// written. Links are never made of what a model says.

import { make } from "./dom.js";

const FENCE = /^\s*(```|~~~)/;
const HEADING = /^(#{1,6})\s+(.*)$/;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])\s+(.*)$/;
const SPANS = /(`+)(?<code>[^`]+)\1|\*\*(?=\S)(?<strong>.+?\S?)\*\*|(?<![\w*])\*(?=[^\s*])(?<slanted>[^*\n]*?[^\s*])\*(?![\w*])/gu;

/**
 * Show a text in an element; only blocks that changed since the last call are made anew, so a stream is steady.
 * @param {HTMLElement} element
 * @param {string} text
 */
export function show(element, text) {
  const found = blocks(text);
  const shown = element.shown ?? [];
  let same = 0;
  while (same < shown.length && shown[same] === found[same]?.source) same++;
  while (element.children.length > same) element.lastChild.remove();
  element.append(...found.slice(same).map(drawn));
  element.shown = found.map((block) => block.source);
}

/** The blocks of a text. `source` tells a block from another one. */
export function blocks(text) {
  const lines = text.split("\n");
  const found = [];
  let i = 0;
  const take = (kind, more) => {
    const from = i++;
    while (i < lines.length && more(lines[i])) i++;
    found.push({ kind, lines: lines.slice(from, i), source: `${kind}:${lines.slice(from, i).join("\n")}` });
  };
  while (i < lines.length) {
    const line = lines[i];
    if (!line.trim()) i++;
    else if (FENCE.test(line)) {
      let open = true;
      take("code", (next) => open && ((open = !FENCE.test(next)) || true));
    } else if (HEADING.test(line)) take("heading", () => false);
    else if (ITEM.test(line)) take("list", (next) => ITEM.test(next) || /^\s+\S/.test(next));
    else take("text", (next) => next.trim() && !FENCE.test(next) && !HEADING.test(next) && !ITEM.test(next));
  }
  return found;
}

function drawn({ kind, lines }) {
  if (kind === "code") {
    const closed = lines.length > 1 && FENCE.test(lines.at(-1));
    return make("pre", { tabIndex: 0 }, make("code", {}, lines.slice(1, closed ? -1 : undefined).join("\n")));
  }
  if (kind === "heading") return make("h3", { dir: "auto" }, ...spans(HEADING.exec(lines[0])[2]));
  if (kind === "list") return list(lines);
  return make("p", { dir: "auto" }, ...spans(lines.join("\n")));
}

/** A list; items that are indented are lists within the item before them. */
function list(lines) {
  const first = ITEM.exec(lines[0]);
  const top = /\d/.test(first[2]) ? make("ol", { start: Number.parseInt(first[2], 10) }) : make("ul");
  for (let i = 0; i < lines.length; ) {
    const words = [ITEM.exec(lines[i])?.[3] ?? lines[i].trim()];
    const inner = [];
    for (i++; i < lines.length; i++) {
      const item = ITEM.exec(lines[i]);
      if (item && item[1].length <= first[1].length) break;
      if (item || inner.length) inner.push(lines[i]);
      else words.push(lines[i].trim());
    }
    top.append(make("li", { dir: "auto" }, ...spans(words.join("\n")), inner.length ? list(inner) : null));
  }
  return top;
}

function spans(text) {
  const found = [];
  let from = 0;
  for (const match of text.matchAll(SPANS)) {
    found.push(text.slice(from, match.index));
    const { code, strong, slanted } = match.groups;
    found.push(code ? make("code", {}, code) : make(strong ? "strong" : "em", {}, strong ?? slanted));
    from = match.index + match[0].length;
  }
  return [...found, text.slice(from)];
}
