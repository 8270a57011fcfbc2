// A medium of a question, to look at or to play.

import { byId, make } from "./dom.js";
import { bytes, clock, KINDS, seconds } from "./figures.js";
import { address } from "./media.js";

const SMALL_PX = 96;

/** A medium as an item of a list. */
export function player(medium) {
  const label = `${KINDS[medium.kind]} ${medium.name}`;
  if (medium.kind === "image") return make("li.medium.image", {}, picture(medium, label));
  const set = { src: address(medium), controls: true, preload: "metadata", aria: { label } };
  if (medium.kind === "audio") return make("li.medium.audio", {}, caption(medium), make("audio", set));
  return make("li.medium.video", {}, make("video", { ...set, playsInline: true }), caption(medium));
}

/** What it is in figures: its size in pixels, or its length. */
export function measure(medium) {
  if (medium.kind === "image") return medium.width ? `${medium.width} × ${medium.height}` : bytes(medium.blob.size);
  if (!medium.seconds) return bytes(medium.blob.size);
  return medium.seconds < 10 ? seconds(medium.seconds) : clock(medium.seconds);
}

function picture(medium, label) {
  const small = medium.width && Math.max(medium.width, medium.height) <= SMALL_PX;
  const image = make(small ? "img.small-picture" : "img", { src: address(medium), alt: medium.name });
  if (!small && medium.width) Object.assign(image, { width: medium.width, height: medium.height });
  return make("button.look", { type: "button", aria: { label: `Look at the ${label}` }, on: { click: () => look(medium) } }, image);
}

function look(medium) {
  const dialog = byId("viewer");
  Object.assign(byId("viewed"), { src: address(medium), alt: medium.name });
  dialog.onclick = (event) => event.target === dialog && dialog.close();
  dialog.showModal();
}

function caption(medium) {
  return make("div.name", {}, make(`span.dot.${medium.kind}`), make("b", {}, medium.name), make("span", {}, measure(medium)));
}
