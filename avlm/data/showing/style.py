"""How a page of samples looks, and the few lines of JavaScript by which it is searched."""

from __future__ import annotations

from avlm.data.showing.page import PAGE_STYLE

STYLE = (
    PAGE_STYLE
    + """
:root { --image: #bfe3c6; --audio: #f6d9a8; --video: #d9cdf5; --learned: #b9d8f7; --given: transparent; }
@media (prefers-color-scheme: dark) { :root { --image: #1f4d2b; --audio: #5a420f; --video: #40306f;
  --learned: #17446f; } }
body { padding-top: 1.25rem; }
.tools { position: sticky; top: 0; z-index: 2; background: var(--paper); padding: 0.625rem 0; margin-top: 1rem;
  border-bottom: 1px solid var(--rule); display: flex; flex-wrap: wrap; gap: 0.5rem 0.875rem; align-items: center; }
.tools input[type=search] { flex: 1 1 12rem; min-width: 0; }
input[type=search], select { font: inherit; color: inherit; background: var(--soft); border: 1px solid var(--rule);
  border-radius: 0.375rem; padding: 0.3125rem 0.5rem; max-width: 100%; }
.tools label { white-space: nowrap; } .tools [role=group] label { margin-right: 0.5rem; }
kbd { font: 0.75rem ui-monospace, monospace; border: 1px solid var(--rule);
  border-radius: 0.25rem; padding: 0 0.25rem; }
.card { padding: 1.25rem 0 1.5rem; border-bottom: 1px solid var(--rule); scroll-margin-top: 4.5rem; outline: none; }
.card:focus-visible { box-shadow: -0.75rem 0 0 -0.5rem var(--line); }
.card[hidden] { display: none; }
.card header { display: flex; flex-wrap: wrap; gap: 0.25rem 0.75rem; align-items: baseline; }
.card h3 { font-size: 1rem; max-height: 4.5rem; overflow: hidden; }
.chip { background: var(--soft); border-radius: 1rem; padding: 0.0625rem 0.5625rem;
  font-size: 0.8125rem; white-space: nowrap; font-variant-numeric: tabular-nums; }
.chip.image-chip { background: var(--image); } .chip.audio-chip { background: var(--audio); }
.chip.video-chip { background: var(--video); } .chip.learned-chip { background: var(--learned); }
.body { display: grid; grid-template-columns: minmax(0, 22rem) minmax(0, 1fr); gap: 0.75rem 2rem; margin-top: 0.75rem; }
.body.plain { grid-template-columns: minmax(0, 1fr); }
figure { margin: 0 0 1rem; min-width: 0; } figcaption { overflow-wrap: anywhere; margin-top: 0.25rem; }
figcaption b { color: var(--ink); }
.medium img, .medium video { display: block; max-width: 100%; height: auto; border-radius: 0.25rem; }
.medium > img { max-height: 20rem; width: auto; } .medium > img.spectrogram, details > img.spectrogram { width: 100%;
  height: 5rem; max-height: none; margin-bottom: 0.375rem; }
.medium > img.pixels { width: 8rem; }
.medium video { width: 100%; max-height: 16rem; background: #000; } .medium audio { display: block; width: 100%;
  height: 2.25rem; }
.pixels { image-rendering: pixelated; }
.strip { display: flex; gap: 0.375rem; overflow-x: auto; margin: 0.375rem 0; padding-bottom: 0.25rem; }
.strip span { flex: none; } .strip img { height: 4.5rem; width: auto; display: block; } .strip small { display: block; }
.strip:focus-visible, summary:focus-visible { outline: 2px solid var(--line); outline-offset: 2px; }
dl { margin: 0; }
.turn { display: grid; grid-template-columns: 5.5rem minmax(0, 1fr); gap: 0.125rem 0.75rem; margin: 0 0 0.5rem; }
.turn dt { color: var(--quiet); font-size: 0.8125rem; padding-top: 0.125rem; }
.turn dd { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; }
.turn.assistant dd { font-weight: 500; }
.place { border-radius: 0.25rem; padding: 0 0.3125rem; font-size: 0.8125rem; font-weight: 400; white-space: nowrap; }
.place.image { background: var(--image); } .place.audio { background: var(--audio); }
.place.video { background: var(--video); }
.wrong { color: var(--bad); overflow-wrap: anywhere; }
details { margin-top: 0.5rem; } summary { cursor: pointer; color: var(--quiet); font-size: 0.8125rem; }
.tokens { font: 0.8125rem/1.75 ui-monospace, "SF Mono", Menlo, Consolas, "Liberation Mono", monospace;
  white-space: pre-wrap; overflow-wrap: anywhere; margin-top: 0.375rem; }
.tok { border-radius: 0.1875rem; box-shadow: 0 0 0 1px var(--rule); margin-right: 1px; padding: 0.0625rem 0; }
.tok.learned { border-bottom: 2px solid var(--line); }
.tok.m { padding: 0.0625rem 0.4375rem; font-weight: 600; }
[data-colour=place] .tok.image { background: var(--image); }
[data-colour=place] .tok.audio { background: var(--audio); }
[data-colour=place] .tok.video { background: var(--video); }
[data-colour=label] .tok.learned { background: var(--learned); }
[data-colour=label] .tok.given { color: var(--quiet); }
[data-colour=pack] .tok { background: var(--pack, var(--soft)); }
.packs { margin: 0.75rem 0; } .pack { display: flex; height: 1.375rem; margin: 0.25rem 0; background: var(--soft);
  border-radius: 0.25rem; overflow: hidden; } .pack a { flex: none; border-right: 1px solid var(--paper);
  background: var(--pack); color: var(--ink); font-size: 0.6875rem; line-height: 1.375rem; text-decoration: none;
  overflow: hidden; white-space: nowrap; text-align: center; }
.pack a:hover, .pack a:focus-visible { filter: brightness(0.9); outline: 2px solid var(--line); outline-offset: -2px; }
.hue0 { --pack: #cfe3f8; } .hue1 { --pack: #f3dcb4; } .hue2 { --pack: #d3ecd0; } .hue3 { --pack: #ecd3e6; }
.hue4 { --pack: #d8d6f3; } .hue5 { --pack: #f5d2cb; }
@media (prefers-color-scheme: dark) { .hue0 { --pack: #1c466f; } .hue1 { --pack: #5a420f; } .hue2 { --pack: #234d26; }
  .hue3 { --pack: #5a2f50; } .hue4 { --pack: #3a3672; } .hue5 { --pack: #693024; } }
@media (max-width: 46rem) { body { padding: 1rem 1rem 4rem; } .body { grid-template-columns: minmax(0, 1fr); }
  .turn { grid-template-columns: minmax(0, 1fr); } .keys { display: none; }
  .tools { gap: 0.375rem 0.625rem; } .tools input[type=search] { flex-basis: 100%; } h1 { font-size: 1.375rem; } }
@media print { .tools { display: none; } .card { break-inside: avoid; } }
"""
)

