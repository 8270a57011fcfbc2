"""Sound and moving pictures out of a container (mp4, mkv, ts ...) with FFmpeg, in one pass over what is wanted of it.

A cut is decoded from a key frame before it on, where the container can seek. Whether it went
there is read off the clocks of what comes out: when that begins too late, the pass is made
again from further back, at last from the beginning of the file.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np

from avlm.config.media import VideoSpec
from avlm.data.decoding.files import (
    Limits,
    check_frame,
    check_frames,
    check_samples,
    check_seconds,
    check_time,
    cut,
    opened,
    too_large,
)
from avlm.data.decoding.ogg import check_pages
from avlm.data.decoding.sparing import Sparing
from avlm.data.decoding.timeline import Stretches
from avlm.data.decoding.truncated import check_whole
from avlm.errors import MediaError
from avlm.layout import frame_times_s
from avlm.samples import MediaItem, Picture, Sound

Seen = TypeVar("Seen")
"""What is made of each frame that is looked at."""

BACK_S = (1.0, 10.0)
"""How far before a cut decoding begins, at the first try and at the second."""
SWING_S = 0.25
"""Sound is right only so long after the place where its decoding began (Opus asks for 80 ms, MP3 for some frames)."""
APART_S = 10.0
"""What belongs to one moment lies at most so far apart in a file."""
SAME_S = 1e-3
"""Clocks are as imprecise as this: some containers count whole milliseconds."""
EXACT = ("matroska", "mov", "avi")
"""Containers that know their length."""
GUESSED = ("mp3", "aac", "ac3", "eac3", "h264", "hevc", "mpegvideo", "m4v", "loas", "dts", "amr", "gif")
"""Containers whose length is guessed from the bit rate, or said by nobody: all their packets are counted instead."""
LATE_S = 0.1
"""A Matroska file whose clock begins later says when it ends, and not how long it is, where FFmpeg wrote it."""
OPENED = (
    "mov", "matroska", "avi", "mpegts", "mpeg", "flv", "asf", "ogg", "wav", "flac", "mp3", "aac", "ac3", "eac3",
    "aiff", "au", "caf", "w64", "amr", "loas", "tta", "wv", "ape", "mxf", "h264", "hevc", "mpegvideo", "m4v", "ivf",
    "gif", "apng",
)  # fmt: skip
"""Containers that are read at all. Among FFmpeg's others are play lists, which would open further files and addresses
(HLS, DASH, SDP, concat), and readers of devices."""


def watched(
    item: MediaItem, spec: VideoSpec, limits: Limits, see: Callable[[Picture], Seen], *, looks: bool, hears: bool
) -> tuple[tuple[Seen, ...], float, Sound | None]:
    """Decode the frames of a video that are looked at, and its sound, cut or padded to the video's own time.

    Args:
        spec: Which frames.
        see: What is made of each frame at once, so that one frame at a time is in memory.
        looks, hears: Whether there are to be frames, and sound.

    Returns:
        What was made of the frames, the duration in seconds, and the sound.

    Raises:
        MediaError: It holds no pictures, is too long or truncated, or is to begin where the file has ended.
        FFmpegError: It cannot be decoded.
    """
    deadline = time.monotonic() + limits.max_decode_s
    for back in _tries(item):
        with _container(item, limits, closely=True) as container:
            video = _pictures(item, limits, container)
            way = _way(item, limits, container, video, _origin_s(container), back, deadline)
            track = container.streams.audio[0] if hears and container.streams.audio else None
            eyes = _Eyes(video, frame_times_s(way.length_s, spec), way, see) if looks else None
            ears = None if track is None else _Ears(track, way)
            if _decode(container, [sense for sense in (eyes, ears) if sense is not None], way):
                return eyes.chosen() if eyes else (), way.length_s, ears.sound(way.length_s) if ears else None
    raise AssertionError("a pass from the beginning of the file is never in vain")


def clip_length(item: MediaItem, limits: Limits) -> tuple[float, int | None]:
    """What `watched` would say of a video's time, from its header and the headers of its packets alone.

    Returns:
        Its duration in seconds, and the sample rate of its sound track; None without one, 0 if that is not known.

    Raises:
        As `watched`.
    """
    with _container(item, limits) as container:
        video = _pictures(item, limits, container)
        deadline = time.monotonic() + limits.max_decode_s
        way = _way(item, limits, container, video, _origin_s(container), None, deadline)
        return way.length_s, int(container.streams.audio[0].rate or 0) if container.streams.audio else None


def sound_length_s(item: MediaItem, limits: Limits) -> float | None:
    """The seconds of sound that `sound_of` would find, from the header alone; None where only decoding tells.

    Raises:
        As `sound_of`.
    """
    with _container(item, limits) as container:
        track = container.streams.audio[0] if container.streams.audio else None
        if track is None or not _knows_exactly(container, track):
            return None
        return _way(item, limits, container, track, _start_s(track), None, math.inf).length_s


@contextmanager
def _container(item: MediaItem, limits: Limits, *, closely: bool = False) -> Iterator[Any]:
    """The item's file, opened by what is in it, if that is among what is read at all.

    FFmpeg decodes a little to find out what is there, so it is told the limits beforehand.

    Args:
        closely: Look for damage that FFmpeg goes over in silence.
    """
    import av

    told = {"max_pixels": str(limits.max_pixels)}
    allowed = {"format_whitelist": ",".join(OPENED), "protocol_whitelist": "none"}
    with opened(item, limits) as file:
        check_whole(item, file)
        if closely:
            check_pages(item, file)
        with av.open(file, options={**allowed, **told}, timeout=limits.max_decode_s or None) as container:
            for stream in container.streams.video:
                stream.codec_context.options = told
                if stream.codec_context.name == "h264":
                    stream.codec_context.thread_count = 1  # several, each with its slices, do not tell what is lost
            try:
                yield container
            except av.error.ArgumentError:
                if all(stream.codec_context.width for stream in container.streams.video):
                    raise
                raise too_large(item, limits, "have more pixels, or no size") from None


def _pictures(item: MediaItem, limits: Limits, container: Any) -> Any:
    """The stream of pictures, which a recording's cover is none of."""
    from av.stream import Disposition

    moving = [stream for stream in container.streams.video if not stream.disposition & Disposition.attached_pic]
    if not moving:
        raise MediaError(f"{item.name()}: holds no pictures. Give it as audio, or replace the file")
    video = moving[0]
    if video.codec_context.width:  # a broadcast may say it with its first frame only, which FFmpeg holds to the limit
        check_frame(video.codec_context.width, video.codec_context.height, limits, item)
    return video


