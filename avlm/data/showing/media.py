"""Media inside a page: small enough to send by mail, in forms that every browser plays."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

from avlm.config.media import MediaSpec
from avlm.data.checking.look import ANYTHING, decoded_of
from avlm.data.decoding.decode import resample
from avlm.data.decoding.files import Limits, read
from avlm.data.showing.page import duration, esc
from avlm.errors import DataError
from avlm.layout import frame_times_s
from avlm.samples import Clip, MediaItem, Picture, Sound

MAX_PAGE = 40_000_000
"""Characters that all media may take on a page; what comes behind that is only named."""
MAX_RAW = 3_000_000
"""Bytes of a video that goes into the page as it is."""
SHOWN_PX = 640
TILE_PX = 112
FRAME_PX = 160
HEARD_S = 60.0
"""Seconds of a sound that can be played in the page."""
PLAYED_HZ = 16_000

VIDEOS = ((b"\x1aE\xdf\xa3", 0, "webm"), (b"ftyp", 4, "mp4"))
"""How files begin that browsers play: the letters, where they stand, and the type."""


class Shown:
    """Puts media into a page until it is full."""

    def __init__(self, spec: MediaSpec, limits: Limits, *, room: int = MAX_PAGE) -> None:
        self.spec = spec if spec.vision is not None and spec.audio is not None else ANYTHING
        """Which frames of a video are looked at."""
        self.limits = limits
        self.left = room
        self.named = 0
        """Media that found no room."""

    def figure(self, item: MediaItem, number: int, seen: str = "") -> str:
        """A medium with its name and size, or its name and why it is not shown.

        Args:
            number: Which of the sample's media it is, from 1.
            seen: HTML of what the encoder makes of it.
        """
        try:
            decoded = decoded_of(item, self.limits, self.spec)
            body, facts = self._body(item, decoded)
        except DataError as error:
            return _figure(item, number, f'<p class="wrong">{esc(error.reason)}</p>', "cannot be read")
        if len(body) + len(seen) > self.left:
            self.named += 1
            body, seen = "", ""
            facts += "; no room is left on this page"
        self.left -= len(body) + len(seen)
        return _figure(item, number, body + seen, facts)

    def _body(self, item: MediaItem, decoded: Picture | Sound | Clip) -> tuple[str, str]:
        if isinstance(decoded, Picture):
            high, wide = decoded.pixels.shape[:2]
            return picture(decoded.pixels, SHOWN_PX, item.alt or item.name()), f"{wide} \u00d7 {high} px"
        if isinstance(decoded, Sound):
            return _sound(decoded), duration(len(decoded.waveform) / decoded.sample_rate_hz)
        return self._video(item, decoded)

    def _video(self, item: MediaItem, clip: Clip) -> tuple[str, str]:
        parts = []
        if not item.is_cut() and item.decoded is None:
            data = read(item, self.limits)
            kind = next((kind for letters, at, kind in VIDEOS if data[at:].startswith(letters)), None)
            if kind is not None and len(data) <= MAX_RAW:
                label = esc(f"video {item.name()}")
                uri = f"data:video/{kind};base64,{base64.b64encode(data).decode()}"
                parts.append(f'<video controls preload="metadata" aria-label="{label}" src="{uri}"></video>')
        times = frame_times_s(clip.duration_s, self.spec.video) if item.decoded is None else []
        parts.append(strip([frame.pixels for frame in clip.frames], [f"{t:.1f} s" for t in times], FRAME_PX))
        if clip.sound is not None:
            parts.append(_sound(clip.sound, plays=len(parts) == 1))
        looks = f"{len(clip.frames)} frame{'' if len(clip.frames) == 1 else 's'} looked at"
        heard = "with sound" if clip.sound is not None else "without sound"
        return "".join(parts), f"{duration(clip.duration_s)}, {looks}, {heard}"


def _figure(item: MediaItem, number: int, body: str, facts: str) -> str:
    alt = f'<br><q dir="auto">{esc(item.alt)}</q>' if item.alt else ""
    name = item.title or (item.path.name if item.path is not None else item.name())
    return (
        f'<figure class="medium {item.kind}">{body}<figcaption><b>{item.kind} {number}</b> '
        f'<span dir="auto" title="{esc(item.name())}">{esc(name)}</span> \u00b7 {esc(facts)}{alt}</figcaption></figure>'
    )


def picture(pixels: np.ndarray, most_px: int, alt: str) -> str:
    """uint8 [h, w, 3] as an image, no larger than that; small ones are enlarged without a blur."""
    high, wide = pixels.shape[:2]
    scale = min(1.0, most_px / max(high, wide))
    image = Image.fromarray(np.ascontiguousarray(pixels))
    if scale < 1:
        image = image.resize((max(1, round(wide * scale)), max(1, round(high * scale))), Image.Resampling.LANCZOS)
    small = max(high, wide) < 128
    shown = f' class="pixels" width="{image.width * (128 // max(high, wide) or 1)}"' if small else ""
    return f'<img alt="{esc(alt)}"{shown} src="{_uri(image)}">'


def strip(pictures: Sequence[np.ndarray], labels: Sequence[str], most_px: int) -> str:
    """Small pictures side by side, with a word below each."""
    figures = [
        f"<span>{picture(pixels, most_px, label or f'picture {i + 1}')}<small>{esc(label)}</small></span>"
        for i, (pixels, label) in enumerate(zip(pictures, [*labels, *[""] * len(pictures)], strict=False))
    ]
    return f'<div class="strip" role="group" tabindex="0" aria-label="{len(figures)} pictures">{"".join(figures)}</div>'


def _uri(image: Image.Image) -> str:
    """An image as data: a PNG where that is small or the picture is, else a JPEG."""
    exact = io.BytesIO()
    image.save(exact, "PNG")
    kind, data = "png", exact.getvalue()
    if len(data) > 60_000:
        lossy = io.BytesIO()
        image.save(lossy, "JPEG", quality=85)
        if len(lossy.getvalue()) < len(data):
            kind, data = "jpeg", lossy.getvalue()
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _sound(sound: Sound, plays: bool = True) -> str:
    """How a sound looks, and something to play it with."""
    wave = resample(sound.waveform, sound.sample_rate_hz, PLAYED_HZ)
    seen = picture(spectrogram(wave), 10_000, "spectrogram: time to the right, pitch upwards")
    looks = seen.replace("<img", '<img class="spectrogram"', 1).replace(' class="pixels"', "", 1)
    if not plays:
        return looks
    heard = wave[: int(HEARD_S * PLAYED_HZ)]
    player = f'<audio controls preload="metadata" aria-label="sound" src="{_wav(heard)}"></audio>'
    rest = f"<small>the first {HEARD_S:.0f} s</small>" if len(heard) < len(wave) else ""
    return looks + player + rest


def _wav(wave: np.ndarray) -> str:
    import soundfile

    out = io.BytesIO()
    soundfile.write(out, wave, PLAYED_HZ, format="WAV", subtype="PCM_16")
    return f"data:audio/wav;base64,{base64.b64encode(out.getvalue()).decode()}"


def spectrogram(wave: np.ndarray, width: int = 480, height: int = 80) -> np.ndarray:
    """uint8 [height, width, 3]: how loud each pitch is at each moment, 60 decibels from white to ink.

    Args:
        wave: At 16 kHz.
    """
    wave = np.pad(wave, (0, max(0, 512 - len(wave))))
    starts = np.linspace(0, len(wave) - 512, width).astype(int)
    frames = wave[starts[:, None] + np.arange(512)] * np.hanning(512)
    power = np.abs(np.fft.rfft(frames, axis=1)) ** 2
    edges = np.geomspace(2, power.shape[1], height + 1)  # from 62 Hz on, by octaves
    sums = np.concatenate([np.zeros((width, 1)), np.cumsum(power, axis=1)], axis=1)
    at = np.arange(power.shape[1] + 1)
    below = np.stack([np.interp(edges, at, row) for row in sums])
    loud = np.diff(below, axis=1) / np.diff(edges)
    level = 10 * np.log10(loud / max(float(loud.max()), 1e-20) + 1e-6) / 60 + 1
    return painted(level.T[::-1])


def painted(level: np.ndarray) -> np.ndarray:
    """Numbers from 0 to 1 as colours from white over blue to black: uint8 [h, w, 3]."""
    stops = np.array([[244, 245, 247], [150, 190, 235], [27, 95, 174], [12, 18, 30]], np.float32)
    place = np.clip(level, 0, 1) * (len(stops) - 1)
    low = np.minimum(place.astype(int), len(stops) - 2)
    share = (place - low)[..., None]
    colours: np.ndarray = (stops[low] * (1 - share) + stops[low + 1] * share).astype(np.uint8)
    return colours
