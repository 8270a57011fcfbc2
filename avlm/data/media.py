"""Decode pictures, sounds and videos, under limits, into what encoders take.

Two steps. `decode_*` turn a file into pixels or a waveform, and every way in which
that can fail is a `MediaError` about that one item. `prepare_*` apply an encoder's
spec: resize in torch, Whisper's log-mel in torch. What is prepared is small, the same
every time, and kept in memory by `MediaReader` while there is room.

Shapes in this file:
    B  mel bins    M  mel frames    S  samples
"""

from __future__ import annotations

import io
import math
import stat
import struct
import threading
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image as PILImage
from PIL import ImageOps
from torch import Tensor
from torch.nn import functional as F
from transformers.audio_utils import mel_filter_bank

from avlm.config.media import AudioSpec, MediaSpec, VisionSpec
from avlm.errors import AvlmError, MediaError
from avlm.layout import VideoFacts, frame_times_s, resampled_count
from avlm.samples import Clip, MediaItem, Picture, Sound


@dataclass(frozen=True, slots=True)
class Limits:
    """What a file may be before it is refused unread, or half read."""

    max_bytes: int = 512 * 2**20
    max_pixels: int = 100_000_000
    max_seconds: float = 3600.0


LIMITS = Limits()
QUIETEST = 1e-4
"""A recording whose loudest sample is below this (-80 dB) is silent."""


@dataclass(frozen=True, slots=True)
class PreparedImage:
    """uint8 [3, side, side]."""

    pixels: Tensor


@dataclass(frozen=True, slots=True)
class PreparedAudio:
    """float32 [B, M], with the length that its layout follows from."""

    mel: Tensor
    num_samples: int


@dataclass(frozen=True, slots=True)
class PreparedVideo:
    """Frames in order, the sound track's mel (None without sound), and the facts of its layout."""

    frames: tuple[Tensor, ...]
    mel: Tensor | None
    facts: VideoFacts


Prepared = PreparedImage | PreparedAudio | PreparedVideo


# ---------------------------------------------------------------- decoding


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
            f"{item.name()}: not readable as {_article(item.kind)} ({kind}). Replace the file, or remove it from the sample"
        ) from error


def _article(kind: str) -> str:
    return {"image": "a picture", "audio": "a recording", "video": "a video"}[kind]


def _read(item: MediaItem, limits: Limits) -> bytes:
    """The item's bytes, refused before they are read when they are too many or no file at all."""
    if item.data is not None:
        data = item.data
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
            raise MediaError(f"{path}: is not a regular file. Give the path of {_article(item.kind)}")
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
        with PILImage.open(io.BytesIO(_read(item, limits))) as image:
            if image.width * image.height > limits.max_pixels:
                raise MediaError(
                    f"{item.name()}: is {image.width} x {image.height} pixels, and at most {limits.max_pixels} are decoded. "
                    "Make it smaller"
                )
            image.load()
            upright = ImageOps.exif_transpose(image)
            return Picture(np.array(_to_rgb(upright)))
    raise AssertionError


