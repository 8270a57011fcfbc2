"""A video with its sound in one pass, against two passes over the file.

Both choose the same frames and make the same sound at 16 kHz. The two passes are written with PyAV as its users write
them: every frame decoded in order and those kept that are on the screen at the wanted times; then the file opened again
for its sound. They are timed a second time with avlm's own reader, the pictures alone and then the sound alone, to tell
what of it is the one pass and what is how the frames are decoded.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import av
import numpy as np
from harness import Case, Table, timed
from material import film

from avlm.config.media import AudioSpec, MediaSpec, VideoSpec, VisionSpec
from avlm.data.decode import decode_video, resample
from avlm.layout import frame_times_s
from avlm.samples import MediaItem

BAR = 1.3
RATE_HZ = 16_000
MEDIA = MediaSpec(vision=VisionSpec(image_size_px=336, cell_px=14), audio=AudioSpec(), video=VideoSpec(max_frames=64))
PICTURES = MEDIA.model_copy(update={"audio": None})
SOUND = MEDIA.model_copy(update={"video": VideoSpec(max_frames=64, order="audio")})

Decoded = tuple[list[np.ndarray], np.ndarray | None]


def one_pass(path: Path, media: MediaSpec = MEDIA) -> Decoded:
    clip = decode_video(MediaItem("video", path=path), media)
    sound = None if clip.sound is None else resample(clip.sound.waveform, clip.sound.sample_rate_hz, RATE_HZ)
    return [frame.pixels for frame in clip.frames], sound


def two_passes(path: Path) -> Decoded:
    return frames_of(path), sound_of(path)


def own_passes(path: Path) -> Decoded:
    return one_pass(path, PICTURES)[0], one_pass(path, SOUND)[1]


def frames_of(path: Path) -> list[np.ndarray]:
    """The last frame that began by each wanted time."""
    found: list[np.ndarray] = []
    with av.open(str(path)) as file:
        video = file.streams.video[0]
        wanted = frame_times_s(float(video.duration * video.time_base), MEDIA.video)
        last = None
        for frame in file.decode(video):
            while last is not None and len(found) < len(wanted) and frame.time > wanted[len(found)]:
                found.append(last.to_ndarray(format="rgb24"))
            if len(found) == len(wanted):
                break
            last = frame
        while last is not None and len(found) < len(wanted):
            found.append(last.to_ndarray(format="rgb24"))
    return found


def sound_of(path: Path) -> np.ndarray:
    """Channels averaged, then resampled as fast as on the other side."""
    with av.open(str(path)) as file:
        track = file.streams.audio[0]
        wave = np.concatenate([frame.to_ndarray() for frame in file.decode(track)], 1).mean(0)
        return resample(wave, track.rate, RATE_HZ)


def check(path: Path) -> None:
    """The same frames to the last grey level, and sound of the same length within a frame of AAC."""
    frames, sound = one_pass(path)
    for others, other in (two_passes(path), own_passes(path)):
        assert len(frames) == len(others)
        assert all(np.array_equal(a, b) for a, b in zip(frames, others))
        assert sound is not None and other is not None
        common = min(len(sound), len(other)) - RATE_HZ // 10
        assert abs(len(sound) - len(other)) < RATE_HZ // 10
        assert np.abs(sound[:common] - other[:common]).max() < 1e-3


def main() -> list[Table]:
    table = Table(
        "video", "Video with sound: mp4 of 640 x 360, 25 a second; a frame each second, sound at 16 kHz", "ms"
    )
    with tempfile.TemporaryDirectory() as name:
        for seconds in (10, 60):
            for b_frames in (3, 0):
                path = film(Path(name) / f"{seconds}-{b_frames}.mp4", seconds, b_frames=b_frames)
                what = f"{seconds} s, {f'{b_frames} B-frames' if b_frames else 'no B-frames'}"
                table.lines += timed(
                    Case(
                        what,
                        lambda path=path: one_pass(path),
                        {
                            "two passes with PyAV": lambda path=path: two_passes(path),
                            "two passes with avlm": lambda path=path: own_passes(path),
                        },
                        rounds=7 if seconds < 30 else 3,
                        bar=BAR,
                        unbarred=("two passes with avlm",),
                        check=lambda path=path: check(path),
                    )
                )
    return [table]