def _origin_s(container: Any) -> float:
    return max(0.0, float(container.start_time or 0) / 1_000_000)  # broadcasts do not begin at 0


def _knows_exactly(container: Any, track: Any) -> bool:
    """Whether the header has the exact length of a track: by its edit list, without what an encoder needs to begin and
    to end (ISO/IEC 14496-12, section 8.6.6). A file in fragments has no table of its samples, and guesses."""
    by_name = container.format.name.split(",")[0] == "mov"
    return bool(by_name and track.frames and _duration_s(container, track))


def sound_of(item: MediaItem, limits: Limits) -> tuple[Sound, float] | None:
    """Decode the sound alone, timed from where it begins itself; None when there is none.

    Returns:
        The sound and its seconds: those of its track, where the container knows that (MP4, MOV, M4A), and else from
        the first decoded sample to the last.

    Raises:
        MediaError: It is too long or truncated, or is to begin where the file has ended.
        FFmpegError: It cannot be decoded.
    """
    deadline = time.monotonic() + limits.max_decode_s
    for back in _tries(item):
        with _container(item, limits) as container:
            if not container.streams.audio:
                return None
            track = container.streams.audio[0]
            known = _knows_exactly(container, track)
            way = _way(item, limits, container, track, _start_s(track), back, deadline)
            ears = _Ears(track, way)
            if _decode(container, [ears], way):
                length_s = way.length_s if known else ears.alone_s()
                sound = ears.sound(length_s)
                return None if sound is None else (sound, length_s)
    raise AssertionError("a pass from the beginning of the file is never in vain")


