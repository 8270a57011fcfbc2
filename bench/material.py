"""Files and arrays that the benches work on, made on the spot: nothing is downloaded, and every run has the same."""

from __future__ import annotations

import io
import json
import tarfile
import wave
from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image

RATE_HZ = 16_000
SHARDS = 4


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    """Something like a photograph: structure at every scale, and the noise of a sensor."""
    rng = np.random.default_rng(seed)
    pixels = np.full((height, width, 3), 128, np.float32)
    for cells, strength in ((4, 80), (16, 40), (64, 20), (200, 10)):
        size = max(2, cells * height // max(width, height)), max(2, cells * width // max(width, height))
        blots = Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8))
        smooth = blots.resize((width, height), Image.Resampling.BICUBIC)
        pixels += (np.asarray(smooth, np.float32) - 128) / 128 * strength
    pixels += rng.normal(0, 3, (height, width, 1)).astype(np.float32)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def jpeg(width: int, height: int, seed: int = 0) -> bytes:
    """A photograph as a camera or a web page stores it: 4:2:0, quality 90."""
    file = io.BytesIO()
    photo(width, height, seed).save(file, "JPEG", quality=90)
    return file.getvalue()


def speech(seconds: float, seed: int = 0, rate_hz: int = RATE_HZ) -> np.ndarray:
    """Something like speech: a gliding voice with overtones in syllables, and breath between them; float32."""
    time = np.arange(round(seconds * rate_hz)) / rate_hz
    pitch = 2 * np.pi * np.cumsum(120 + seed % 60 + 30 * np.sin(2 * np.pi * 0.7 * time)) / rate_hz
    voice = sum(np.sin(k * pitch) / k for k in range(1, 12))
    breath = 1e-3 * np.random.default_rng(seed).standard_normal(len(time))
    return (0.2 * voice * np.clip(np.sin(2 * np.pi * 3 * time), 0, None) + breath).astype(np.float32)


def wav(seconds: float, seed: int = 0) -> bytes:
    """A recording of `speech` in 16 bits."""
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(1), out.setsampwidth(2), out.setframerate(RATE_HZ)
        out.writeframes((speech(seconds, seed).clip(-1, 1) * 32_767).astype("<i2").tobytes())
    return file.getvalue()


QUESTION, ANSWER = "Does the voice speak of the picture?", "It speaks of the colours in it."


def shards(folder: Path, count: int, size: tuple[int, int] = (640, 480), seconds: float = 5.0) -> list[Path]:
    """WebDataset shards of samples with a JPEG, a WAV and a JSON of what is asked and answered.

    The same files lie beside them unpacked, with JSON lines for `avlm`.
    """
    (folder / "files").mkdir(parents=True)
    made = [folder / f"shard-{i:04d}.tar" for i in range(SHARDS)]
    rows = []
    for i, path in enumerate(made):
        with tarfile.open(path, "w") as tar:
            for n in range(i * count // SHARDS, (i + 1) * count // SHARDS):
                members = {"jpg": jpeg(*size, n), "wav": wav(seconds, n), "json": json.dumps(_talk(n)).encode()}
                for ending, data in members.items():
                    info = tarfile.TarInfo(f"{n:06d}.{ending}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
                    (folder / "files" / info.name).write_bytes(data)
                rows.append(json.dumps(_row(n)))
    (folder / "rows.jsonl").write_text("\n".join(rows) + "\n")
    return made


def rows_of(folder: Path) -> Path:
    """What avlm reads of a folder of shards: for now the files beside them; tars, where it reads tars."""
    return folder / "rows.jsonl"


def _talk(n: int) -> dict[str, str]:
    return {"id": str(n), "question": QUESTION, "answer": ANSWER}


def _row(n: int) -> dict[str, object]:
    asked = [
        {"type": "image", "path": f"files/{n:06d}.jpg"},
        {"type": "audio", "path": f"files/{n:06d}.wav"},
        {"type": "text", "text": QUESTION},
    ]
    return {
        "id": str(n),
        "messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": ANSWER}],
    }


def film(path: Path, seconds: float, *, size: tuple[int, int] = (640, 360), fps: int = 25, b_frames: int = 3) -> Path:
    """An mp4 as tools write it by default: H.264 with a key frame every 250, AAC in stereo at 48 kHz, interleaved."""
    import av

    scene = np.asarray(photo(2 * size[0], size[1]))
    with av.open(str(path), "w") as file:
        pictures = file.add_stream("libx264", rate=fps, options={"bf": str(b_frames), "preset": "veryfast"})
        pictures.width, pictures.height, pictures.pix_fmt = *size, "yuv420p"
        track = file.add_stream("aac", rate=48_000, layout="stereo")
        sound = np.stack([speech(seconds, 0, 48_000), speech(seconds, 1, 48_000)])
        per_frame = 48_000 // fps
        for i in range(round(seconds * fps)):
            left = round(size[0] * (0.5 + 0.5 * np.sin(i / fps)))
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(scene[:, left : left + size[0]]), format="rgb24")
            frame.pts, frame.time_base = i, Fraction(1, fps)
            file.mux(pictures.encode(frame))
            heard = av.AudioFrame.from_ndarray(
                np.ascontiguousarray(sound[:, i * per_frame : (i + 1) * per_frame]), "fltp", "stereo"
            )
            heard.sample_rate, heard.pts, heard.time_base = 48_000, i * per_frame, Fraction(1, 48_000)
            file.mux(track.encode(heard))
        file.mux(pictures.encode(None))
        file.mux(track.encode(None))
    return path
