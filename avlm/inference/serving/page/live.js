// A conversation by voice with /v1/live: the microphone there, events and speech back.
//
//   const live = await startLive({ key, onEvent: (event) => ..., onEnd: (why) => ... });
//   live.type("What is this?"); live.show("data:image/jpeg;base64,..."); live.stop(); live.end();
//
// Nothing is loaded from elsewhere, and nothing is kept.

const EAR = new URL("live-ear.js", import.meta.url);

/** Begin to listen. Rejects where there is no microphone or the user does not allow it. */
export async function startLive({ key = "", onEvent = () => {}, onEnd = () => {} } = {}) {
  const microphone = await navigator.mediaDevices.getUserMedia({
    audio: { channelCount: 1, echoCancellation: true, noiseSuppression: true, autoGainControl: true },
  });
  const sound = new AudioContext();
  await sound.audioWorklet.addModule(EAR);
  const ear = new AudioWorkletNode(sound, "avlm-ear", { numberOfOutputs: 0 });
  const mouth = new Mouth(sound);

  const address = new URL("/v1/live", location.href);
  address.protocol = location.protocol === "https:" ? "wss:" : "ws:";
  const socket = new WebSocket(address, key ? ["avlm-live", `avlm-key.${key}`] : ["avlm-live"]);
  socket.binaryType = "arraybuffer";
  const say = (message) => {
    if (socket.readyState === WebSocket.OPEN) socket.send(JSON.stringify(message));
  };
  mouth.onSilent = () => say({ type: "played" });

  socket.addEventListener("message", ({ data }) => {
    if (data instanceof ArrayBuffer) {
      mouth.speak(data);
      return;
    }
    const event = JSON.parse(data);
    if (event.event === "interrupted") mouth.hush();
    onEvent(event);
  });
  socket.addEventListener("close", ({ reason }) => {
    for (const track of microphone.getTracks()) track.stop();
    mouth.hush();
    void sound.close();
    onEnd(reason);
  });
  await new Promise((resolve, reject) => {
    socket.addEventListener("open", resolve, { once: true });
    socket.addEventListener("close", () => reject(new Error("the server does not talk here")), { once: true });
  });

  ear.port.onmessage = ({ data }) => {
    if (socket.readyState === WebSocket.OPEN) socket.send(data);
  };
  sound.createMediaStreamSource(microphone).connect(ear);
  return {
    type: (text) => say({ type: "text", text }),
    show: (url) => say(url ? { type: "image", url } : { type: "image" }),
    stop: () => {
      mouth.hush();
      say({ type: "stop" });
    },
    end: () => socket.close(1000),
  };
}

/** Plays pieces of speech one behind the other, and says when there is nothing more. */
class Mouth {
  constructor(sound) {
    this.sound = sound;
    this.free = 0; // when the last piece that was handed in will be over
    this.playing = new Set();
    this.onSilent = () => {};
  }

  speak(pcm) {
    const samples = new Int16Array(pcm);
    if (samples.length === 0) return;
    const buffer = this.sound.createBuffer(1, samples.length, 16000);
    buffer.getChannelData(0).set(Float32Array.from(samples, (value) => value / 32768));
    const piece = this.sound.createBufferSource();
    piece.buffer = buffer;
    piece.connect(this.sound.destination);
    this.free = Math.max(this.free, this.sound.currentTime);
    piece.start(this.free);
    this.free += buffer.duration;
    this.playing.add(piece);
    piece.onended = () => {
      if (this.playing.delete(piece) && this.playing.size === 0) this.onSilent();
    };
  }

  hush() {
    for (const piece of this.playing) {
      piece.onended = null;
      piece.stop();
    }
    this.playing.clear();
    this.free = 0;
  }
}

/** A button that starts and ends a conversation; what is heard and answered goes to `onEvent`. */
export function liveButton(button, options = {}) {
  let live = null;
  const shown = (on) => {
    button.setAttribute("aria-pressed", String(on));
    button.textContent = on ? "Stop listening" : "Talk";
  };
  shown(false);
  button.addEventListener("click", async () => {
    if (live) {
      live.end();
      return;
    }
    button.disabled = true;
    try {
      live = await startLive({
        ...options,
        onEnd: (why) => {
          live = null;
          shown(false);
          options.onEnd?.(why);
        },
      });
      shown(true);
    } catch (error) {
      options.onError?.(error);
    } finally {
      button.disabled = false;
    }
  });
  return { current: () => live };
}
