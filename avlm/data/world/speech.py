"""Spoken words, synthesised by espeak-ng in a process of its own.

espeak-ng comes with the package espeakng-loader and is called through ctypes. It is not
stateless: the same phrase twice in one process differs by a few samples. The same list
in the same order in a fresh process repeats exactly, so all recordings of a world are
made by one run of ``python -m avlm.data.world.speech LIST``.

LIST is a file of JSON lines with the fields of :class:`Utterance`; it stays beside the
data as the record of who said what.
"""

import ctypes
import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soxr

from avlm.data.world.sounds import SAMPLE_RATE_HZ, write_wav
from avlm.data.world.words import Split
from avlm.errors import AvlmError, MissingExtraError

# Chosen by what a word classifier that has not heard the voice makes of it, with no near
# twins across the two lists. Whispers, robots and croaks are left out.
VOICES: dict[Split, tuple[str, ...]] = {
    "train": (
        "en-us", "en-gb-x-rp", "en-gb-scotland", "en-gb-x-gbcwmd",
        "en-us+m1", "en-us+m2", "en-us+m3", "en-us+m4", "en-us+m5", "en-us+m6", "en-us+m7",
        "en-us+f1", "en-us+f3", "en-us+aunty", "en-us+grandpa", "en-us+grandma",
        "en-us+Henrique", "en-us+Mike", "en-us+Nguyen", "en-us+max", "en-us+edward",
        "en-us+paul", "en-us+Gene", "en-us+sandro", "en-us+rob", "en-us+victor",
        "en-us+iven3", "en-us+caleb", "en-us+quincy", "en-us+steph2", "en-us+belinda",
        "en-us+linda", "en-gb-x-rp+f1", "en-gb-x-rp+m3",
    ),
    "eval": (
        "en-us+m8", "en-us+f2", "en-us+f4", "en-us+Denis", "en-us+pablo", "en-us+Mario",
        "en-us+Michael", "en-gb-x-gbclan",
    ),
}  # fmt: skip

_PROGRESS_EVERY = 50
_SYNCHRONOUS = 2
_UTF8 = 1
_RATE, _PITCH = 1, 3
_POSITION_CHARACTER = 1


@dataclass(frozen=True, slots=True)
class Utterance:
    """One recording to make: who says what, how."""

    path: str
    """Where the WAV goes, relative to the list's folder."""

    text: str
    voice: str
    """A name of espeak-ng: language, or language+variant."""

    rate_wpm: int
    """Speaking rate, words a minute."""

    pitch: int
    """espeak-ng's pitch, 0 to 99; 50 is the voice's own."""

    loudness: float
    """Highest amplitude in the recording, at most 1."""

    seed: int
    """For the hiss and the silence around the words."""


def require_speech() -> None:
    """Raise MissingExtraError now rather than when half a world is made."""
    if importlib.util.find_spec("espeakng_loader") is None:
        raise MissingExtraError("espeakng-loader", "demo", "Making speech")


