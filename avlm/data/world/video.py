"""Videos of two seconds with sound: mp4, h264 and AAC, written by PyAV."""

from fractions import Fraction
from pathlib import Path

import numpy as np

from avlm.data.world.sounds import SAMPLE_RATE_HZ

FRAMES_PER_S = 8
NUM_FRAMES = 16


def write_clip(path: Path, frames: np.ndarray, wave: np.ndarray) -> None:
    """Write one video; equal input gives equal bytes.

    Args:
        path: Where the mp4 goes.
        frames: RGB pixels, uint8, shape (frames, height, width, 3), both sides even.
        wave: Mono waveform at 16 kHz within -1 to 1, as long as the frames last.
    """
    import av

    # "bitexact" keeps the library's version and the date out of the file.
    with av.open(str(path), "w", options={"fflags": "+bitexact"}) as container:
        picture = container.add_stream("libx264", rate=FRAMES_PER_S)
        # Frames are timed in sound samples: the file is shifted by the AAC encoder's
        # delay, and in another unit the rounding would make every frame start late.
        clock = picture.codec_context.time_base = Fraction(1, SAMPLE_RATE_HZ)
        picture.time_base = clock
        picture.height, picture.width = frames.shape[1:3]
        picture.pix_fmt = "yuv420p"
        # One thread and a fixed quantiser: with rate control (crf) the same frames gave other
        # bytes once in some hundred files on a busy machine. A key frame each second, so that
        # each second decodes alone.
        picture.codec_context.thread_count = 1
        picture.options = {"qp": "15", "preset": "veryfast", "bf": "0", "g": str(FRAMES_PER_S)}
        sound = container.add_stream("aac", rate=SAMPLE_RATE_HZ, layout="mono")
        sound.bit_rate = 48_000
        for number, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = number * SAMPLE_RATE_HZ // FRAMES_PER_S, clock
            container.mux(picture.encode(frame))
        container.mux(picture.encode())
        block = av.AudioFrame.from_ndarray(wave[None].astype(np.float32), "fltp", "mono")
        block.sample_rate, block.pts = SAMPLE_RATE_HZ, 0
        container.mux(sound.encode(block))
        container.mux(sound.encode())
