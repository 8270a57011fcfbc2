// What went wrong, in words.

/** Something that the user is told: what is so, and what the server or browser says about it. */
export class Fault extends Error {
  constructor(title, detail = "", status = 0) {
    super(detail);
    this.title = title;
    this.detail = detail;
    this.status = status;
  }
}

const TITLES = {
  400: "The server cannot take this",
  401: "The server wants a key",
  403: "The server does not allow this",
  404: "The server does not know this model",
  408: "The server waited too long",
  413: "This is too large for the server",
  422: "The server cannot take this",
  429: "The server is busy",
  503: "The server is not ready",
  504: "The answer took too long",
};

/** The fault of a response that is no answer; its detail is the server's own message. */
export async function refused(response) {
  let said = "";
  try {
    const body = await response.json();
    said = body?.error?.message ?? (typeof body?.detail === "string" ? body.detail : "");
  } catch {
    // not JSON: a proxy's page, say, which nobody wants to read
  }
  const title = TITLES[response.status] ?? `The server failed (${response.status})`;
  const wait = Number(response.headers.get("Retry-After"));
  const after = wait > 0 ? `Try again in ${wait === 1 ? "a second" : `${wait} seconds`}.` : "";
  return new Fault(title, [said, after].filter(Boolean).join(" "), response.status);
}

export const gone = () => new Fault("The server does not answer", "See whether it still runs, then try again.");

export const broken = () => new Fault("The answer broke off", "The connection ended before the answer did. Try again.");
