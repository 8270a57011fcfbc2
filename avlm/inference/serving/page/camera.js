// A picture from the camera.

import { byId } from "./dom.js";
import { Fault } from "./faults.js";
import { denied } from "./microphone.js";

const QUALITY = 0.92;

/** Show what the camera sees. @returns {Promise<File|null>} the picture that was taken, if one was */
export async function snapshot() {
  const dialog = byId("camera-dialog");
  const preview = byId("preview");
  let stream;
  try {
    stream = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment", width: { ideal: 1280 } } });
  } catch (error) {
    throw denied(error, "camera");
  }
  preview.srcObject = stream;
  dialog.returnValue = "";
  dialog.showModal();
  const shoot = byId("shoot");
  const taken = new Promise((resolve) => {
    shoot.onclick = () => {
      resolve(still(preview));
      dialog.close();
    };
    dialog.addEventListener("close", () => resolve(null), { once: true });
  });
  shoot.focus();
  const file = await taken;
  stream.getTracks().forEach((track) => track.stop());
  preview.srcObject = null;
  return file;
}

async function still(preview) {
  const canvas = document.createElement("canvas");
  canvas.width = preview.videoWidth;
  canvas.height = preview.videoHeight;
  if (!canvas.width) throw new Fault("The camera shows nothing yet", "Wait for its picture, then take it.");
  canvas.getContext("2d").drawImage(preview, 0, 0);
  return new Promise((resolve) => {
    canvas.toBlob((blob) => resolve(new File([blob], "snapshot.jpg", { type: "image/jpeg" })), "image/jpeg", QUALITY);
  });
}
