"""Which packets of an H.264 video need not be decoded, when a few of its frames are wanted.

Between two pictures that depend on nothing before them (IDR) lies a stretch that is decoded by itself. Of a stretch
nothing is decoded behind its last wanted frame, and before that no picture that no other is made from, unless it is
wanted itself. What is decoded is the same, bit for bit; two thirds of the time may go.

Source:
    ITU-T H.264 (08/2021), 7.4.1: `nal_ref_idc` is 0 in what no other picture refers to, and `nal_unit_type` is 5 in an
    IDR picture, before which no picture is referred to from then on.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from avlm.data.decoding.h264 import brings_fields, has_fields, is_idr, is_spare

MOST_BYTES = 64 * 2**20
"""Of packets that are held until it is known which of them are needed; what is longer is decoded as it comes."""
BEYOND = 4
"""Packets behind the last wanted frame that show which it is: it, and its neighbour, may be stored in another order."""


class Sparing:
    """Decodes the packets of one stream, as far as it takes to have the frames on the screen at some times.

    Args:
        stream: The video's.
        wanted: Times in seconds, ascending.
        clock: Seconds of a time of the container, from where `wanted` counts.
        same_s: Clocks that differ by less are the same.
    """

    def __init__(self, stream: Any, wanted: Sequence[float], clock: Callable[[float], float], same_s: float) -> None:
        self.stream, self.coder = stream, stream.codec_context
        self.unit_s = float(stream.time_base or 0)
        self.wanted, self.clock, self.same_s = wanted, clock, same_s
        self.plain = self.coder.name != "h264" or not wanted
        """Whether what comes is decoded as it comes, for now or for good."""
        self.timeless = self.plain
        told = bytes(self.coder.extradata or b"")
        self.length_bytes = (told[4] & 3) + 1 if len(told) > 4 and told[0] == 1 else None
        self.fields = has_fields(told)
        """Whether two packets can be the two fields of one frame."""
        self.held: list[Any] = []
        self.held_bytes = 0
        self.first = True
        self.done = False

    def frames(self, packet: Any) -> Iterator[Any]:
        """The frames that a packet brings, late or never; an empty packet is the end and brings what is left."""
        if not packet.size:
            yield from self._release(None)
            yield from packet.decode()
            return
        if not self.timeless and not (self.unit_s and packet.pts is not None and packet.dts is not None):
            self.timeless = True
            yield from self._plainly()
        if not self.timeless and packet.is_keyframe and is_idr(data := bytes(packet), self.length_bytes):
            yield from self._release(packet)
            self.plain = False
            self.fields = self.fields or brings_fields(data, self.length_bytes)
        if self.done:
            return
        if self.plain or self.timeless:
            yield from packet.decode()
            return
        self.held.append(packet)
        self.held_bytes += packet.size
        if self.held_bytes > MOST_BYTES:
            yield from self._plainly()
        elif self._behind(packet):
            yield from self._release(None)
            self.done = True

    def _behind(self, packet: Any) -> bool:
        """Whether the packets that are held reach behind all that is wanted."""
        last = self.wanted[-1] + self.same_s
        at = self.clock(packet.dts * self.unit_s)
        return at > last and sum(self._time(held) > last for held in self.held[-2 * BEYOND :]) >= BEYOND

    def _time(self, packet: Any) -> float:
        return self.clock(packet.pts * self.unit_s)

    def _plainly(self) -> Iterator[Any]:
        """Decode what is held, and what comes as it comes."""
        self.plain = True
        held, self.held, self.held_bytes = self.held, [], 0
        for packet in held:
            yield from packet.decode()

    def _release(self, following: Any | None) -> Iterator[Any]:
        """Decode what is needed of a stretch that is held whole; `following` begins the next one."""
        import av

        held, self.held, self.held_bytes = self.held, [], 0
        if not held:
            return
        needed = self._needed([self._time(packet) for packet in held], following)
        self.first = False
        if not needed:
            return
        # Left out by ourselves: a decoder that is told to skip pictures says nothing of those that it fails to decode.
        for number, packet in enumerate(held[: max(needed) + 1]):
            if number in needed or not is_spare(bytes(packet), self.length_bytes):
                yield from packet.decode()
        if max(needed) + 1 < len(held):  # what the decoder keeps back would otherwise come when it is too late
            end = av.Packet()
            end.stream, end.time_base = self.stream, self.stream.time_base
            yield from end.decode()
            self.coder.flush_buffers()

    def _needed(self, times: list[float], following: Any | None) -> set[int]:
        """Numbers of the packets whose frames are on the screen at a wanted time, with the neighbours of each where two
        packets can be the two fields of one frame."""
        order = sorted(range(len(times)), key=times.__getitem__)
        shown = [times[number] for number in order]
        end = float("inf") if following is None else self._time(following)
        found, beside = set[int](), int(self.fields)
        for wanted in self.wanted:
            at = bisect_right(shown, wanted + self.same_s) - 1
            if (at < 0 and not self.first) or wanted + self.same_s >= end:
                continue
            at = max(0, at)
            found.update(order[max(0, at - beside) : at + 1 + beside])
        return found
