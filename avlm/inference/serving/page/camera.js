// What the camera sees: a picture that is taken, or stills while one talks.

import { byId } from "./dom.js";
import { Fault } from "./faults.js";
import { denied } from "./microphone.js";

const QUALITY = 0.92;

/** Show in a video element what the camera sees. @returns {Promise<() => void>} what ends that */
export async function look(preview, width) {
  let stream;
  try {
    stream = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment", width: { ideal: width } } });
  } catch (error) {
    throw denied(error, "camera");
  }
  preview.srcObject = stream;
  return () => {
    stream.getTracks().forEach((track) => track.stop());
    preview.srcObject = null;
  };
}

/** What a video element shows now, or null where that is nothing yet. */
export function still(preview) {
  const canvas = document.createElement("canvas");
  canvas.width = preview.videoWidth;
  canvas.height = preview.videoHeight;
  if (!canvas.width) return null;
  canvas.getContext("2d").drawImage(preview, 0, 0);
  return canvas;
}

/** Show what the camera sees. @returns {Promise<File|null>} the picture that was taken, if one was */
export async function snapshot() {
  const dialog = byId("camera-dialog");
  const preview = byId("preview");
  const end = await look(preview, 1280);
  dialog.returnValue = "";
  dialog.showModal();
  const shoot = byId("shoot");
  const taken = new Promise((resolve) => {
    shoot.onclick = () => {
      resolve(photograph(preview));
      dialog.close();
    };
    dialog.addEventListener("close", () => resolve(null), { once: true });
  });
  shoot.focus();
  const file = await taken;
  end();
  return file;
}

async function photograph(preview) {
  const canvas = still(preview);
  if (!canvas) throw new Fault("The camera shows nothing yet", "Wait for its picture, then take it.");
  return new Promise((resolve) => {
    canvas.toBlob((blob) => resolve(new File([blob], "snapshot.jpg", { type: "image/jpeg" })), "image/jpeg", QUALITY);
  });
}
