// The server, as any client of OpenAI's API sees it.

import { events } from "./events.js";
import { broken, Fault, gone, refused } from "./faults.js";

const at = (path) => new URL(path, document.baseURI);

function headers(key) {
  const found = { "Content-Type": "application/json" };
  if (key) found.Authorization = `Bearer ${key}`;
  return found;
}

async function reach(path, init) {
  let response;
  try {
    response = await fetch(at(path), { ...init, cache: "no-store" });
  } catch (error) {
    throw error.name === "AbortError" ? error : gone();
  }
  if (!response.ok) throw await refused(response);
  return response;
}

/** The models that are served, as the server describes them. */
export async function models(key) {
  const response = await reach("v1/models", { headers: headers(key) });
  const { data } = await response.json().catch(() => ({}));
  if (!Array.isArray(data) || !data.length) throw new Fault("The server names no model", "Start it with a model directory.");
  return data;
}

/**
 * Ask, and take the answer as it comes.
 * @yields {{text?: string, finish?: string, usage?: object}}
 */
export async function* answer(request, key, signal) {
  const body = JSON.stringify({ ...request, stream: true, stream_options: { include_usage: true } });
  const response = await reach("v1/chat/completions", { method: "POST", headers: headers(key), body, signal });
  try {
    for await (const data of events(response.body)) {
      if (data === "[DONE]") return;
      yield told(JSON.parse(data));
    }
  } catch (error) {
    throw error.name === "AbortError" || error instanceof Fault ? error : broken();
  }
  throw broken();
}

function told(chunk) {
  if (chunk.error) throw new Fault("The answer broke off", chunk.error.message ?? "");
  const choice = chunk.choices?.[0];
  return { text: choice?.delta?.content ?? "", finish: choice?.finish_reason ?? "", usage: chunk.usage ?? undefined };
}