@dataclass(frozen=True, slots=True)
class _Way:
    """From where to where one pass goes."""

    item: MediaItem
    limits: Limits
    origin_s: float
    """The container's clock at the beginning of what it holds."""
    begin_s: float
    """Beginning of the cut, from there."""
    length_s: float
    duration_s: float
    """Of all that the container holds."""
    back_s: float | None
    """How far before the cut decoding begins; None: at the beginning of the file."""
    deadline: float

    def clock(self, time_s: float) -> float:
        """Seconds from the beginning of the cut, by the container's clock."""
        return time_s - self.origin_s - self.begin_s

    def reaches_the_end(self) -> bool:
        return self.begin_s + self.length_s >= self.duration_s


def _tries(item: MediaItem) -> tuple[float | None, ...]:
    """How far to go back before the cut, one after the other; None is the beginning of the file."""
    return (*(back for back in BACK_S if back < item.start_s), None)


def _way(
    item: MediaItem, limits: Limits, container: Any, main: Any, origin_s: float, back_s: float | None, deadline: float
) -> _Way:
    name = container.format.name.split(",")[0]
    guessed = name in GUESSED or (name == "matroska" and origin_s > LATE_S)
    duration = 0.0 if guessed else _duration_s(container, main)
    duration = duration or _measured_duration_s(item, main.index, limits, deadline)
    begin, length = cut(item, duration)
    check_seconds(item, length, limits)
    return _Way(item, limits, origin_s, begin, length, duration, back_s, deadline)


class _TooLate(Exception):  # noqa: N818 - no error: the pass is made again
    """The container does not say where it went."""


def _decode(container: Any, senses: Sequence[_Eyes[Any] | _Ears], way: _Way) -> bool:
    """Give the senses what the container holds; False when it began too late for the cut."""
    import av

    if way.back_s is None:
        _play(container, senses, way)
        return True
    try:
        container.seek(round((way.origin_s + way.begin_s - way.back_s) * 1_000_000))
        _play(container, senses, way)
    except (_TooLate, av.FFmpegError):
        return False
    return all(sense.began_in_time() for sense in senses)


def _play(container: Any, senses: Sequence[_Eyes[Any] | _Ears], way: _Way) -> None:
    """Decode until all senses have what they want; where the file ends before, check that it was the end."""
    end, to_the_end = -math.inf, way.reaches_the_end()
    by_stream = {sense.stream.index: sense for sense in senses}
    units_s = {stream.index: _unit_s(stream) for stream in container.streams}
    for packet in container.demux(_played(container, senses)) if senses else ():
        index, pts = packet.stream.index, packet.pts
        sense, unit_s = by_stream.get(index), units_s.get(index)
        if pts is not None and unit_s:
            end = max(end, way.clock((pts + (packet.duration or 0)) * unit_s))
        if sense is not None and ((sense.to_the_end and to_the_end) or not sense.has_all()):
            sense.packets += bool(packet.size)
            for frame in sense.decoded(packet):
                sense.take(frame)
        check_time(way.item, way.limits, way.deadline)
        if not to_the_end and (end > way.length_s + APART_S or all(s.has_all() for s in senses)):
            return
    knows = container.format.name.split(",")[0] in EXACT and math.isfinite(end)
    if knows and way.length_s - end > max(1.0, 0.1 * way.duration_s):
        raise MediaError(
            f"{way.item.name()}: is truncated: its header announces {way.duration_s:.2f} s and it ends at "
            f"{way.begin_s + end:.2f} s. Copy or record it again"
        )


def _played(container: Any, senses: Sequence[_Eyes[Any] | _Ears]) -> list[Any]:
    """Streams whose packets are looked at: those of the senses. A container that knows its length says how long the
    longest is, whichever it is, so there the end of all of them is looked for."""
    if container.format.name.split(",")[0] in EXACT:
        return [*container.streams.video, *container.streams.audio]
    return [sense.stream for sense in senses]


