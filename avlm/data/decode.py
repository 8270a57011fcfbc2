"""Decode pictures, sounds and videos under limits: a file in, pixels or a waveform out.

Every way in which that can fail is a `MediaError` about that one item.
"""

from __future__ import annotations

import io
import math
import stat
import struct
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image as PILImage
from PIL import ImageOps

from avlm.config.media import MediaSpec
from avlm.errors import AvlmError, MediaError
from avlm.layout import frame_times_s, resampled_count
from avlm.samples import Clip, MediaItem, Picture, Sound


@dataclass(frozen=True, slots=True)
class Limits:
    """What a file may be before it is refused unread, or half read."""

    max_bytes: int = 512 * 2**20
    max_pixels: int = 100_000_000
    max_samples: int = 3600 * 48_000
    """Of one channel of a recording, at its own rate."""
    max_seconds: float = 3600.0
    max_decode_s: float = 300.0
    """Time that decoding one video may take."""


LIMITS = Limits()
PICTURES = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF", "ICO")
"""Formats that are decoded; among Pillow's others are some that start another program (EPS)."""
QUIETEST = 1e-4
"""A recording whose loudest sample is below this (-80 dB) is silent."""


@contextmanager
def _about(item: MediaItem) -> Iterator[None]:
    """Turn whatever a decoder raises into one message about the item."""
    try:
        yield
    except AvlmError:
        raise
    except (MemoryError, KeyboardInterrupt):
        raise
    except Exception as error:
        kind = type(error).__name__
        raise MediaError(
            f"{item.name()}: not readable as {article(item.kind)} ({kind}). "
            "Replace the file, or remove it from the sample"
        ) from error


def article(kind: str) -> str:
    return {"image": "a picture", "audio": "a recording", "video": "a video"}[kind]


def _read(item: MediaItem, limits: Limits) -> bytes:
    """The item's bytes, refused before they are read when they are too many or no file at all."""
    if item.data is not None:
        data = item.data
        if len(data) > limits.max_bytes:
            raise MediaError(
                f"{item.name()}: has {len(data)} bytes, and at most {limits.max_bytes} are decoded. Cut it"
            )
    else:
        path = item.path
        if path is None:
            raise MediaError(f"a part of type {item.kind} has neither a path nor data. Give it a path")
        try:
            info = path.stat()
        except OSError:
            raise MediaError(
                f"{path}: there is no such file. Check the path; it is relative to the data file"
            ) from None
        if not stat.S_ISREG(info.st_mode):
            raise MediaError(f"{path}: is not a regular file. Give the path of {article(item.kind)}")
        if info.st_size > limits.max_bytes:
            raise MediaError(
                f"{path}: has {info.st_size} bytes, and at most {limits.max_bytes} are read. Cut or compress it"
            )
        data = path.read_bytes()
    if not data:
        raise MediaError(f"{item.name()}: is empty, so there is nothing to decode. Replace the file")
    return data


def decode_image(item: MediaItem, limits: Limits = LIMITS) -> Picture:
    """Decode one picture to RGB, upright (EXIF), transparency over white.

    Raises:
        MediaError: Missing, broken, truncated or too large.
    """
    if isinstance(item.decoded, Picture):
        return item.decoded
    with _about(item), warnings.catch_warnings():
        warnings.simplefilter("ignore", PILImage.DecompressionBombWarning)
        try:
            with PILImage.open(io.BytesIO(_read(item, limits)), formats=_formats()) as image:
                if image.width * image.height > limits.max_pixels:
                    size = f"is {image.width} x {image.height} pixels"
                    raise MediaError(f"{item.name()}: {size}, and {_at_most(limits)} are decoded. Make it smaller")
                return to_picture(image)
        except PILImage.DecompressionBombError:
            raise MediaError(
                f"{item.name()}: {_at_most(limits)} are decoded, and it has more. Make it smaller"
            ) from None
    raise AssertionError


@lru_cache(maxsize=1)
def _formats() -> tuple[str, ...]:
    """Those of our formats that this Pillow was built with."""
    PILImage.init()
    return tuple(name for name in PICTURES if name in PILImage.OPEN)


def _at_most(limits: Limits) -> str:
    return f"at most {limits.max_pixels} pixels"


def to_picture(image: PILImage.Image) -> Picture:
    """A Pillow image as RGB, upright (EXIF), transparency over white."""
    image.load()
    with suppress(Exception):  # EXIF that cannot be parsed says nothing about the picture; viewers show it as it lies
        image = ImageOps.exif_transpose(image)
    return Picture(np.array(_to_rgb(image)))


