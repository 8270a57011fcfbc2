"""What the ending of a file's name says is in it, and what its first bytes do."""

from __future__ import annotations

from avlm.samples import MediaKind

IMAGES = ("jpg", "jpeg", "png", "webp", "gif", "tif", "tiff", "bmp", "ppm", "pgm", "jp2", "img", "image")
SOUNDS = ("wav", "flac", "mp3", "ogg", "opus", "m4a", "aac", "wma", "aiff", "aif", "sph", "audio")
VIDEOS = ("mp4", "mkv", "webm", "avi", "mov", "mpg", "mpeg", "m4v", "ts", "flv", "wmv", "3gp", "video")
TEXTS = ("txt", "text", "caption", "transcript", "transcription")
CLASSES = ("cls", "label", "class")

_KINDS: dict[str, MediaKind] = {
    **dict.fromkeys(IMAGES, "image"),
    **dict.fromkeys(SOUNDS, "audio"),
    **dict.fromkeys(VIDEOS, "video"),
}
_BEGINNINGS: tuple[tuple[int, bytes, str], ...] = (
    (0, b"\xff\xd8\xff", "jpg"),
    (0, b"\x89PNG", "png"),
    (0, b"GIF8", "gif"),
    (8, b"WEBP", "webp"),
    (0, b"II*\0", "tif"),
    (0, b"MM\0*", "tif"),
    (0, b"BM", "bmp"),
    (8, b"WAVE", "wav"),
    (8, b"AVI ", "avi"),
    (0, b"fLaC", "flac"),
    (0, b"OggS", "ogg"),
    (0, b"ID3", "mp3"),
    (0, b"\xff\xfb", "mp3"),
    (0, b"\x1a\x45\xdf\xa3", "mkv"),
    (4, b"ftypM4A", "m4a"),
    (4, b"ftyp", "mp4"),
)


def kind_by(ending: str) -> MediaKind | None:
    """The kind of medium that an ending is of, such as ``jpg`` or ``0.jpg``; None where it is of none."""
    return _KINDS.get(ending.rpartition(".")[2].lower())


def ending_of(name: str, begins: bytes, kind: MediaKind) -> str:
    """What a medium's file should end with.

    Args:
        name: What it was called so far, if anything.
        begins: Its first bytes.
    """
    ending = name.rpartition(".")[2].lower() if "." in name else ""
    if ending.isalnum() and _KINDS.get(ending) == kind:
        return ending
    return next((found for at, start, found in _BEGINNINGS if begins[at : at + len(start)] == start), kind)
