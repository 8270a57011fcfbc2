// Pictures, sounds and videos on their way from a file to a question.

import { Fault } from "./faults.js";

/** Endings of files whose kind a browser may not know. */
const ENDINGS = {
  image: ["png", "jpg", "jpeg", "webp", "gif", "bmp", "tif", "tiff", "avif"],
  audio: ["wav", "mp3", "flac", "ogg", "oga", "opus", "m4a", "aac"],
  video: ["mp4", "m4v", "mov", "mkv", "webm", "avi", "mpg", "mpeg"],
};
const FORMATS = { mpeg: "mp3", "x-wav": "wav", wave: "wav", "vnd.wave": "wav", "x-flac": "flac", "x-m4a": "m4a", mp4: "m4a" };

const urls = new WeakMap();
const texts = new WeakMap();

const ending = (name) => (name.includes(".") ? name.split(".").pop().toLowerCase() : "");

/** What kind a file is of: "image", "audio", "video" or "". */
export function kindOf(file) {
  const kind = file.type.split("/")[0];
  if (kind in ENDINGS) return kind;
  return Object.keys(ENDINGS).find((name) => ENDINGS[name].includes(ending(file.name))) ?? "";
}

/** A file as a medium. */
export async function mediumOf(file) {
  const kind = kindOf(file);
  if (!kind) throw new Fault(`${file.name} is neither a picture nor a sound nor a video`, "Add one of those.");
  if (!file.size) throw new Fault(`${file.name} is empty`, "Add a file with something in it.");
  const medium = { id: crypto.randomUUID?.() ?? `${Math.random()}`, kind, name: file.name, blob: file };
  return { ...medium, ...(await facts(kind, address(medium))) };
}

/** Where the page shows it from. */
export function address(medium) {
  if (!urls.has(medium.blob)) urls.set(medium.blob, URL.createObjectURL(medium.blob));
  return urls.get(medium.blob);
}

/** Size or length, as far as the browser can tell; what it cannot read the server may. */
async function facts(kind, url) {
  if (kind === "image") {
    const image = new Image();
    image.src = url;
    await image.decode().catch(() => {});
    return { width: image.naturalWidth, height: image.naturalHeight };
  }
  const player = document.createElement(kind);
  player.preload = "metadata";
  const known = new Promise((resolve) => {
    player.addEventListener("loadedmetadata", resolve, { once: true });
    player.addEventListener("error", resolve, { once: true });
    setTimeout(resolve, 3000);
  });
  player.src = url;
  await known;
  const length = Number.isFinite(player.duration) ? player.duration : 0;
  return { seconds: length, width: player.videoWidth ?? 0, height: player.videoHeight ?? 0 };
}

/** The bytes as a data URL; kept, as every later question of the conversation sends them again. */
export function dataUrl(medium) {
  if (!texts.has(medium.blob)) {
    texts.set(
      medium.blob,
      new Promise((resolve, reject) => {
        const reader = new FileReader();
        reader.addEventListener("load", () => resolve(reader.result));
        reader.addEventListener("error", () => reject(new Fault(`${medium.name} cannot be read`, "Add it again.")));
        reader.readAsDataURL(medium.blob);
      }),
    );
  }
  return texts.get(medium.blob);
}

/** The medium as a part of a message of OpenAI's API. */
export async function part(medium) {
  const url = await dataUrl(medium);
  if (medium.kind !== "audio") return { type: `${medium.kind}_url`, [`${medium.kind}_url`]: { url } };
  const given = medium.blob.type.split(";")[0].split("/")[1] ?? "";
  const format = FORMATS[given] ?? (given || ending(medium.name) || "wav");
  return { type: "input_audio", input_audio: { data: url.slice(url.indexOf(",") + 1), format } };
}
