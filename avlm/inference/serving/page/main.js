// The page: a conversation, what is seen of it, and the server that answers.

import { answer, models } from "./api.js";
import { Composer } from "./composer.js";
import { Conversation, message, turn } from "./conversation.js";
import { byId, make } from "./dom.js";
import { Fault } from "./faults.js";
import { keep, kept } from "./keep.js";
import { Log } from "./log.js";
import { part } from "./media.js";
import { download, row } from "./row.js";
import { Settings } from "./settings.js";
import { Talk } from "./talk.js";

let conversation = new Conversation();
let cleared = null; // the conversation before, as long as it can be brought back
let stopping = null; // an AbortController while an answer comes
let answering = Promise.resolve(); // until the last answer has ended
let editing = null; // the question that is being changed, and what stood in the composer before

const settings = new Settings(() => meet());
const log = new Log(byId("log"), byId("latest"), { edit, again, copy, key: askKey });
const composer = new Composer({ send, stop, fault: warn, recall });
const talk = new Talk({ key: () => settings.key, failed: warn });

// ---------------------------------------------------------------- asking

async function send({ text, media }) {
  if (editing) conversation.cut(editing.id);
  const changed = editing !== null;
  endEdit(false);
  const question = turn("user", text, media);
  conversation.turns.push(question);
  if (changed) log.set(conversation.turns);
  else log.add(question);
  answering = respond();
}

async function again(said) {
  await stop();
  endEdit();
  conversation.cut(said.id);
  log.set(conversation.turns);
  answering = respond();
}

/** Ask the server for the answer to the last question, and show it as it comes. */
async function respond() {
  const said = turn("assistant");
  conversation.turns.push(said);
  log.add(said);
  log.toEnd();
  warn(null);
  remember();
  stopping = new AbortController();
  composer.setBusy(true);
  say("Answering");
  composer.focus();
  try {
    await read(said, stopping.signal);
    say("");
  } catch (error) {
    failed(said, error);
  }
  stopping = null;
  composer.setBusy(false);
  log.draw(said);
  remember();
}

async function read(said, signal) {
  const messages = await Promise.all(conversation.told().map((known) => message(known, part)));
  if (settings.instructions) messages.unshift({ role: "system", content: settings.instructions });
  const request = { model: settings.model, messages, max_tokens: settings.maxTokens, temperature: settings.temperature };
  const begun = performance.now();
  const since = () => (performance.now() - begun) / 1000;
  said.times = {};
  let finish = "";
  let drawing = 0;
  for await (const piece of answer(request, settings.key, signal)) {
    if (piece.text) {
      said.times.first ??= since();
      said.times.last = since();
      said.text += piece.text;
      drawing ||= requestAnimationFrame(() => {
        drawing = 0;
        if (!said.finish) log.grow(said);
      });
    }
    finish = piece.finish || finish;
    said.usage = piece.usage ?? said.usage;
  }
  said.finish = finish || "stop";
}

function failed(said, error) {
  if (error.name === "AbortError") {
    said.finish = "stopped";
    return say("Stopped");
  }
  said.finish = "failed";
  said.fault = error instanceof Fault ? error : new Fault("The page failed", String(error));
  say("");
}

function stop() {
  stopping?.abort();
  return answering;
}

// ---------------------------------------------------------------- changing what was said

async function edit(question) {
  await stop();
  editing = { id: question.id, before: editing?.before ?? { text: composer.text, media: composer.media } };
  composer.fill(question);
  byId("editing").hidden = false;
  log.fade(question.id);
  byId("question").focus(); // where it is written, so a phone's keyboard may come
}

/** @param {boolean} restore  whether what was being written before comes back */
function endEdit(restore = true) {
  if (!editing) return;
  if (restore) composer.fill(editing.before);
  editing = null;
  byId("editing").hidden = true;
  log.fade();
}

/** The last question comes back to be changed. */
function recall() {
  const question = conversation.turns.at(-2);
  if (question) edit(question);
}