def _to_rgb(image: PILImage.Image) -> PILImage.Image:
    if image.mode.startswith("I;16"):
        return _grey(np.asarray(image, dtype=np.float32) / 257)
    if image.mode in ("I", "F"):  # whatever range a program chose
        values = np.nan_to_num(np.asarray(image, dtype=np.float32))
        top = values.max(initial=0)
        return _grey(values / 257 if top > 255 else values * 255 if image.mode == "F" and top <= 1 else values)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = PILImage.new("RGBA", image.size, (255, 255, 255, 255))
        return PILImage.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _grey(values: np.ndarray) -> PILImage.Image:
    return PILImage.fromarray(np.clip(values, 0, 255).astype(np.uint8)).convert("RGB")


def decode_audio(item: MediaItem, rate_hz: int, limits: Limits = LIMITS) -> Sound:
    """Decode one recording to mono at a rate. Channels are averaged.

    Raises:
        MediaError: Missing, broken, truncated, silent or too long.
    """
    if isinstance(item.decoded, Sound):
        wave, source_hz = item.decoded.waveform, item.decoded.sample_rate_hz
    else:
        with _about(item):
            wave, source_hz = _decode_samples(item, limits)
    if wave.size == 0:
        raise MediaError(f"{item.name()}: has no samples, so there is nothing to hear. Replace the recording")
    if not np.isfinite(wave).all():
        raise MediaError(f"{item.name()}: has samples that are not numbers. Replace the recording")
    if float(np.abs(wave).max()) < QUIETEST:
        raise MediaError(
            f"{item.name()}: is silent (its loudest sample is below {QUIETEST:g} of full scale), so there is nothing "
            "to hear. Replace the recording"
        )
    with _about(item):
        wave = resample(wave, source_hz, rate_hz)
    if wave.size == 0:
        raise MediaError(f"{item.name()}: is shorter than one sample at {rate_hz} Hz. Replace the recording")
    return Sound(wave, rate_hz)


def _decode_samples(item: MediaItem, limits: Limits) -> tuple[np.ndarray, int]:
    import soundfile

    data = _read(item, limits)
    missing = _missing_wav_bytes(data)
    if missing:
        raise MediaError(
            f"{item.name()}: is truncated: its header announces {missing} more bytes of sound than the file has. "
            "Copy or record it again"
        )
    try:
        file = soundfile.SoundFile(io.BytesIO(_with_length(data)))
    except soundfile.LibsndfileError:
        clip = _decode_av(data, None, limits, item)
        if clip.sound is None:
            raise MediaError(f"{item.name()}: holds no sound that can be decoded. Replace the recording") from None
        return clip.sound.waveform, clip.sound.sample_rate_hz
    with file:
        _check_length(file.frames, file.samplerate, limits, item)
        blocks = [np.zeros(0, np.float32)]
        while len(block := file.read(2**16, dtype="float32", always_2d=True)):
            blocks.append(block.mean(1))
        wave = np.concatenate(blocks)
        if len(wave) < file.frames:
            raise MediaError(
                f"{item.name()}: is truncated: its header announces {file.frames} samples and the file has "
                f"{len(wave)}. Copy or record it again"
            )
        return wave, int(file.samplerate)


def _check_length(num_samples: int, rate_hz: int, limits: Limits, item: MediaItem) -> None:
    if num_samples > limits.max_samples or num_samples > limits.max_seconds * rate_hz:
        raise MediaError(
            f"{item.name()}: has {num_samples} samples at {rate_hz} Hz, and at most {limits.max_samples} samples and "
            f"{limits.max_seconds:.0f} s are decoded. Cut it"
        )


def _missing_wav_bytes(data: bytes) -> int:
    """How many bytes of sound a WAV header announces beyond the end of the file (0 for other formats)."""
    found = _wav_sound(data)
    return 0 if found is None or _was_streamed(data, found[1]) else max(0, found[0] + found[1] - len(data))


def _wav_sound(data: bytes) -> tuple[int, int] | None:
    """Where the sound of a WAV file begins, and how many bytes its header announces."""
    if data[:4] != b"RIFF" or data[8:12] != b"WAVE":
        return None
    at = 12
    while at + 8 <= len(data):
        name, size = struct.unpack("<4sI", data[at : at + 8])
        if name == b"data":
            return at + 8, size
        at += 8 + size + size % 2
    return None


def _was_streamed(data: bytes, announced: int) -> bool:
    """Whether a WAV file is by a program that could not go back to fill its lengths in (sox, ffmpeg into a pipe)."""
    (whole,) = struct.unpack("<I", data[4:8])
    return announced >= 0x7FFF0000 or (announced == 0 and whole != len(data) - 8)


