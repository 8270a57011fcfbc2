"""Valid files of every format, small, made by Pillow, libsndfile and FFmpeg: what tests read, mutate and cut short."""

from __future__ import annotations

import io
from collections.abc import Callable
from fractions import Fraction
from functools import lru_cache, partial
from typing import Any, Literal

import av
import numpy as np
import soundfile
from PIL import Image

RATE = 16_000
Kind = Literal["image", "audio", "video"]


def photo(height: int = 36, width: int = 48, seed: int = 0, channels: int = 3) -> np.ndarray:
    """Something like a photograph: blots of all sizes, edges, and grain; uint8 [height, width, channels].

    What is large is made of one small piece again and again, which is quick.
    """
    if height * width > 2**21:
        again = height // 512 + 1, width // 512 + 1, 1
        return np.ascontiguousarray(np.tile(photo(512, 512, seed, channels), again)[:height, :width])
    rng = np.random.default_rng(seed)
    canvas = np.zeros((height, width, channels))
    for cells, weight in ((2, 90), (5, 60), (11, 30), (23, 20)):
        blots = rng.integers(0, 256, (cells, cells, channels), dtype=np.uint8)
        layers = [
            Image.fromarray(blots[..., c]).resize((width, height), Image.Resampling.BICUBIC) for c in range(channels)
        ]
        canvas += weight / 200 * np.stack([np.asarray(layer) for layer in layers], -1)
    canvas[height // 3 : height // 2, width // 4 : width // 2] = 250  # something with straight edges
    canvas += rng.normal(0, 3, canvas.shape)
    return np.clip(canvas, 0, 255).astype(np.uint8)


def tone(seconds: float, rate: int = RATE, channels: int = 1, seed: int = 0) -> np.ndarray:
    """A tone with overtones and breath: float32 [samples, channels]; each channel of its own pitch."""
    time = np.arange(round(seconds * rate))[:, None] / rate
    pitch = 220 * (1 + np.arange(channels))
    breath = np.random.default_rng(seed).normal(0, 0.01, (len(time), channels))
    wave = 0.3 * np.sin(2 * np.pi * pitch * time) + 0.1 * np.sin(4 * np.pi * pitch * time) + breath
    return wave.astype(np.float32)


def flat(form: str, mode: str, height: int, width: int, **how: Any) -> bytes:
    """Grey all over: large, and a small file."""
    file = io.BytesIO()
    Image.new(mode, (width, height), 1 if mode == "1" else 128).save(file, form, **how)
    return file.getvalue()


def picture(form: str, mode: str = "RGB", size: tuple[int, int] = (36, 48), **how: Any) -> bytes:
    file = io.BytesIO()
    image = Image.fromarray(photo(*size))
    image = image.quantize(64) if mode == "P" else image.convert(mode)
    image.save(file, form, **how)
    return file.getvalue()


def animated(form: str, frames: int = 3, **how: Any) -> bytes:
    file = io.BytesIO()
    first, *rest = [Image.fromarray(photo(seed=i)) for i in range(frames)]
    first.save(file, form, save_all=True, append_images=rest, **how)
    return file.getvalue()


def sound(
    form: str, subtype: str | None = None, rate: int = RATE, channels: int = 1, seconds: float = 0.3, count: int = 0
) -> bytes:
    """By libsndfile. ``count`` instead of ``seconds`` gives that many samples."""
    wave = tone(1 + seconds + count / rate, rate, channels)[: count or round(seconds * rate)]
    file = io.BytesIO()
    with soundfile.SoundFile(file, "w", rate, channels, format=form, subtype=subtype) as out:
        for at in range(0, len(wave), 4096):  # libsndfile's Vorbis writer fails on long blocks
            out.write(wave[at : at + 4096])
    return file.getvalue()


def track(
    form: str,
    codec: str,
    rate: int = RATE,
    channels: int = 1,
    seconds: float = 0.3,
    wave: np.ndarray | None = None,
    **options: str,
) -> bytes:
    """Sound in a container, by FFmpeg."""
    file = io.BytesIO()
    with av.open(file, "w", format=form, options=options) as out:
        stream = out.add_stream(codec, rate=rate, layout={1: "mono", 2: "stereo", 6: "5.1"}[channels])
        put_sound(out, stream, tone(seconds, rate, channels) if wave is None else wave, rate)
    return file.getvalue()


def put_sound(out: Any, stream: Any, wave: np.ndarray, rate: int, start_s: float = 0.0) -> None:
    frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(wave.T), "fltp", stream.layout.name)
    frame.sample_rate, frame.pts, frame.time_base = rate, round(start_s * rate), Fraction(1, rate)
    resampler = av.AudioResampler(stream.codec_context.format, stream.layout, rate)
    for part in resampler.resample(frame):
        out.mux(stream.encode(part))
    out.mux(stream.encode(None))


