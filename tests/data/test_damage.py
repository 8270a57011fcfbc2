"""Damaged files cost their sample and nothing else: no crash, no hang, no memory, one message of our own.

They are decoded in processes of their own by `damage.try_all`.
"""

from __future__ import annotations

import faulthandler
import mmap
import os
import re
import resource
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from damage import CRASHED, DECODED, HUNG, LIMITS, MEMORY, REFUSED, Damage, Outcome, damaged, mutated, try_all
from media_files import EVERY, made, picture, sound, video

from avlm.samples import MediaItem

DECODERS_OWN = re.compile(
    r"errno|libav|libsnd|psf_|Traceback|0x[0-9a-f]{6}|returned \d|cannot identify|broken data|FLAC__|end of file|zlib",
    re.IGNORECASE,
)
"""Words of decoders, which a stranger's file must not choose for us; the name of the error in brackets is our own."""


def checked(outcomes: Sequence[Outcome]) -> Counter[str]:
    """Everything that holds for every damaged file; how many came to what."""
    wrong = [f"{o.damage.name}: {o.what} {o.said}" for o in outcomes if o.what in (CRASHED, HUNG)]
    wrong += [f"{o.damage.name}: decoded, {o.said}" for o in outcomes if o.what == DECODED and o.said]
    wrong += [f"{o.damage.name}: took {o.memory / 2**20:.0f} MB" for o in outcomes if o.memory > MEMORY]
    wrong += [f"{o.damage.name}: should be refused" for o in outcomes if o.damage.hopeless and o.what != REFUSED]
    for outcome in outcomes:
        if outcome.what != REFUSED:
            continue
        if not re.search(r"\. (Replace|Copy|Cut|Check|Give|Make|Encode|Compress)[^\n]*$", outcome.said):
            wrong.append(f"{outcome.damage.name}: says not what to do: {outcome.said}")
        if DECODERS_OWN.search(re.sub(r" \(\w+\)\. Replace", "", outcome.said)) or len(outcome.said) > 400:
            wrong.append(f"{outcome.damage.name}: a decoder speaks: {outcome.said}")
    assert not wrong, "\n".join(wrong)
    return Counter(o.what for o in outcomes)


def told(outcomes: Sequence[Outcome]) -> str:
    """The figures."""
    slowest, largest = max(outcomes, key=lambda o: o.seconds), max(outcomes, key=lambda o: o.memory)
    return (
        f"{len(outcomes)} files: {dict(Counter(o.what for o in outcomes))}; slowest {slowest.seconds:.2f} s "
        f"({slowest.damage.name}), most memory {largest.memory / 2**20:.0f} MB ({largest.damage.name})"
    )


@pytest.mark.slow
def test_there_are_three_hundred_of_every_sort() -> None:
    damages = damaged()
    assert len(damages) == 300
    flipped = [d.data for d in damages if d.name.startswith("flipped")]
    assert flipped != [d.data for d in damaged(seed=1) if d.name.startswith("flipped")]
    for word in ("truncated", "flipped", "wrong ending", "bomb of pixels", "bomb of seconds", "bomb of frames", "pipe"):
        assert any(word in d.name for d in damages), word


def test_the_files_that_are_damaged_are_whole_before(tmp_path: Path) -> None:
    whole = [Damage(name, kind, made(name)) for name, (kind, _) in EVERY.items()]
    outcomes = try_all(whole, tmp_path)
    assert checked(outcomes) == {DECODED: len(EVERY)}


def test_a_crash_a_hang_and_memory_are_seen_as_what_they_are(tmp_path: Path) -> None:
    def behaves(reader: Any, item: MediaItem) -> tuple[str, str]:
        assert item.path is not None
        if item.path.suffix == ".crash":
            faulthandler.disable()  # pytest's, which would write everything down
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # and the system, a picture of its memory
            os.abort()
        if item.path.suffix == ".hang":
            time.sleep(60)
        # Fresh from the system: what numpy asks malloc for may be memory that an earlier test has left.
        taken = np.frombuffer(mmap.mmap(-1, 200 * 2**20), np.uint8)  # bytes
        taken[:] = 1
        return DECODED, "" if taken.all() else "never"

    damages = [Damage(f"a.{word}", "image", b"x") for word in ("crash", "hang", "large", "crash")]
    outcomes = try_all(damages, tmp_path, behaves, hangs_s=8.0)
    assert [o.what for o in outcomes] == [CRASHED, HUNG, DECODED, CRASHED]
    assert outcomes[0].said == "exit status -6"
    assert 200 * 2**20 <= outcomes[2].memory < 210 * 2**20
    with pytest.raises(AssertionError, match=r"a\.crash: crashed exit status -6\n  a\.hang: hung"):
        checked(outcomes)


@pytest.mark.slow
def test_as_large_as_they_may_be_they_are_decoded_within_the_memory(tmp_path: Path) -> None:
    wide = 8 * LIMITS.max_pixels // 9 // 2000
    modes = {"jpeg": "RGB", "png": "RGBA", "webp": "RGBA", "gif": "P", "tiff": "I;16", "bmp": "RGB"}
    large = [Damage(f"a.{form}", "image", picture(form, mode, (2000, wide))) for form, mode in modes.items()]
    large.append(Damage("a.wav", "audio", sound("WAV", rate=48_000, channels=2, seconds=60)))
    large.append(Damage("a.flac", "audio", sound("FLAC", rate=48_000, channels=2, seconds=60)))
    large.append(Damage("a.avi", "video", video("avi", "mpeg4", None, frames=5, size=(2000, wide))))
    outcomes = try_all(large, tmp_path)
    assert checked(outcomes) == {DECODED: len(large)}
    assert max(o.memory for o in outcomes) > MEMORY / 3  # what is freed serves the next one, and is not counted again


def test_a_share_of_the_damaged_files(tmp_path: Path) -> None:
    quick = damaged()[::5] + [d for d in damaged() if d.make is not None]
    found = checked(try_all(quick, tmp_path))
    assert found[REFUSED] > found[DECODED] > 0


def test_a_share_of_the_mutated_files(tmp_path: Path) -> None:
    found = checked(try_all(mutated(216, seed=1), tmp_path))
    assert found[REFUSED] > 20
    assert found[DECODED] > 20


@pytest.mark.slow
def test_all_damaged_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outcomes = try_all(damaged(), tmp_path)
    with capsys.disabled():
        print("\ndamaged:", told(outcomes))
    checked(outcomes)
    assert max(o.seconds for o in outcomes) < 3 * LIMITS.max_decode_s


@pytest.mark.slow
def test_two_thousand_mutated_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outcomes = try_all(mutated(2000), tmp_path)
    with capsys.disabled():
        print("\nmutated:", told(outcomes))
    checked(outcomes)
    assert max(o.seconds for o in outcomes) < 3 * LIMITS.max_decode_s
