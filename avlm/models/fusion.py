"""The one place where sight and sound enter the text.

Shapes in this file:
    B  rows or prompts    T  token positions    D  language-model width
    M  media embeddings, all items end to end in the order they are read
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from avlm.errors import LayoutError
from avlm.samples import Place


def place_embeddings(text_BTD: Tensor, input_ids_BT: Tensor, token_id: int, media_MD: Tensor, kind: str) -> Tensor:
    """Return the text embeddings with every place of one kind filled.

    Args:
        text_BTD: Text embeddings. What stands at a reserved place is overwritten.
        input_ids_BT: Tokens; places are where ``token_id`` stands.
        token_id: The placeholder of this kind.
        media_MD: Connector outputs, cast to the dtype and moved to the device of ``text_BTD``.
        kind: Word for messages: image, audio or video.

    Returns:
        A new tensor (B, T, D). Gradients reach both inputs.

    Raises:
        LayoutError: There are more or fewer places than embeddings.

    Source:
        Early fusion as in LLaVA (arXiv:2304.08485, section 4.1), with the places
        reserved by the data side rather than spliced in here.
    """
    places = input_ids_BT == token_id
    count = int(places.sum())
    if count != media_MD.shape[0]:
        raise LayoutError(
            f"the text reserves {count} {kind} places, but the encoders returned {media_MD.shape[0]} embeddings. "
            "The data and the model were built from different settings; prepare the data with the model's own processor"
        )
    if not count:
        return text_BTD
    index = places.flatten().nonzero().squeeze(1)
    flat = text_BTD.flatten(0, 1).index_copy(0, index, media_MD.to(text_BTD))
    return flat.view_as(text_BTD)


def check_counts(places: Sequence[Place], found: dict[str, list[int]]) -> None:
    """Compare, item by item, the places that were reserved with the embeddings that came.

    Args:
        places: Media items of a row, in order.
        found: For each kind, tokens of each picture, clip or frame in order.

    Raises:
        LayoutError: The first item that differs, with its sample, what was expected and what was found.
    """
    left = {kind: list(counts) for kind, counts in found.items()}
    for place in places:
        for kind in ("image", "video", "audio"):
            expected = place.count(kind)
            if not expected:
                continue
            got, queue = 0, left.get(kind, [])
            while queue and got < expected:
                got += queue.pop(0)
            if got != expected:
                raise LayoutError(
                    f'sample "{place.sample_id}", item {place.item} ({kind}): {expected} places are reserved and the '
                    f"encoder made {got} embeddings. The data and the model were built from different settings; "
                    "prepare the data with the model's own processor"
                )
    for kind, queue in left.items():
        if queue:
            raise LayoutError(
                f"{len(queue)} {kind} items have no place in the text: 0 places are reserved for them and the encoder "
                f"made {sum(queue)} embeddings. Prepare the data with the model's own processor"
            )


def causal_targets(labels_BT: Tensor, ignore: int = -100) -> Tensor:
    """Positions whose next token is to be learned: bool (B, T), never the last one."""
    next_is_target = torch.zeros_like(labels_BT, dtype=torch.bool)
    next_is_target[:, :-1] = labels_BT[:, 1:] != ignore
    return next_is_target
