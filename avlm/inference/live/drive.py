"""Who feeds a session: a timeline or a recording in model time, a stream of PCM, or a microphone."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from avlm.data.decoding.decode import decode_audio
from avlm.data.given import media_item
from avlm.data.voice.gate import FRAME, SAMPLE_RATE_HZ
from avlm.data.voice.timeline import Moment, Rendered, read_timeline, render
from avlm.errors import MissingExtraError
from avlm.inference.live.session import Event, Session
from avlm.samples import MediaItem

CHUNK = 5 * FRAME
"""Samples of a chunk of a stream: 100 ms."""


def open_timeline(path: Path) -> tuple[list[Moment], Rendered]:
    """A timeline with its sounds, or a recording as one.

    Raises:
        DataError: It is neither.
        MediaError: A sound cannot be read.
    """
    moments = read_timeline(path)
    sounds = [_sound(path.parent / moment.sound) if moment.sound else None for moment in moments]
    return moments, render(moments, sounds)


def _sound(path: Path) -> np.ndarray:
    return decode_audio(MediaItem("audio", path=path), SAMPLE_RATE_HZ).waveform


def play(session: Session, moments: list[Moment], rendered: Rendered, folder: Path) -> Iterator[Event]:
    """Let a timeline happen, as fast as the machine can; with `Costs` the events are the same everywhere.

    Args:
        folder: Where the timeline's pictures lie.

    Yields:
        What happened, in order.
    """
    at = 0
    for moment in moments:
        if moment.sound:
            continue
        start = round(moment.at_s * SAMPLE_RATE_HZ)
        yield from session.hear(rendered.wave[at:start])
        at = max(at, min(start, len(rendered.wave)))
        if moment.image:
            session.show(media_item("image", folder / moment.image))
        else:
            yield from session.type(moment.text)
    yield from session.hear(rendered.wave[at:])
    yield from session.finish()


def stream(session: Session, file: BinaryIO) -> Iterator[Event]:
    """Listen to raw PCM, 16 bits, mono, 16 kHz, until it ends.

    Yields:
        What happened, as it happens.
    """
    odd = b""
    while chunk := file.read(2 * CHUNK):
        whole = odd + chunk
        even = len(whole) // 2 * 2
        odd = whole[even:]
        yield from session.hear(from_pcm(whole[:even]))
    yield from session.finish()


def from_pcm(data: bytes) -> np.ndarray:
    """16-bit little-endian samples as float32 within -1 to 1."""
    return np.frombuffer(data, "<i2").astype(np.float32) / 32768


def to_pcm(wave: np.ndarray) -> bytes:
    """The reverse of `from_pcm`."""
    return (wave.clip(-1, 32767 / 32768) * 32768).astype("<i2").tobytes()


def microphone(session: Session) -> Iterator[Event]:
    """Listen to the microphone and speak through the loudspeaker until the process is stopped.

    Yields:
        What happened, as it happens.

    Raises:
        MissingExtraError: sounddevice is not installed.
    """
    try:
        import sounddevice
    except ImportError:
        raise MissingExtraError("sounddevice", "microphone", "Listening to a microphone") from None
    taken: queue.SimpleQueue[np.ndarray] = queue.SimpleQueue()
    mouth = Mouth()

    def take(samples: np.ndarray, frames: int, time: Any, status: Any) -> None:
        taken.put(samples[:, 0].copy())

    def give(samples: np.ndarray, frames: int, time: Any, status: Any) -> None:
        samples[:, 0] = mouth.next(frames)

    settings: dict[str, Any] = {"samplerate": SAMPLE_RATE_HZ, "channels": 1, "dtype": "float32", "blocksize": FRAME}
    with sounddevice.InputStream(callback=take, **settings), sounddevice.OutputStream(callback=give, **settings):
        while True:
            waiting = [taken.get()]
            while not taken.empty():
                waiting.append(taken.get())
            for event in session.hear(np.concatenate(waiting)):
                if event["event"] == "speech":
                    mouth.say(event["wave"])
                elif event["event"] == "interrupted":
                    mouth.hush()
                yield event


class Mouth:
    """Pieces of speech one behind the other, handed out as a loudspeaker asks for them, from another thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._rest = np.zeros(0, np.float32)

    def say(self, wave: np.ndarray) -> None:
        """This too, behind what is being said."""
        with self._lock:
            self._rest = np.concatenate([self._rest, wave])

    def hush(self) -> None:
        """Nothing of what was still to be said."""
        with self._lock:
            self._rest = self._rest[:0]

    def next(self, samples: int) -> np.ndarray:
        """So many samples; silence where there is nothing to say."""
        with self._lock:
            given, self._rest = self._rest[:samples], self._rest[samples:]
        return np.pad(given, (0, samples - len(given)))
