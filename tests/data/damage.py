"""Damaged files: 300 of every way in which files come damaged, and as many mutated ones as are asked for; all seeded.

`try_all` decodes them in processes of their own, where a crash is seen as a crash and a hang as a hang.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bombs import BOMBS
from media_files import EVERY, Kind, made

from avlm.config.media import AudioSpec, InternvlTiling, MediaSpec, VideoSpec, VisionSpec
from avlm.data.decoding.files import Limits
from avlm.data.decoding.headers import measure
from avlm.data.media.pictures import PreparedImage
from avlm.data.media.reader import MediaReader, PreparedAudio, PreparedVideo
from avlm.errors import MediaError
from avlm.samples import MediaItem

MEDIA = MediaSpec(
    vision=VisionSpec(image_size_px=28, cell_px=14, tiling=InternvlTiling()), audio=AudioSpec(), video=VideoSpec(fps=2)
)
LIMITS = Limits(
    max_bytes=64 * 2**20,
    max_pixels=8_000_000,
    max_frames=2000,
    max_samples=120 * 48_000,
    max_seconds=120,
    max_decode_s=5,
)
MEMORY = 300 * 2**20
"""Bytes that decoding one file may take under these limits: some 30 for each pixel, as large as pictures may be."""
HANGS_S = 20.0
"""Seconds without an answer after which a decoder is taken to hang: four times the limit, on a machine that is busy."""
REFUSED, DECODED, CRASHED, HUNG = "refused", "decoded", "crashed", "hung"


@dataclass(frozen=True)
class Damage:
    """One file, or what lies where a file should be."""

    name: str
    kind: Kind
    data: bytes = b""
    make: Callable[[Path], None] | None = field(default=None, compare=False)
    """Puts it at the path, where it is no plain file of these bytes."""
    hopeless: bool = False
    """Whether it must be refused, as what is missing or claimed can be told."""

    def item(self, folder: Path, number: int) -> MediaItem:
        path = folder / f"{number}.{self.name.rpartition('.')[2]}"
        if self.make is not None:
            self.make(path)
        else:
            path.write_bytes(self.data)
        return MediaItem(self.kind, path=path)


@dataclass(frozen=True)
class Outcome:
    """What came of one file."""

    damage: Damage
    what: str
    seconds: float
    memory: int
    """Bytes at the peak, above what the process had before."""
    said: str = ""
    """The message of a refusal; of what was decoded, what is wrong with it."""


# ---------------------------------------------------------------- 300 damaged files

UNTOLD = {"uncounted.mp3", "h264.ts", "silent.gif", "fragments.mp4", "moving.gif"}
"""Whose end may be missing without a sign, or without a loss: there is just less of them."""
ANYTHING: tuple[Kind, ...] = ("image", "audio", "video")


def damaged(seed: int = 0) -> list[Damage]:
    """The 300."""
    found = [
        *_truncated(),
        *_wrong_ending(),
        *_bombs(),
        *_no_media(),
        *_no_files(),
    ]
    return [*found, *_flipped(seed, 300 - len(found))]


def _truncated() -> Iterator[Damage]:
    for name, (kind, _) in EVERY.items():
        data = made(name)
        for share in (0.05, 0.5, 0.9):
            told = name not in UNTOLD
            yield Damage(f"truncated to {share:.0%} {name}", kind, data[: int(share * len(data))], hopeless=told)
    for name in ("baseline.jpg", "rgb.png", "16.wav", "a.flac", "h264.mp4"):  # a download that broke off
        data = made(name)
        half = data[: len(data) // 2] + bytes(len(data) - len(data) // 2)
        yield Damage(f"second half is zeros {name}", EVERY[name][0], half, hopeless=name in ("baseline.jpg", "rgb.png"))


def _wrong_ending() -> Iterator[Damage]:
    for name, ending in (
        ("16.wav", "jpg"), ("a.mp3", "png"), ("h264.mp4", "gif"), ("vp9.webm", "webp"), ("a.flac", "bmp"),
    ):  # fmt: skip
        yield Damage(f"{name} as.{ending}", "image", made(name), hopeless=True)
    for name, ending in (("rgb.png", "wav"), ("baseline.jpg", "mp3"), ("moving.gif", "ogg"), ("raw.tiff", "flac")):
        yield Damage(f"{name} as.{ending}", "audio", made(name), hopeless=True)
    for name, ending in (("rgb.png", "mp4"), ("a.flac", "mkv"), ("a.m4a", "mp4"), ("16.wav", "avi")):
        yield Damage(f"{name} as.{ending}", "video", made(name), hopeless=True)
    for name, ending in (("baseline.jpg", "png"), ("rgb.png", "jpg"), ("a.mp3", "wav"), ("vp9.webm", "mp4")):
        yield Damage(f"right kind, wrong ending: {name} as.{ending}", EVERY[name][0], made(name))


def _flipped(seed: int, count: int) -> Iterator[Damage]:
    rng = np.random.default_rng([seed, 1])
    names = list(EVERY)
    for i in range(count):
        name = names[i % len(names)]
        data = bytearray(made(name))
        for at in rng.integers(0, len(data), 1 + i % 4):
            data[at] ^= int(rng.integers(1, 256))
        yield Damage(f"flipped {1 + i % 4} bytes {name}", EVERY[name][0], bytes(data))


@lru_cache
def _bombs() -> tuple[Damage, ...]:
    return tuple(Damage(f"bomb of {bomb.name}", bomb.kind, bomb.make(), hopeless=bomb.hopeless) for bomb in BOMBS)


def _no_media() -> Iterator[Damage]:
    """Files that are something else, some of which would make a decoder open further files, addresses or programs."""
    here = Path(__file__).resolve()
    texts = {
        "nothing.bin": b"",
        "zeros.bin": bytes(5000),
        "page.html": b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
        "list.m3u8": f"#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:1,\nfile://{here}\n#EXT-X-ENDLIST\n".encode(),
        "web.m3u8": b"#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1:9/a.ts\n#EXT-X-ENDLIST\n",
        "list.ffconcat": f"ffconcat version 1.0\nfile {here}\n".encode(),
        "stream.sdp": b"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=a\nc=IN IP4 127.0.0.1\nm=audio 9 RTP/AVP 0\n",
        "manifest.mpd": b'<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011"></MPD>',
        "program.eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n",
        "drawing.svg": b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
        "model.pkl": b"\x80\x04\x95\x00\x00\x00\x00\x00\x00\x00\x00.",
        "archive.zip": b"PK\x03\x04" + bytes(200),
    }
    for name, data in texts.items():
        for kind in ANYTHING:
            yield Damage(f"{kind}: {name}", kind, data, hopeless=True)


def _no_files() -> Iterator[Damage]:
    """What has a path and is no file."""

    def listens(path: Path) -> None:
        with socket.socket(socket.AF_UNIX) as server:
            here = os.open(path.parent, os.O_RDONLY)
            server.bind(f"/proc/self/fd/{here}/{path.name}")  # a socket's own path may not be long
            os.close(here)

    for name, make in {
        "a pipe.png": os.mkfifo,
        "a folder.png": Path.mkdir,
        "nothing.png": lambda path: None,
        "a link to nothing.png": lambda path: path.symlink_to(path.parent / "none"),
        "a link to itself.png": lambda path: path.symlink_to(path),
        "a device without end.png": lambda path: path.symlink_to("/dev/zero"),
        "an empty device.png": lambda path: path.symlink_to("/dev/null"),
        "a socket.png": listens,
    }.items():
        for kind in ANYTHING:
            yield Damage(f"{kind}: {name}", kind, make=make, hopeless=True)


# ---------------------------------------------------------------- mutated files


def mutated(count: int, seed: int = 0) -> Iterator[Damage]:
    """Valid files with bytes changed, most of them in the header, and stretches removed, doubled or exchanged."""
    rng = np.random.default_rng([seed, 2])
    names = list(EVERY)
    for i in range(count):
        name = names[i % len(names)]
        yield Damage(f"mutated {i} {name}", EVERY[name][0], _mutated(made(name), rng))


ODD = (0, 1, 0x7F, 0x80, 0xFE, 0xFF)


def _mutated(data: bytes, rng: np.random.Generator) -> bytes:
    found = bytearray(data)
    near = min(len(found), 400)
    for _ in range(int(rng.integers(1, 9))):
        reach = near if rng.random() < 0.6 else len(found)
        at, how = int(rng.integers(0, reach)), rng.random()
        if how < 0.4:
            found[at] = int(rng.integers(0, 256))
        elif how < 0.7:
            found[at] = ODD[rng.integers(0, len(ODD))]
        elif how < 0.8:  # a number, as large as its bytes allow
            found[at : at + 4] = b"\xff" * len(found[at : at + 4])
        elif how < 0.87:
            del found[at : at + int(rng.integers(1, 30))]
        elif how < 0.94:
            found[at:at] = found[at : at + int(rng.integers(1, 30))]
        else:
            other = int(rng.integers(0, len(found)))
            found[at : at + 16] = found[other : other + 16]
        near = min(len(found), near)
    return bytes(found)


# ---------------------------------------------------------------- trying them


Attempt = Callable[[MediaReader, MediaItem], tuple[str, str]]


def attempt(reader: MediaReader, item: MediaItem) -> tuple[str, str]:
    """Measure and decode: what came of it, and the message, or what is wrong with what came out."""
    measured: Any = None
    told = ""
    try:
        measured = measure(item, MEDIA, LIMITS)
    except MediaError as error:
        told = str(error)
    try:
        found = reader.prepare(item)
    except MediaError as error:
        return REFUSED, str(error)
    if told:
        return DECODED, f"measuring refused it: {told}"
    facts: Any
    if isinstance(found, PreparedImage):
        facts, tensors = found.facts, [found.pixels]
    elif isinstance(found, PreparedAudio):
        facts, tensors = found.facts, [chunk.features for chunk in found.sound]
    else:
        assert isinstance(found, PreparedVideo)
        facts, tensors = found.facts, [*found.frames, *(chunk.features for chunk in found.sound)]
    if measured is not None and measured != facts:
        return DECODED, f"measured {measured}, decoded {facts}"
    if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors):
        return DECODED, "not finite"
    return DECODED, ""


def try_all(
    damages: Iterable[Damage], folder: Path, attempt: Attempt = attempt, hangs_s: float = HANGS_S, workers: int = 2
) -> list[Outcome]:
    """Decode each of them in one of several processes, which are started again where they end or hang."""
    waiting = iter(list(enumerate(damages)))
    lock = threading.Lock()
    found: dict[int, Outcome] = {}

    def work() -> None:
        process: _Process | None = None
        while True:
            with lock:
                number, damage = next(waiting, (-1, None))
            if damage is None:
                break
            process = process or _Process(attempt, hangs_s)
            found[number] = process.try_one(damage, damage.item(folder, number))
            if found[number].what in (CRASHED, HUNG):
                process.end()
                process = None
        if process is not None:
            process.end()

    threads = [threading.Thread(target=work) for _ in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [found[number] for number in sorted(found)]


_STARTING = threading.Lock()


class _Process:
    """A process that decodes what it is sent."""

    def __init__(self, attempt: Attempt, hangs_s: float) -> None:
        self.hangs_s = hangs_s
        context = multiprocessing.get_context("fork")
        with _STARTING:  # one that starts meanwhile would hold the other end of this pipe open, and its end be no end
            self.pipe, other = context.Pipe()
            self.process = context.Process(target=_serve, args=(other, attempt), daemon=True)
            self.process.start()
            other.close()

    def try_one(self, damage: Damage, item: MediaItem) -> Outcome:
        start = time.monotonic()
        self.pipe.send(item)
        try:
            if not self.pipe.poll(self.hangs_s):
                return Outcome(damage, HUNG, time.monotonic() - start, 0)
            what, memory, said = self.pipe.recv()
        except EOFError:
            self.process.join()
            return Outcome(damage, CRASHED, time.monotonic() - start, 0, f"exit status {self.process.exitcode}")
        return Outcome(damage, what, time.monotonic() - start, memory, said)

    def end(self) -> None:
        self.pipe.close()
        self.process.kill()
        self.process.join()


def _serve(pipe: Any, attempt: Attempt) -> None:
    torch.set_num_threads(1)
    reader = MediaReader(MEDIA, 0, LIMITS)
    while True:
        try:
            item = pipe.recv()
        except EOFError:
            return
        before = _memory("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        what, said = attempt(reader, item)
        pipe.send((what, _memory("VmHWM") - before, said))


def _memory(name: str) -> int:
    """Bytes, as Linux counts them for this process."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return 1024 * int(line.split()[1])
