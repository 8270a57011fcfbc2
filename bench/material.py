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


WORDS = (
    "the a of and to in is that it on with as this for are by from at his her they picture voice colour light dark red "
    "green blue left right above below near far small large round square man woman child dog tree house street water "
    "sky speaks sings asks says stands sits runs shows hears looks like no yes where when how many what who why two"
)


def talk(n: int) -> tuple[str, str]:
    """What is asked about sample ``n`` and what is answered: other words in every sample."""
    rng = np.random.default_rng([7, n])
    asked, answered = np.split(rng.choice(WORDS.split(), 50), [20])
    return " ".join(asked) + "?", " ".join(answered) + "."


def shards(folder: Path, count: int, size: tuple[int, int] = (640, 480), seconds: float = 5.0) -> list[Path]:
    """WebDataset shards of samples with a JPEG, a WAV and a JSON of the conversation, which all readers read."""
    folder.mkdir(parents=True)
    made = [folder / f"shard-{i:04d}.tar" for i in range(SHARDS)]
    for i, path in enumerate(made):
        with tarfile.open(path, "w") as tar:
            for n in range(i * count // SHARDS, (i + 1) * count // SHARDS):
                for ending, data in _members(n, size, seconds).items():
                    info = tarfile.TarInfo(f"{n:06d}.{ending}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return made


def shards_of(folder: Path) -> str:
    """The shards of a folder as avlm and others write several files: with braces."""
    return str(folder / f"shard-{{0000..{SHARDS - 1:04d}}}.tar")


def _members(n: int, size: tuple[int, int], seconds: float) -> dict[str, bytes]:
    asked, answered = talk(n)
    content = [
        {"type": "image", "path": f"{n:06d}.jpg"},
        {"type": "audio", "path": f"{n:06d}.wav"},
        {"type": "text", "text": asked},
    ]
    row = {
        "id": str(n),
        "messages": [{"role": "user", "content": content}, {"role": "assistant", "content": answered}],
    }
    return {"jpg": jpeg(*size, n), "wav": wav(seconds, n), "json": json.dumps(row).encode()}


def film(
    path: Path,
    seconds: float,
    *,
    size: tuple[int, int] = (640, 360),
    fps: int = 25,
    b_frames: int = 3,
    every: int = 250,
    slices: int = 1,
) -> Path:
    """An mp4 of H.264, and AAC in stereo at 48 kHz, interleaved.

    Args:
        b_frames: Most pictures in a row that no other is made from; 3 is what x264 does by itself.
        every: Frames between two key frames, at most; 250 is x264's own.
        slices: Parts of a picture that can be decoded by two threads at once; 1 is x264's own. PyAV would ask it for as
            many as the machine has cores, so that each made a film of its own.
    """
    import av

    scene = np.asarray(photo(2 * size[0], size[1]))
    with av.open(str(path), "w") as file:
        options = {"bf": str(b_frames), "g": str(every), "slices": str(slices)}
        pictures = file.add_stream("libx264", rate=fps, options=options)
        pictures.thread_count = 1
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