async function begin() {
  await stop();
  endEdit();
  cleared = conversation;
  adopt(new Conversation());
  warn(null);
  remember();
  say("The conversation was cleared");
  composer.focus();
}

function bringBack() {
  adopt(cleared);
  remember();
  composer.focus();
}

function adopt(found) {
  conversation = found;
  log.set(conversation.turns);
  refresh();
}

// ---------------------------------------------------------------- the rest of the page

/** @returns {Promise<boolean>} whether the browser let it */
async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    warn(new Fault("The browser lets no page copy here", "Select the text and copy it yourself."));
    return false;
  }
}

async function save() {
  const id = `conversation-${new Date().toISOString().slice(0, 19).replaceAll(/[-:]/g, "").replace("T", "-")}`;
  try {
    download(`${id}.jsonl`, await row(id, conversation, settings.instructions));
    say("Saved");
  } catch (fault) {
    warn(fault);
  }
}

async function remember() {
  refresh();
  if (!(await keep(conversation.turns))) say("This browser keeps nothing: the conversation ends with the page");
}

function refresh() {
  const some = conversation.turns.length > 0;
  if (some) cleared = null;
  byId("empty").hidden = some;
  byId("bring-back").hidden = !cleared?.turns.length;
  byId("clear").disabled = !some;
  byId("save").disabled = !conversation.pairs().length;
}

const say = (words) => (byId("status").textContent = words);

/** Say what is wrong above the composer; nothing, without a fault. */
function warn(fault, label = "", press = null) {
  const words = fault ? [make("span", {}, [fault.title, fault.detail].filter(Boolean).join(". "))] : [];
  const close = () => warn(null);
  const button = (text, click) => make("button.text", { type: "button", on: { click } }, text);
  byId("notice").replaceChildren(...words, ...(fault ? [press ? button(label, press) : button("Close", close)] : []));
}

function askKey() {
  settings.open("The server wants a key.");
}

/** Ask the server what it serves. */
async function meet() {
  let served;
  try {
    served = await models(settings.key);
  } catch (fault) {
    const [label, press] = fault.status === 401 ? ["Enter the key", askKey] : ["Try again", meet];
    return warn(fault instanceof Fault ? fault : new Fault("The page failed", String(fault)), label, press);
  }
  warn(null);
  const names = served.map((model) => model.id);
  if (!names.includes(settings.model)) settings.model = names[0];
  const choices = names.length > 1 ? names : [];
  byId("model").replaceChildren(...choices.map((name) => make("option", { value: name, selected: name === settings.model }, name)));
  byId("models").hidden = !choices.length;
  byId("model-name").textContent = choices.length ? "" : settings.model;
  byId("talk").hidden = !served.find((model) => model.id === settings.model).live;
  document.title = `${settings.model} · avlm`;
}

function listen() {
  byId("clear").addEventListener("click", begin);
  byId("save").addEventListener("click", save);
  byId("bring-back").addEventListener("click", bringBack);
  byId("cancel-edit").addEventListener("click", () => endEdit());
  byId("open-settings").addEventListener("click", () => settings.open());
  byId("talk").addEventListener("click", () => talk.open());
  byId("door-file").addEventListener("click", () => composer.choose());
  byId("door-camera").addEventListener("click", () => composer.shoot());
  byId("door-microphone").addEventListener("click", () => composer.record());
  byId("model").addEventListener("change", ({ target }) => {
    settings.model = target.value;
    settings.save();
  });
  for (const button of document.querySelectorAll("dialog .close")) {
    button.addEventListener("click", () => button.closest("dialog").close());
  }
  addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || document.querySelector("dialog[open]")) return;
    if (composer.recorder.on) composer.recorder.end(false);
    else if (stopping) stop();
    else endEdit();
  });
}

listen();
adopt(new Conversation(await kept()));
meet();
composer.focus();