def _with_length(data: bytes) -> bytes:
    """A streamed WAV file with the length of its sound, where it says 0."""
    found = _wav_sound(data)
    if found is None or found[1] > 0 or not _was_streamed(data, found[1]):
        return data
    return data[: found[0] - 4] + struct.pack("<I", len(data) - found[0]) + data[found[0] :]


def resample(wave: np.ndarray, from_hz: int, to_hz: int) -> np.ndarray:
    """Resample a mono waveform; its length is exactly `layout.resampled_count`."""
    if from_hz != to_hz:
        import soxr

        count = resampled_count(len(wave), from_hz, to_hz)
        wave = soxr.resample(wave, from_hz, to_hz)
        wave = np.pad(wave[:count], (0, max(0, count - len(wave))))
    return np.ascontiguousarray(wave, dtype=np.float32)


def decode_video(item: MediaItem, media: MediaSpec, limits: Limits = LIMITS) -> Clip:
    """Decode the frames that a model looks at and the sound track, in one pass.

    The sound is laid on the video's own time: it is cut or padded to the video's duration.

    Raises:
        MediaError: Missing, broken, without pictures, or too long.
    """
    if isinstance(item.decoded, Clip):
        return item.decoded
    with _about(item):
        clip = _decode_av(_read(item, limits), media, limits, item)
        if not clip.frames:
            raise MediaError(f"{item.name()}: holds no pictures. Give it as audio, or replace the file")
        return clip
    raise AssertionError


def _decode_av(data: bytes, media: MediaSpec | None, limits: Limits, item: MediaItem) -> Clip:
    """Decode with FFmpeg: the frames that ``media`` wants and the sound, or with None the sound alone."""
    import av

    with av.open(io.BytesIO(data)) as container:
        video = container.streams.video[0] if container.streams.video and media is not None else None
        audio = container.streams.audio[0] if container.streams.audio else None
        main = video or audio
        if main is None:
            return Clip((), 0.0, None)
        duration = _duration_s(container, main) or _measured_duration_s(data, main.index)
        if duration > limits.max_seconds:
            raise MediaError(
                f"{item.name()}: lasts {duration:.0f} s, and at most {limits.max_seconds:.0f} s are decoded. Cut it"
            )
        if video is not None:
            _check_frame(video.codec_context.width, video.codec_context.height, limits, item)
        wanted = [] if video is None or media is None else frame_times_s(duration, media.video)
        origin = max(0.0, float(container.start_time or 0) / 1_000_000)  # broadcasts do not begin at 0
        eyes, ears = _Eyes(wanted, limits, item), _Ears(limits, item)
        deadline, end = time.monotonic() + limits.max_decode_s, math.inf
        for packet in container.demux([s for s in (video, audio) if s is not None]):
            if packet.pts is not None and packet.time_base is not None:
                until = float((packet.pts + (packet.duration or 0)) * packet.time_base) - origin
                end = until if end == math.inf else max(end, until)
            for frame in packet.decode():
                if isinstance(frame, av.AudioFrame):
                    ears.hear(frame, origin)
                else:
                    eyes.see(frame, origin, video.average_rate if video is not None else None)
            if time.monotonic() > deadline:
                raise MediaError(f"{item.name()}: takes longer than {limits.max_decode_s:g} s to decode. Cut it")
        knows = container.format.name.split(",")[0] in ("matroska", "mov", "avi")  # others guess from the bit rate
        if knows and duration - end > max(1.0, 0.1 * duration):
            raise MediaError(
                f"{item.name()}: is truncated: its header announces {duration:.2f} s and it ends at {end:.2f} s. "
                "Copy or record it again"
            )
        return Clip(eyes.chosen(), duration, ears.sound(duration if video is not None else None))


class _Eyes:
    """Chooses from the frames, as they come, those that are on the screen at the wanted times."""

    def __init__(self, wanted: list[float], limits: Limits, item: MediaItem) -> None:
        self.wanted, self.limits, self.item = wanted, limits, item
        self.frames: list[Picture] = []
        self.last: Any = None
        self.count = 0

    def see(self, frame: Any, origin_s: float, fps: Any) -> None:
        """The next frame; without a clock of its own it comes ``1 / fps`` after the one before."""
        clock = self.count / float(fps or 25) if frame.time is None else float(frame.time) - origin_s
        while self.last is not None and len(self.frames) < len(self.wanted) and clock > self.wanted[len(self.frames)]:
            self._keep()
        self.last = frame
        self.count += 1

    def chosen(self) -> tuple[Picture, ...]:
        while self.last is not None and len(self.frames) < len(self.wanted):
            self._keep()
        return tuple(self.frames)

    def _keep(self) -> None:
        _check_frame(self.last.width, self.last.height, self.limits, self.item)
        pixels = self.last.to_ndarray(format="rgb24")
        turns = round(self.last.rotation / 90) % 4  # telephones film lying down and say how to turn it
        self.frames.append(Picture(np.ascontiguousarray(np.rot90(pixels, turns)) if turns else pixels))