class _Eyes(Generic[Seen]):
    """Chooses from the frames, as they come, those that are on the screen at the wanted times."""

    to_the_end = False
    """Whether all of the file is decoded, even if nothing more is wanted."""

    def __init__(self, stream: Any, wanted: Sequence[float], way: _Way, see: Callable[[Picture], Seen]) -> None:
        from av.video.reformatter import VideoReformatter

        self.stream, self.wanted, self.way, self.see = stream, wanted, way, see
        self.unit_s = _unit_s(stream)
        self.decoded = Sparing(stream, wanted, way.clock, SAME_S).frames
        self.coloured = VideoReformatter()  # one for all, as it takes longer to make than to use
        self.frames: list[Seen] = []
        self.last: Any = None
        self.spoiled = False
        """Whether FFmpeg made up parts of the last one, or of one that it may be made of."""
        self.first_clock = math.inf
        self.count = 0
        self.packets = 0

    def take(self, frame: Any) -> None:
        """The next frame; without a clock of its own it comes ``1 / fps`` after the one before."""
        if self.way.back_s is not None and self.last is None and not frame.key_frame:
            return  # it is made from others, which were not seen
        clock = self._clock(frame)
        self.first_clock = min(self.first_clock, clock)
        while self.last is not None and not self.has_all() and clock > self.wanted[len(self.frames)] + SAME_S:
            self._keep()
        self.last = frame
        self.spoiled = frame.is_corrupt or (self.spoiled and not frame.key_frame)
        self.count += 1
        check_frames(self.count, self.way.limits, self.way.item)

    def _clock(self, frame: Any) -> float:
        if frame.time is not None:
            return self.way.clock(float(frame.time))
        if self.way.back_s is not None:
            raise _TooLate
        return self.count / float(self.stream.average_rate or 25) - self.way.begin_s

    def has_all(self) -> bool:
        return len(self.frames) == len(self.wanted)

    def began_in_time(self) -> bool:
        return self.first_clock <= max(self.wanted[0], self.way.clock(_start_s(self.stream))) + SAME_S

    def chosen(self) -> tuple[Seen, ...]:
        while self.last is not None and not self.has_all():
            self._keep()
        return tuple(self.frames)

    def _keep(self) -> None:
        check_frame(self.last.width, self.last.height, self.way.limits, self.way.item)
        if self.spoiled:
            raise MediaError(
                f"{self.way.item.name()}: is damaged: parts of the picture at {self.last.time or 0:.2f} s are lost, or "
                "made of lost ones. Copy it again"
            )
        pixels = _pixels(self.coloured.reformat(self.last, format="rgb24", threads=1))  # a worker has one processor
        turns = round(self.last.rotation / 90) % 4  # telephones film lying down and say how to turn it
        self.frames.append(self.see(Picture(np.ascontiguousarray(np.rot90(pixels, turns)) if turns else pixels)))


def _pixels(frame: Any) -> np.ndarray:
    """uint8 [height, width, 3] of an RGB frame, in its own memory, which lives as long, where its lines have no room
    behind them: to copy it takes longer than to make it."""
    (plane,) = frame.planes
    rows = np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)
    return rows[: frame.height, : 3 * frame.width].reshape(frame.height, frame.width, 3)


