"""A video with its sound in one pass, against two passes over the file.

All choose the same frames, and make sound at 16 kHz. Two passes are written with PyAV as its users write them: every
frame decoded in order, and those kept that are on the screen at the wanted times; then the file opened again for its
sound, which PyAV's resampler makes (its mono is louder by the square root of two), or the resampler that avlm has. And
they are made with avlm's own reader, the pictures alone and then the sound alone, to tell what of it is the one pass
and what is that pictures are not decoded from which nothing wanted is made.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
from harness import Case, Table, timed
from material import film

from avlm.config.media import AudioSpec, MediaSpec, VideoSpec, VisionSpec
from avlm.data.decoding.decode import decode_video, resample
from avlm.layout import frame_times_s
from avlm.samples import MediaItem

BAR = 1.3
RATE_HZ = 16_000


def looking(max_frames: int) -> MediaSpec:
    """A frame a second, and at most so many."""
    vision = VisionSpec(image_size_px=336, cell_px=14)
    return MediaSpec(vision=vision, audio=AudioSpec(), video=VideoSpec(max_frames=max_frames))


@dataclass(frozen=True)
class Film:
    """What is timed."""

    name: str
    seconds: int
    max_frames: int = 64
    size: tuple[int, int] = (640, 360)
    b_frames: int = 3
    every: int = 250
    slices: int = 1
    rounds: int = 20


FILMS = (
    Film("10 s, key frame every 10 s", 10),
    Film("60 s, key frame every 10 s", 60, rounds=10),
    Film("10 s, key frame every second, no B-frames (a telephone's)", 10, b_frames=0, every=25),
    Film("10 s, key frame every 10 s, two slices a picture", 10, slices=2),
    Film("300 s of 320 x 180, key frame every 10 s, 16 frames of it", 300, max_frames=16, size=(320, 180), rounds=5),
)

Decoded = tuple[list[np.ndarray], np.ndarray | None]


def one_pass(path: Path, media: MediaSpec) -> Decoded:
    clip = decode_video(MediaItem("video", path=path), media)
    sound = None if clip.sound is None else resample(clip.sound.waveform, clip.sound.sample_rate_hz, RATE_HZ)
    return [frame.pixels for frame in clip.frames], sound


def two_passes(path: Path, media: MediaSpec) -> Decoded:
    return frames_of(path, media), sound_of(path)


def usual_passes(path: Path, media: MediaSpec) -> Decoded:
    return frames_of(path, media), usual_sound_of(path)


def own_passes(path: Path, media: MediaSpec) -> Decoded:
    seen = media.model_copy(update={"audio": None})
    heard = media.model_copy(update={"video": media.video.model_copy(update={"order": "audio"})})
    return one_pass(path, seen)[0], one_pass(path, heard)[1]


def frames_of(path: Path, media: MediaSpec) -> list[np.ndarray]:
    """The last frame that began by each wanted time."""
    found: list[np.ndarray] = []
    with av.open(str(path)) as file:
        video = file.streams.video[0]
        wanted = frame_times_s(float(video.duration * video.time_base), media.video)
        last = None
        for frame in file.decode(video):
            while last is not None and len(found) < len(wanted) and frame.time > wanted[len(found)] + 1e-3:
                found.append(last.to_ndarray(format="rgb24"))
            if len(found) == len(wanted):
                break
            last = frame
        while last is not None and len(found) < len(wanted):
            found.append(last.to_ndarray(format="rgb24"))
    return found


def sound_of(path: Path) -> np.ndarray:
    """Channels averaged, then resampled as on the other side."""
    with av.open(str(path)) as file:
        track = file.streams.audio[0]
        wave = np.concatenate([frame.to_ndarray() for frame in file.decode(track)], 1).mean(0)
        return resample(wave, track.rate, RATE_HZ)


def usual_sound_of(path: Path) -> np.ndarray:
    resampler = av.AudioResampler("flt", "mono", RATE_HZ)
    with av.open(str(path)) as file:
        found = [part.to_ndarray()[0] for frame in file.decode(audio=0) for part in resampler.resample(frame)]
        return np.concatenate(found)


def check(path: Path, media: MediaSpec) -> None:
    """The same frames to the last grey level, and the same sound."""
    frames, sound = one_pass(path, media)
    for others, other in (two_passes(path, media), own_passes(path, media)):
        assert len(frames) == len(others)
        assert all(np.array_equal(a, b) for a, b in zip(frames, others))
        assert sound is not None and other is not None
        common = min(len(sound), len(other)) - RATE_HZ // 10
        assert abs(len(sound) - len(other)) < RATE_HZ // 10
        assert np.abs(sound[:common] - other[:common]).max() < 1e-3


PEERS = {
    "two passes with PyAV and its resampler": usual_passes,
    "two passes with PyAV, avlm's resampler": two_passes,
    "two passes with avlm": own_passes,
}


def main() -> list[Table]:
    title = "Video with sound: mp4 of 25 frames a second, 640 x 360 if not said; a frame each second, sound at 16 kHz"
    table = Table("video", title, "ms")
    with tempfile.TemporaryDirectory() as name:
        for number, of in enumerate(FILMS):
            path = Path(name) / f"{number}.mp4"
            film(path, of.seconds, size=of.size, b_frames=of.b_frames, every=of.every, slices=of.slices)
            media = looking(of.max_frames)
            table.lines += timed(
                Case(
                    of.name,
                    lambda path=path, media=media: one_pass(path, media),
                    {what: lambda path=path, media=media, go=go: go(path, media) for what, go in PEERS.items()},
                    of.rounds,
                    BAR,
                    check=lambda path=path, media=media: check(path, media),
                    unbarred=("two passes with avlm",),
                )
            )
    return [table]
