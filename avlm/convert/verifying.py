"""Whether weights are what was written, and numbers at all."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

from torch import nn

from avlm.errors import WeightsError

SUMS = "SHA256SUMS"
"""Beside the weights of a model directory, as ``sha256sum --check SHA256SUMS`` reads it."""


def write_sums(folder: Path) -> None:
    """Write down the checksum of every file of weights in a folder."""
    lines = [f"{_sha256(path)}  {path.name}\n" for path in sorted(folder.glob("*.safetensors"))]
    (folder / SUMS).write_text("".join(lines))


def check_sums(folder: Path) -> int:
    """Compare the files of weights with the checksums that were written with them.

    Returns:
        How many files were compared; 0 where no checksums were written.

    Raises:
        WeightsError: A file is missing or is not what was written.
    """
    path = folder / SUMS
    if not path.is_file():
        return 0
    known = [line.split(maxsplit=1) for line in path.read_text(errors="replace").splitlines() if line.strip()]
    for entry in known:
        name = entry[-1].lstrip("*")
        file = folder / Path(name).name
        if len(entry) != 2 or not file.is_file() or _sha256(file) != entry[0]:
            raise WeightsError(
                f"{folder}: {name} is not what was written there (its checksum in {SUMS} is another), so its weights "
                f"may be damaged. Copy the directory again; if you changed the weights on purpose, remove {SUMS}"
            )
    return len(known)


@dataclass(slots=True)
class Suspects:
    """Tensors of a model that look wrong, by name."""

    lost: list[str] = field(default_factory=list)
    """With a NaN or an infinity; of buffers those with a NaN, because limits may be infinite."""
    zero: list[str] = field(default_factory=list)
    """Matrices and kernels that are zero throughout: biases and norms may be, these seldom are."""


def suspects(model: nn.Module) -> Suspects:
    """Look at every weight and buffer of a model once."""
    found = Suspects()
    for name, parameter in model.named_parameters():
        if not bool(parameter.isfinite().all()):
            found.lost.append(name)
        elif parameter.ndim > 1 and not bool(parameter.any()):
            found.zero.append(name)
    found.lost += [n for n, b in model.named_buffers() if b.is_floating_point() and bool(b.isnan().any())]
    return found


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
