"""The one place where media enter the text: filled right, or refused by name."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from avlm.errors import LayoutError
from avlm.layout import Segment
from avlm.models.fusion import causal_targets, check_counts, place_embeddings
from avlm.samples import Place

IMAGE = 7


def slow_place(text: Tensor, ids: Tensor, media: Tensor) -> Tensor:
    rows, taken = [], 0
    for b in range(ids.shape[0]):
        row = []
        for t in range(ids.shape[1]):
            if ids[b, t] == IMAGE:
                row.append(media[taken])
                taken += 1
            else:
                row.append(text[b, t])
        rows.append(torch.stack(row))
    return torch.stack(rows)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.lists(st.booleans(), min_size=6, max_size=6), min_size=1, max_size=3))
def test_matches_the_slow_loop_forward_and_backward(where: list[list[bool]]) -> None:
    ids = torch.tensor([[IMAGE if place else 1 for place in row] for row in where])
    torch.manual_seed(0)
    text = torch.randn(*ids.shape, 4, requires_grad=True)
    media = torch.randn(int((ids == IMAGE).sum()), 4, requires_grad=True)
    fast, slow = place_embeddings(text, ids, IMAGE, media, "image"), slow_place(text, ids, media)
    torch.testing.assert_close(fast, slow, rtol=0, atol=0)
    weights = torch.randn(fast.shape)
    for ours, theirs in zip(
        torch.autograd.grad((fast * weights).sum(), (text, media), materialize_grads=True),
        torch.autograd.grad((slow * weights).sum(), (text, media), materialize_grads=True),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_the_text_is_not_changed_in_place_and_keeps_its_type() -> None:
    text = torch.zeros(1, 3, 2, dtype=torch.bfloat16)
    filled = place_embeddings(text, torch.tensor([[1, IMAGE, 1]]), IMAGE, torch.ones(1, 2), "image")
    assert filled.dtype == torch.bfloat16 and filled[0, 1].tolist() == [1, 1] and text.sum() == 0


@pytest.mark.parametrize("found", [0, 1, 3])
def test_more_or_fewer_embeddings_than_places_are_refused(found: int) -> None:
    with pytest.raises(LayoutError) as error:
        place_embeddings(torch.zeros(1, 3, 2), torch.tensor([[IMAGE, 1, IMAGE]]), IMAGE, torch.ones(found, 2), "image")
    assert str(error.value) == (
        f"the text reserves 2 image places, but the encoders returned {found} embeddings. "
        "The data and the model were built from different settings; prepare the data with the model's own processor"
    )


def places() -> list[Place]:
    return [
        Place("a", 0, (Segment("image", 4),)),
        Place("a", 1, (Segment("audio", 3),)),
        Place("b", 0, (Segment("video", 2), Segment("audio", 1), Segment("video", 2), Segment("audio", 1))),
    ]


RIGHT = {"image": [4], "audio": [3, 2], "video": [2, 2]}


def test_counts_that_agree_pass() -> None:
    check_counts(places(), RIGHT)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": [5]}, 'sample "a", item 0 (image): 4 places are reserved and the encoder made 5 embeddings.'),
        ({"image": []}, 'sample "a", item 0 (image): 4 places are reserved and the encoder made 0 embeddings.'),
        ({"audio": [2, 3]}, 'sample "a", item 1 (audio): 3 places are reserved and the encoder made 5 embeddings.'),
        ({"audio": [3, 1]}, 'sample "b", item 0 (audio): 2 places are reserved and the encoder made 1 embeddings.'),
        ({"video": [2]}, 'sample "b", item 0 (video): 4 places are reserved and the encoder made 2 embeddings.'),
        (
            {"image": [4, 4, 2]},
            "2 image items have no place in the text: 0 places are reserved for them and the encoder made 6",
        ),
    ],
)
def test_a_mismatch_names_sample_item_expected_and_found(change: dict[str, list[int]], message: str) -> None:
    with pytest.raises(LayoutError) as error:
        check_counts(places(), {**RIGHT, **change})
    assert str(error.value).startswith(message)
    assert str(error.value).endswith("repare the data with the model's own processor")


def test_targets_are_the_positions_before_what_is_learned() -> None:
    labels = torch.tensor([[-100, 5, -100, 6, 7], [9, -100, -100, -100, 8]])
    assert causal_targets(labels).tolist() == [
        [True, False, True, True, False],  # 5 follows position 0; 6 and 7 follow 2 and 3
        [False, False, False, True, False],  # nothing leads to the 9
    ]