class _Ears:
    """Collects sound as it comes, with the clock of each stretch."""

    def __init__(self, limits: Limits, item: MediaItem) -> None:
        self.limits, self.item = limits, item
        self.chunks: list[tuple[float, np.ndarray]] = []
        self.rate_hz = 0
        self.count = 0

    def hear(self, frame: Any, origin_s: float) -> None:
        samples = _mono(frame)
        if self.rate_hz not in (0, frame.sample_rate):
            raise MediaError(f"{self.item.name()}: changes its sample rate on the way. Encode it again at one rate")
        self.rate_hz = int(frame.sample_rate)
        clock = self.count / self.rate_hz if frame.time is None else float(frame.time) - origin_s
        self.chunks.append((clock, samples))
        self.count += len(samples)
        _check_length(self.count, self.rate_hz, self.limits, self.item)

    def sound(self, duration_s: float | None) -> Sound | None:
        """All of it: on a video's timeline, or from its own beginning."""
        if not self.chunks:
            return None
        if duration_s is None:
            start = self.chunks[0][0]
            self.chunks = [(clock - start, samples) for clock, samples in self.chunks]
            duration_s = self.chunks[-1][0] + len(self.chunks[-1][1]) / self.rate_hz
            duration_s = min(max(duration_s, self.count / self.rate_hz), self.limits.max_seconds)
        wave = _on_timeline(self.chunks, self.rate_hz, round(duration_s * self.rate_hz))
        if not np.isfinite(wave).all():
            raise MediaError(f"{self.item.name()}: has samples that are not numbers. Replace the recording")
        return Sound(wave, self.rate_hz)


def _duration_s(container: Any, stream: Any) -> float:
    """Length as the header has it; 0 if it does not say."""
    if stream.duration is not None and stream.time_base is not None:
        return max(0.0, float(stream.duration * stream.time_base))
    return max(0.0, float(container.duration or 0) / 1_000_000)


def _measured_duration_s(data: bytes, index: int) -> float:
    """Length by the clocks of all packets, for recordings whose header could not know it (a browser's, say)."""
    import av

    first, end, count, fps = math.inf, 0.0, 0, 25.0
    with av.open(io.BytesIO(data)) as container:
        stream = container.streams[index]
        fps = float(getattr(stream, "average_rate", None) or fps)
        for packet in container.demux(stream):
            count += bool(packet.size)
            if packet.pts is not None and packet.time_base is not None:
                first = min(first, float(packet.pts * packet.time_base))
                end = max(end, float((packet.pts + (packet.duration or 0)) * packet.time_base))
    return end - first if end > first else count / fps


def _check_frame(width: int, height: int, limits: Limits, item: MediaItem) -> None:
    if width * height > limits.max_pixels:
        raise MediaError(
            f"{item.name()}: its frames are {width} x {height} pixels, and {_at_most(limits)} are decoded. "
            "Make it smaller"
        )


def _mono(frame: Any) -> np.ndarray:
    """Average the channels ourselves: libswresample's downmix is louder by the square root of two."""
    samples: np.ndarray = frame.to_ndarray()
    if not frame.format.is_planar:
        samples = samples.reshape(-1, frame.layout.nb_channels).T
    if samples.dtype.kind in "iu":
        full = float(2 ** (8 * samples.dtype.itemsize - 1))
        middle = full if samples.dtype.kind == "u" else 0.0
        samples = (samples.astype(np.float32) - middle) / full
    mono: np.ndarray = samples.astype(np.float32).mean(0)
    return mono


JITTER_S = 0.2
"""Clocks of sound that are off by less are taken for imprecise; by more, for a gap or an overlap."""


def _on_timeline(chunks: list[tuple[float, np.ndarray]], rate_hz: int, count: int) -> np.ndarray:
    """Lay decoded sound where its clock says, ``count`` samples from time 0."""
    wave = np.zeros(count, np.float32)
    at: int | None = None
    for clock, samples in chunks:
        due = round(clock * rate_hz)
        if at is None or abs(due - at) > JITTER_S * rate_hz:
            at = due if at is None else max(due, at)
            samples = samples[at - due :]
        first, last = max(0, at), min(count, at + len(samples))
        if first < last:
            wave[first:last] = samples[first - at : last - at]
        at += len(samples)
    return wave