@contextmanager
def recording(utterances: list[Utterance], listing: Path) -> Iterator[Callable[[Callable[[int, int], None]], None]]:
    """Make the recordings in a fresh process while the block does something else.

    Args:
        utterances: What to say, in order; the order is part of what is heard.
        listing: The file of JSON lines to write; recordings go beside it.

    Yields:
        A function that waits until all are made, telling ``(done, total)`` as it goes.

    Raises:
        AvlmError: The process failed (from the waiting function).
    """
    lines = [json.dumps(dataclasses.asdict(utterance)) + "\n" for utterance in utterances]
    listing.write_text("".join(lines), encoding="utf-8", newline="\n")
    # The process must find this very package, installed or not.
    root = str(Path(__file__).resolve().parents[3])
    search = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    with subprocess.Popen(
        [sys.executable, "-m", "avlm.data.world.speech", str(listing)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONPATH": search},
    ) as process:
        try:
            yield lambda progress: _wait(process, len(utterances), progress)
        finally:
            process.kill()


def _wait(process: subprocess.Popen[str], total: int, progress: Callable[[int, int], None]) -> None:
    """Pass the process's count on until it ends."""
    said = []
    for line in process.stdout or ():
        if line.startswith("made "):
            progress(int(line.split()[1]), total)
        else:
            said.append(line.rstrip())
    if process.wait() != 0:
        raise AvlmError(
            f"the speech process ended with status {process.returncode}: "
            f"{said[-1] if said else 'it said nothing'}. "
            "Reinstall espeakng-loader, which brings espeak-ng: pip install 'avlm[demo]'"
        )


class Espeak:
    """espeak-ng in this process. Make one, once: the library keeps global state."""

    def __init__(self) -> None:
        try:
            import espeakng_loader
        except ImportError as error:
            raise MissingExtraError("espeakng-loader", "demo", "Making speech") from error
        self._library = ctypes.CDLL(espeakng_loader.get_library_path())
        data = str(espeakng_loader.get_data_path()).encode()
        self._rate_hz: int = self._library.espeak_Initialize(_SYNCHRONOUS, 0, data, 0)
        if self._rate_hz <= 0:
            raise AvlmError(
                f"espeak-ng does not start (status {self._rate_hz}); it needs the data that "
                "comes with espeakng-loader. Reinstall it: pip install 'avlm[demo]'"
            )
        # Breathy voices take their breath from a random source, else seeded with the time.
        self._library.espeak_ng_SetRandSeed.argtypes = [ctypes.c_long]
        self._library.espeak_ng_SetRandSeed(0)
        self._chunks: list[np.ndarray] = []
        # Kept as a member: ctypes does not keep a callback alive by itself.
        self._callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)(
            self._take
        )
        self._library.espeak_SetSynthCallback(self._callback)
        self._library.espeak_Synth.argtypes = [
            ctypes.c_char_p, ctypes.c_size_t, ctypes.c_uint, ctypes.c_int,
            ctypes.c_uint, ctypes.c_uint, ctypes.c_void_p, ctypes.c_void_p,
        ]  # fmt: skip

    def say(self, text: str, *, voice: str, rate_wpm: int, pitch: int) -> np.ndarray:
        """Speak a text.

        Returns:
            Mono waveform at 16 kHz, float32, with espeak's silence at the end.
        """
        if self._library.espeak_SetVoiceByName(voice.encode()) != 0:
            raise AvlmError(
                f"espeak-ng has no voice {voice!r}; the voices are the files of its data "
                "folder. Reinstall espeakng-loader: pip install 'avlm[demo]'"
            )
        self._library.espeak_SetParameter(_RATE, rate_wpm, 0)
        self._library.espeak_SetParameter(_PITCH, pitch, 0)
        self._chunks.clear()
        encoded = text.encode() + b"\0"
        status = self._library.espeak_Synth(encoded, len(encoded), 0, _POSITION_CHARACTER, 0, _UTF8, None, None)
        if status != 0 or not self._chunks:
            raise AvlmError(
                f"espeak-ng made no sound of {text!r} (status {status}). "
                "Reinstall espeakng-loader: pip install 'avlm[demo]'"
            )
        wave = np.concatenate(self._chunks).astype(np.float32) / 32768
        resampled: np.ndarray = soxr.resample(wave, self._rate_hz, SAMPLE_RATE_HZ)
        return resampled

    def _take(self, samples: "ctypes._Pointer[ctypes.c_short]", count: int, _: int | None) -> int:
        if samples and count > 0:
            self._chunks.append(np.ctypeslib.as_array(samples, shape=(count,)).copy())
        return 0


def record(espeak: Espeak, utterance: Utterance) -> np.ndarray:
    """Say one utterance as if recorded: trimmed, some silence around, a little hiss."""
    rng = np.random.default_rng(utterance.seed)
    said = trim(
        espeak.say(
            utterance.text,
            voice=utterance.voice,
            rate_wpm=utterance.rate_wpm,
            pitch=utterance.pitch,
        )
    )
    before = int(rng.uniform(0.02, 0.1) * SAMPLE_RATE_HZ)
    # A short word gets more silence after it, so that nothing is under 0.3 s.
    after = max(int(0.04 * SAMPLE_RATE_HZ), int(0.3 * SAMPLE_RATE_HZ) - before - len(said))
    wave = np.pad(said / np.abs(said).max(), (before, after))
    hiss = rng.normal(0, 10 ** (-rng.uniform(35, 55) / 20), len(wave))
    return ((wave + hiss) * utterance.loudness).clip(-1, 1).astype(np.float32)


def trim(wave: np.ndarray, quiet: float = 0.01) -> np.ndarray:
    """Cut off both ends where the wave stays under ``quiet`` times its peak."""
    loud = np.flatnonzero(np.abs(wave) > quiet * np.abs(wave).max())
    return wave[loud[0] : loud[-1] + 1]


def main(listing: Path) -> None:
    """Make every recording of a list, in its order, in this fresh process."""
    espeak = Espeak()
    lines = listing.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, start=1):
        utterance = Utterance(**json.loads(line))
        write_wav(listing.parent / utterance.path, record(espeak, utterance))
        if number % _PROGRESS_EVERY == 0 or number == len(lines):
            print(f"made {number}", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