@lru_cache
def _frame(size: tuple[int, int], number: int) -> np.ndarray:
    return photo(*size, seed=number)


def video(
    form: str,
    codec: str,
    audio: str | None = "aac",
    frames: int = 12,
    size: tuple[int, int] = (48, 64),
    rate: int = RATE,
    channels: int = 1,
    sound_s: float | None = None,
    fps: int = 10,
    **options: str,
) -> bytes:
    """Pictures with sound, by FFmpeg."""
    file = io.BytesIO()
    with av.open(file, "w", format=form, options=options) as out:
        pictures = out.add_stream(codec, rate=fps)
        pictures.height, pictures.width = size
        pictures.pix_fmt = "rgb8" if codec == "gif" else "yuv420p"
        sounds = None
        if audio is not None:
            sounds = out.add_stream(audio, rate=rate, layout={1: "mono", 2: "stereo"}[channels])
        for i in range(frames):
            frame = av.VideoFrame.from_ndarray(_frame(size, i % 16), format="rgb24")
            frame.pts, frame.time_base = i, Fraction(1, fps)
            out.mux(pictures.encode(frame.reformat(format=pictures.pix_fmt)))
        out.mux(pictures.encode(None))
        if sounds is not None:
            put_sound(out, sounds, tone(frames / fps if sound_s is None else sound_s, rate, channels), rate)
    return file.getvalue()


def turned(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return picture("JPEG", exif=exif)


EVERY: dict[str, tuple[Kind, Callable[[], bytes]]] = {
    "baseline.jpg": ("image", partial(picture, "JPEG")),
    "progressive.jpg": ("image", partial(picture, "JPEG", progressive=True)),
    "turned.jpg": ("image", partial(turned, 6)),
    "press.jpg": ("image", partial(picture, "JPEG", "CMYK")),
    "grey.jpg": ("image", partial(picture, "JPEG", "L")),
    "rgb.png": ("image", partial(picture, "PNG")),
    "alpha.png": ("image", partial(picture, "PNG", "RGBA")),
    "palette.png": ("image", partial(picture, "PNG", "P")),
    "deep.png": ("image", partial(picture, "PNG", "I;16")),
    "lossy.webp": ("image", partial(picture, "WEBP")),
    "lossless.webp": ("image", partial(picture, "WEBP", lossless=True)),
    "moving.webp": ("image", partial(animated, "WEBP")),
    "moving.gif": ("image", partial(animated, "GIF")),
    "raw.tiff": ("image", partial(picture, "TIFF")),
    "lzw.tiff": ("image", partial(picture, "TIFF", compression="tiff_lzw")),
    "jpeg.tiff": ("image", partial(picture, "TIFF", compression="jpeg")),
    "rgb.bmp": ("image", partial(picture, "BMP")),
    "16.wav": ("audio", partial(sound, "WAV", "PCM_16")),
    "24.wav": ("audio", partial(sound, "WAVEX", "PCM_24", channels=2)),
    "float.wav": ("audio", partial(sound, "WAV", "FLOAT")),
    "a-law.wav": ("audio", partial(sound, "WAV", "ALAW")),
    "a.flac": ("audio", partial(sound, "FLAC")),
    "a.mp3": ("audio", partial(sound, "MP3")),
    "uncounted.mp3": ("audio", partial(track, "mp3", "libmp3lame", write_xing="0")),
    "a.ogg": ("audio", partial(sound, "OGG", "VORBIS")),
    "a.opus": ("audio", partial(sound, "OGG", "OPUS")),
    "a.m4a": ("audio", partial(track, "ipod", "aac")),
    "a.mka": ("audio", partial(track, "matroska", "flac")),
    "h264.mp4": ("video", partial(video, "mp4", "libx264")),
    "mpeg4.mov": ("video", partial(video, "mov", "mpeg4", "pcm_s16le")),
    "fragments.mp4": ("video", partial(video, "mp4", "libx264", movflags="frag_keyframe+empty_moov")),
    "vp9.webm": ("video", partial(video, "webm", "libvpx-vp9", "libopus")),
    "h264.mkv": ("video", partial(video, "matroska", "libx264")),
    "mpeg4.avi": ("video", partial(video, "avi", "mpeg4", "libmp3lame")),
    "h264.ts": ("video", partial(video, "mpegts", "libx264")),
    "silent.gif": ("video", partial(video, "gif", "gif", None)),
}
"""By name: the kind, and how it is made."""


@lru_cache
def made(name: str) -> bytes:
    """One of `EVERY`, made once."""
    return EVERY[name][1]()