class _Ears:
    """Collects sound as it comes, with the clock of each stretch."""

    to_the_end = True

    def __init__(self, stream: Any, way: _Way) -> None:
        self.stream, self.way = stream, way
        self.unit_s = _unit_s(stream)
        self.heard = Stretches(round((way.length_s + 1) * (stream.rate or 0)))
        self.start_s = 0.0
        """Clock of what becomes time 0."""
        self.rate_hz = 0
        self.first_clock = math.inf
        self.end = -math.inf
        self.count = 0
        self.kept = 0
        self.packets = 0

    def decoded(self, packet: Any) -> Iterable[Any]:
        found: list[Any] = packet.decode()
        return found

    def take(self, frame: Any) -> None:
        """The next stretch; what is not in the cut is dropped."""
        if self.rate_hz not in (0, frame.sample_rate):
            name = self.way.item.name()
            raise MediaError(f"{name}: changes its sample rate on the way. Encode it again at one rate")
        self.rate_hz = int(frame.sample_rate)
        clock = self._clock(frame)
        self.first_clock = min(self.first_clock, clock)
        self.end = max(self.end, clock + frame.samples / self.rate_hz)
        self.count += frame.samples
        if self.way.item.is_cut() and (clock >= self.way.length_s or clock + frame.samples / self.rate_hz <= 0):
            return
        self.heard.add(clock, frame)
        self.kept += frame.samples
        check_samples(self.kept, self.rate_hz, self.way.limits, self.way.item)

    def _clock(self, frame: Any) -> float:
        if frame.time is not None:
            return self.way.clock(float(frame.time))
        if self.way.back_s is not None:
            raise _TooLate
        return self.count / self.rate_hz - self.way.begin_s

    def has_all(self) -> bool:
        return self.end >= self.way.length_s

    def began_in_time(self) -> bool:
        start = _start_s(self.stream)
        lasts = self.stream.duration
        if lasts is not None and self.way.clock(start + float(lasts * self.stream.time_base)) <= 0:
            return True  # it was over before the cut, and nothing was missed
        return self.first_clock <= max(-SWING_S, self.way.clock(start)) + SAME_S

    def alone_s(self) -> float:
        """Seconds from the sound's own beginning, which becomes time 0, to its own end; or what the cut has of it."""
        if not self.heard:
            return 0.0
        if self.way.item.is_cut():
            return min(self.way.length_s, self.end)
        self.start_s = self.heard.clocks[0]
        return min(max(self.end - self.start_s, self.count / self.rate_hz), self.way.limits.max_seconds)

    def sound(self, length_s: float) -> Sound | None:
        """What was heard, laid on a timeline of this length. A cut that the track does not reach is silent, and so is a
        track with nothing in it."""
        if self.packets and not self.count:
            raise MediaError(f"{self.way.item.name()}: holds no sound that can be decoded. Replace the file")
        rate_hz = self.rate_hz or int(self.stream.rate or 0)
        if not rate_hz:
            return None
        count = round(length_s * rate_hz)
        check_samples(count, rate_hz, self.way.limits, self.way.item)
        wave = self.heard.laid(rate_hz, count, self.start_s)
        if not np.isfinite(wave).all():
            raise MediaError(f"{self.way.item.name()}: has samples that are not numbers. Replace the recording")
        return Sound(wave, rate_hz)


def _unit_s(stream: Any) -> float:
    """Seconds of one tick of a stream's clock, 0 if it has none; as a float, since fractions are slow."""
    return float(stream.time_base or 0)


def _start_s(stream: Any) -> float:
    """The container's clock where a stream begins."""
    return float((stream.start_time or 0) * stream.time_base) if stream.time_base is not None else 0.0


def _duration_s(container: Any, stream: Any) -> float:
    """Length as the header has it; 0 if it does not say."""
    if stream.duration is not None and stream.time_base is not None:
        return max(0.0, float(stream.duration * stream.time_base))
    return max(0.0, float(container.duration or 0) / 1_000_000)


def _measured_duration_s(item: MediaItem, index: int, limits: Limits, deadline: float) -> float:
    """Length by the clocks of all packets, for recordings whose header could not know it (a browser's, say)."""
    first, end, count, fps = math.inf, 0.0, 0, 25.0
    with _container(item, limits) as container:
        stream = container.streams[index]
        fps = float(getattr(stream, "average_rate", None) or fps)
        for packet in container.demux(stream):
            check_time(item, limits, deadline)
            count += bool(packet.size)
            if stream.type == "video":
                check_frames(count, limits, item)
            if packet.pts is not None and packet.time_base is not None:
                first = min(first, float(packet.pts * packet.time_base))
                end = max(end, float((packet.pts + (packet.duration or 0)) * packet.time_base))
    return end - first if end > first else count / fps
