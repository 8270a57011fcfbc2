"""From the tiles that an encoder saw to the pictures that they were cut from.

The connector translates each tile by itself. What puts several together comes behind it,
in the language model's width: nothing but their order for InternVL's tiles; for
any-resolution one grid of all tiles without its padding, and a learned vector at the end
of each row.

Shapes in this file:
    k  tokens, of a tile or of all end to end    D  language-model width
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from avlm.config.media import VisionSpec
from avlm.errors import LayoutError
from avlm.layout import Size, image_grids, reduced_count, reduced_grid, square_grid, tile_grid, token_grid, unpadded


def picture_grids(spec: VisionSpec, tiles: int, sizes: Sequence[Size] | None) -> list[list[Size]]:
    """For each picture, rows and columns of the embeddings of each of its tiles.

    Args:
        tiles: How many were given, of all pictures.
        sizes: Height and width of each picture; None where each is one square.

    Raises:
        LayoutError: Pictures of these sizes have more or fewer tiles.
    """
    if sizes is None:
        return [image_grids(spec)] * tiles
    grids = [image_grids(spec, size) for size in sizes]
    expected = sum(map(len, grids))
    if expected != tiles:
        raise LayoutError(
            f"pixel_values holds {tiles} tiles, and the {len(sizes)} pictures of image_sizes have {expected}. "
            "Prepare the data with the model's own processor"
        )
    return grids


def check_grids(states: Sequence[Tensor], grids: Sequence[Size]) -> None:
    """Make sure that an encoder made of each tile what the layout says.

    Raises:
        LayoutError: Of one it made more or fewer embeddings.
    """
    for i, (state, (rows, columns)) in enumerate(zip(states, grids, strict=True)):
        if len(state) != rows * columns:
            raise LayoutError(
                f"the vision encoder made {len(state)} embeddings of tile {i}, and its layout has {rows} rows of "
                f"{columns}. Prepare the data with the model's own processor"
            )


def join_tiles(
    tokens_kD: Tensor,
    grids: Sequence[Sequence[Size]],
    sizes: Sequence[Size] | None,
    spec: VisionSpec,
    newline_D: Tensor | None,
) -> tuple[Tensor, list[int]]:
    """Tokens of pictures from those of their tiles.

    Args:
        tokens_kD: Of all tiles of all pictures, end to end, as the connector gives them.
        grids, sizes: As in `picture_grids`.
        newline_D: The vector that ends each row, for any-resolution.

    Returns:
        Tokens of all pictures end to end, and how many each has.

    Source:
        LLaVA-NeXT: the whole picture first, then its tiles as one grid.
    """
    counts = [sum(reduced_count(r * c, spec.reduction, (r, c)) for r, c in tiles) for tiles in grids]
    if newline_D is None or sizes is None:
        return tokens_kD, counts
    pictures = [
        _with_newlines(tokens, size, spec, newline_D)
        for tokens, size in zip(tokens_kD.split(counts), sizes, strict=True)
    ]
    return torch.cat(pictures), [len(picture) for picture in pictures]


def _with_newlines(tokens_kD: Tensor, size: Size, spec: VisionSpec, newline_D: Tensor) -> Tensor:
    """The whole picture's tokens, then those of its tiles row by row, without padding."""
    rows, columns = reduced_grid(square_grid(spec), spec.reduction)
    whole, cut = tokens_kD[: rows * columns], tokens_kD[rows * columns :]
    tiles = cut.unflatten(0, (*tile_grid(size, spec), rows, columns))
    grid = tiles.transpose(1, 2).flatten(2, 3).flatten(0, 1)
    high, wide = unpadded(size, token_grid(size, spec))
    top, left = (grid.shape[0] - high) // 2, (grid.shape[1] - wide) // 2
    kept = grid[top : top + high, left : left + wide]
    lines = torch.cat([kept, newline_D.to(kept).expand(high, 1, -1)], 1)
    return torch.cat([whole, lines.flatten(0, 1)])