SCRIPT = """
"use strict";
const cards = [...document.querySelectorAll(".card")], search = document.querySelector("#search");
const task = document.querySelector("#task"), kinds = [...document.querySelectorAll(".kind")];
const words = new Map(cards.map(card => [card, card.textContent.toLowerCase()]));
function sift() {
  const wanted = search.value.toLowerCase().split(/\\s+/).filter(Boolean);
  const has = kinds.filter(box => box.checked).map(box => box.value);
  let shown = 0;
  for (const card of cards) {
    const fits = (!task || !task.value || card.dataset.task === task.value.slice(1))
      && has.every(kind => card.dataset.kinds.split(" ").includes(kind))
      && wanted.every(word => words.get(card).includes(word));
    card.hidden = !fits;
    shown += fits;
  }
  document.querySelector("#shown").textContent = shown + " of " + cards.length;
}
function step(by) {
  const there = cards.filter(card => !card.hidden);
  const at = there.indexOf(document.activeElement.closest(".card")) + by;
  const next = there[Math.min(there.length - 1, Math.max(0, at))];
  if (next) next.focus();
}
search.addEventListener("input", sift);
if (task) task.addEventListener("input", sift);
kinds.forEach(box => box.addEventListener("input", sift));
document.querySelectorAll("[name=colour]").forEach(one => one.addEventListener("input", () => {
  document.body.dataset.colour = one.value;
}));
document.addEventListener("keydown", event => {
  const writing = event.target.matches("input[type=search], select");
  if (event.key === "Escape" && writing) { search.value = ""; sift(); event.target.blur(); }
  if (writing || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "/") { event.preventDefault(); search.focus(); }
  if (event.key === "j" || event.key === "k") step(event.key === "j" ? 1 : -1);
  if (event.key === "t") {
    const all = [...document.querySelectorAll("details.coded")], open = all.some(one => !one.open);
    all.forEach(one => { one.open = open; });
  }
});
sift();
document.addEventListener("play", event => {
  document.querySelectorAll("audio, video").forEach(one => { if (one !== event.target) one.pause(); });
}, true);
"""