def _to_rgb(image: PILImage.Image) -> PILImage.Image:
    if image.mode in ("I", "I;16", "I;16B", "F"):
        values = np.asarray(image, dtype=np.float32)
        scale = 257.0 if values.max(initial=0) > 255 else 1.0
        return PILImage.fromarray(np.clip(values / scale, 0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = PILImage.new("RGBA", image.size, (255, 255, 255, 255))
        return PILImage.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


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
            f"{item.name()}: is silent (its loudest sample is below {QUIETEST:g} of full scale), so there is nothing to hear. "
            "Replace the recording"
        )
    return Sound(resample(wave, source_hz, rate_hz), rate_hz)


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
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            if file.frames / file.samplerate > limits.max_seconds:
                raise MediaError(
                    f"{item.name()}: lasts {file.frames / file.samplerate:.0f} s, and at most {limits.max_seconds:.0f} s are "
                    "decoded. Cut it"
                )
            samples = file.read(dtype="float32", always_2d=True)
            return samples.mean(1), int(file.samplerate)
    except soundfile.LibsndfileError:
        clip = _decode_av(data, None, limits, item)
        if clip.sound is None:
            raise MediaError(f"{item.name()}: holds no sound that can be decoded. Replace the recording") from None
        return clip.sound.waveform, clip.sound.sample_rate_hz


def _missing_wav_bytes(data: bytes) -> int:
    """How many bytes of sound a WAV header announces beyond the end of the file (0 for other formats)."""
    if data[:4] != b"RIFF" or data[8:12] != b"WAVE":
        return 0
    at = 12
    while at + 8 <= len(data):
        name, size = struct.unpack("<4sI", data[at : at + 8])
        if name == b"data":
            streamed = size in (0, 0xFFFFFFFF)  # written by a program that could not go back to fill it in
            return 0 if streamed else max(0, at + 8 + size - len(data))
        at += 8 + size + size % 2
    return 0


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
    import av

    with av.open(io.BytesIO(data)) as container:
        video = container.streams.video[0] if container.streams.video and media is not None else None
        audio = container.streams.audio[0] if container.streams.audio else None
        duration = _duration_s(container, video or audio)
        if duration > limits.max_seconds:
            raise MediaError(
                f"{item.name()}: lasts {duration:.0f} s, and at most {limits.max_seconds:.0f} s are decoded. Cut it"
            )
        times = frame_times_s(duration, media.video) if video is not None and media is not None else []
        frames: list[Picture] = []
        last: Any = None
        chunks: list[tuple[float, np.ndarray]] = []
        for frame in container.decode([s for s in (video, audio) if s is not None]):
            if isinstance(frame, av.AudioFrame):
                chunks.append((float(frame.time or 0.0), _mono(frame)))
                continue
            while len(frames) < len(times) and last is not None and float(frame.time or 0.0) > times[len(frames)]:
                frames.append(_picture(last, limits, item))
            last = frame
        while last is not None and len(frames) < len(times):
            frames.append(_picture(last, limits, item))
        sound = None
        if chunks and audio is not None:
            sound = Sound(_on_timeline(chunks, audio.rate, duration if video is not None else None), audio.rate)
        return Clip(tuple(frames), duration, sound)


def _duration_s(container: Any, stream: Any) -> float:
    if stream is not None and stream.duration is not None and stream.time_base is not None:
        return float(stream.duration * stream.time_base)
    return float(container.duration or 0) / 1_000_000


def _picture(frame: Any, limits: Limits, item: MediaItem) -> Picture:
    if frame.width * frame.height > limits.max_pixels:
        raise MediaError(f"{item.name()}: its frames are {frame.width} x {frame.height} pixels. Make it smaller")
    return Picture(frame.to_ndarray(format="rgb24"))


def _mono(frame: Any) -> np.ndarray:
    """Average the channels ourselves: libswresample's downmix is louder by the square root of two."""
    samples = frame.to_ndarray()
    if not frame.format.is_planar:
        samples = samples.reshape(-1, frame.layout.nb_channels).T
    if samples.dtype.kind in "iu":
        info = np.iinfo(samples.dtype)
        middle = 128 if samples.dtype.kind == "u" else 0
        samples = (samples.astype(np.float32) - middle) / (info.max if middle == 0 else 128)
    return samples.astype(np.float32).mean(0)


def _on_timeline(chunks: list[tuple[float, np.ndarray]], rate_hz: int, duration_s: float | None) -> np.ndarray:
    """Join decoded sound, starting where its clock says, to the video's length."""
    joined = np.concatenate([samples for _, samples in chunks])
    late = round(chunks[0][0] * rate_hz)
    joined = np.pad(joined, (late, 0)) if late > 0 else joined[-late:]
    if duration_s is None:
        return joined
    count = round(duration_s * rate_hz)
    return np.pad(joined[:count], (0, max(0, count - len(joined))))


# ---------------------------------------------------------------- preparing


def prepare_image(picture: Picture, spec: VisionSpec) -> Tensor:
    """Resize a picture to the encoder's square: uint8 [3, side, side].

    Source:
        Antialiased bicubic, as Pillow's within one grey level.
    """
    pixels = torch.from_numpy(np.ascontiguousarray(picture.pixels)).permute(2, 0, 1)
    side = spec.image_size_px
    if spec.fit == "crop":
        pixels = _centre_square(pixels)
    elif spec.fit == "pad":
        pixels = _padded_square(pixels, spec)
    if pixels.shape[1:] == (side, side):
        return pixels.contiguous()
    return F.interpolate(pixels[None], (side, side), mode="bicubic", antialias=True)[0]


def _centre_square(pixels: Tensor) -> Tensor:
    height, width = pixels.shape[1:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return pixels[:, top : top + side, left : left + side]


def _padded_square(pixels: Tensor, spec: VisionSpec) -> Tensor:
    """Pad with the mean colour, which is zero after normalising (LLaVA-1.5)."""
    height, width = pixels.shape[1:]
    side = max(height, width)
    colour = torch.tensor([round(255 * m) for m in spec.mean], dtype=torch.uint8)
    square = colour[:, None, None].expand(3, side, side).clone()
    top, left = (side - height) // 2, (side - width) // 2
    square[:, top : top + height, left : left + width] = pixels
    return square


def normalise(pixels: Tensor, spec: VisionSpec) -> Tensor:
    """uint8 [..., 3, h, w] to float32, (x / 255 - mean) / std per channel."""
    mean = torch.tensor(spec.mean)[:, None, None]
    std = torch.tensor(spec.std)[:, None, None]
    return (pixels.float() / 255 - mean) / std


def log_mel(waveform: np.ndarray, spec: AudioSpec) -> Tensor:
    """Whisper's log-mel spectrogram: float32 [B, M].

    Args:
        waveform: Mono at ``spec.sample_rate_hz``.
        spec: With a window the sound is padded with silence to it; without, M is the sound's own.

    Source:
        arXiv:2212.04356, section 2.2, and the feature extractor released with it: power spectrum of a periodic Hann
        window, Slaney mel filters, log10 floored 8 below the clip's peak, (x + 4) / 4.
    """
    wave = torch.from_numpy(waveform)
    wanted = spec.n_fft if spec.window_frames is None else spec.window_frames * spec.hop
    if len(wave) < wanted:
        wave = F.pad(wave, (0, wanted - len(wave)))
    spectrum = torch.stft(wave, spec.n_fft, spec.hop, window=_hann(spec.n_fft), return_complex=True)
    power = spectrum[:, :-1].abs().square()
    mel = _mel_filters(spec.mel_bins, spec.n_fft, spec.sample_rate_hz) @ power
    log = mel.clamp(min=1e-10).log10()
    return (torch.maximum(log, log.max() - 8.0) + 4.0) / 4.0


def levelled(mel: Tensor, spec: AudioSpec) -> Tensor:
    """A clip's log-mel at the level that the encoder wants.

    With ``level="clip"``: what is 48 dB below the peak is floor, and the lower three quarters of the bins (a telephone
    has nothing above) get mean 0 and standard deviation 0.4.
    """
    if spec.level == "whisper":
        return mel
    mel = torch.maximum(mel, mel.max() - 1.2)
    heard = mel[: 3 * spec.mel_bins // 4]
    return (mel - heard.mean()) / (heard.std() + 1e-3) * 0.4


@lru_cache(maxsize=8)
def _hann(n_fft: int) -> Tensor:
    return torch.hann_window(n_fft)


@lru_cache(maxsize=8)
def _mel_filters(bins: int, n_fft: int, rate_hz: int) -> Tensor:
    filters = mel_filter_bank(
        num_frequency_bins=1 + n_fft // 2,
        num_mel_filters=bins,
        min_frequency=0.0,
        max_frequency=8000.0 if rate_hz == 16_000 else rate_hz / 2,
        sampling_rate=rate_hz,
        norm="slaney",
        mel_scale="slaney",
    )
    return torch.from_numpy(filters.T.astype(np.float32)).contiguous()


class MediaReader:
    """Decodes and prepares media for one model, remembering what is small enough to remember.

    Args:
        media: What the model sees and hears.
        cache_mb: Memory for prepared media; 0 remembers nothing. Safe for several threads.
    """

    def __init__(self, media: MediaSpec, cache_mb: int = 0, limits: Limits = LIMITS) -> None:
        self.media = media
        self.limits = limits
        self._room = cache_mb * 2**20
        self._kept: OrderedDict[tuple[str, Path], Prepared] = OrderedDict()
        self._lock = threading.Lock()

    def prepare(self, item: MediaItem) -> Prepared:
        """Decode and prepare one item.

        Raises:
            MediaError: It cannot be decoded, or the model has no sense for it.
        """
        key = (item.kind, item.path) if item.path is not None else None
        if key is not None:
            with self._lock:
                if key in self._kept:
                    self._kept.move_to_end(key)
                    return self._kept[key]
        prepared = self._prepare(item)
        if key is not None and self._room:
            self._remember(key, prepared)
        return prepared

    def _remember(self, key: tuple[str, Path], prepared: Prepared) -> None:
        with self._lock:
            if key not in self._kept:
                self._kept[key] = prepared
                self._room -= _size(prepared)
            while self._room < 0 and self._kept:
                _, oldest = self._kept.popitem(last=False)
                self._room += _size(oldest)

    def _prepare(self, item: MediaItem) -> Prepared:
        vision, audio = self.media.vision, self.media.audio
        if item.kind == "audio":
            if audio is None:
                raise MediaError(
                    f"{item.name()}: is a sound, and this model does not hear. Use a model with an audio part"
                )
            sound = decode_audio(item, audio.sample_rate_hz, self.limits)
            return PreparedAudio(self._mel(sound.waveform, item), len(sound.waveform))
        if vision is None:
            raise MediaError(
                f"{item.name()}: is {_article(item.kind)}, and this model does not see. Use a model with a vision part"
            )
        if item.kind == "image":
            return PreparedImage(prepare_image(decode_image(item, self.limits), vision))
        clip = decode_video(item, self.media, self.limits)
        frames = tuple(prepare_image(frame, vision) for frame in clip.frames)
        mel, count = None, 0
        if audio is not None and clip.sound is not None and self.media.video.order != "video":
            wave = resample(clip.sound.waveform, clip.sound.sample_rate_hz, audio.sample_rate_hz)
            mel, count = self._mel(wave, item), len(wave)
        return PreparedVideo(frames, mel, VideoFacts(clip.duration_s, count))

    def _mel(self, wave: np.ndarray, item: MediaItem) -> Tensor:
        spec = self.media.audio
        assert spec is not None
        longest = (spec.window_frames or spec.max_frames) * spec.hop
        if len(wave) >= longest + spec.hop:
            raise MediaError(
                f"{item.name()}: lasts {len(wave) / spec.sample_rate_hz:.2f} s, and the audio encoder hears at most "
                f"{longest / spec.sample_rate_hz:g} s. Cut it into shorter clips"
            )
        return log_mel(wave[:longest], spec)


def _size(prepared: Prepared) -> int:
    tensors = {
        PreparedImage: lambda p: [p.pixels],
        PreparedAudio: lambda p: [p.mel],
        PreparedVideo: lambda p: [*p.frames, *([] if p.mel is None else [p.mel])],
    }[type(prepared)](prepared)
    return int(sum(math.prod(t.shape) * t.element_size() for t in tensors))
