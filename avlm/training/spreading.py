"""Each step's encoder work, spread evenly over the processes, whoever reads the pictures and sounds.

Before the first row of a step every process says what its rows hold. Each of them follows from that who encodes what
(`planning.ranks.share_out`), without another word; it is what the rows hold rather than what an index forecasts, so
what was left out, cut or changed is counted as it is. Then

    media        go to whom they were given to, but for those that stay
    embeddings   come back, and wait for the row that asks for them
    gradients    behind the last row, of the embeddings that a trained encoder made, go to whoever made them

in exchanges that all processes take part in, also one that reads no media or no row. Connectors and everything behind
them stay where the row is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from rich.console import Console
from torch import Tensor

from avlm.config.run import RunConfig
from avlm.config.stage import Stage
from avlm.data.planning.ranks import share_out
from avlm.models.features import Encode, EncoderPart, FeatureStore, Medium
from avlm.models.media import ENCODERS, embeddings, learns, positions_of, row_media, work_by_place
from avlm.models.modeling import AvlmForConditionalGeneration
from avlm.samples import Row
from avlm.training.console import tell
from avlm.training.swapping import swap
from avlm.training.world import World

TOGETHER = 32
"""Media that go through an encoder at once."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A medium of any process."""

    part: EncoderPart
    home: int
    """The process that reads it."""
    maker: int
    """The process that encodes it."""
    facts: tuple[int, ...]


class Prepared:
    """Embeddings that were made before their row (`models.features.FeatureStore`)."""

    def __init__(self, made: dict[EncoderPart, list[Tensor]]) -> None:
        self.made = made

    def keeps(self, part: EncoderPart) -> bool:
        return True

    def recall(self, part: EncoderPart, media: Sequence[Medium], encode: Encode) -> list[Tensor]:
        """The next so many; the model asks for a row's media in the order of `models.media.row_media`."""
        found, self.made[part] = self.made[part][: len(media)], self.made[part][len(media) :]
        assert len(found) == len(media), "what was prepared is what the model asks for"
        return found


class Spread:
    """Spreads the encoder work of one stage.

    Args:
        model: Prepared for the stage; its encoders are whole while a step goes on.
        counted: While such a block runs, operations are counted.
    """

    def __init__(
        self,
        world: World,
        model: AvlmForConditionalGeneration,
        counted: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self.world, self.model, self.counted = world, model.model, counted
        self.work = {part: work_by_place(self.model, part) for part in ENCODERS}
        self.learned = frozenset(part for part in ENCODERS if learns(self.model, part))

    @contextmanager
    def step(self, rows: Sequence[Row]) -> Iterator[Callable[[int], AbstractContextManager[None]]]:
        """Encode a step's media before the block, and send gradients back behind it.

        Args:
            rows: That this process reads.

        Returns:
            For the number of a row, what it is to be read in.
        """
        by_row = [row_media(self.model, row) for row in rows]
        own = [(part, medium) for found in by_row for part in ENCODERS for medium in found[part]]
        pieces = self._share(own)
        if not pieces:  # in no process
            yield lambda number: nullcontext()
            return
        mine = [piece for piece in pieces if piece.maker == self.world.rank]
        given = self._send([medium.values.to(self.world.device) for _, medium in own], pieces, back=False)
        made = self._encode(
            [(piece.part, Medium(values, piece.facts)) for piece, values in zip(mine, given, strict=True)]
        )
        ready = self._send([tensor.detach() for tensor in made], pieces, back=True)
        for (part, _), tensor in zip(own, ready, strict=True):
            tensor.requires_grad_(part in self.learned)
        waiting = iter(ready)
        by_row_ready = [{part: [next(waiting) for _ in found[part]] for part in ENCODERS} for found in by_row]
        yield lambda number: self._prepared(by_row_ready[number])
        self._learn(made, mine, ready, pieces)

    def _share(self, own: Sequence[tuple[EncoderPart, Medium]]) -> list[Piece]:
        """All media of the step, process after process, and who encodes each of them."""
        told = [
            (ENCODERS.index(part), self.work[part] * positions_of(self.model, part, one), *one.facts)
            for part, one in own
        ]
        seen = self.world.gather(told)
        homes = [home for home, theirs in enumerate(seen) for _ in theirs]
        said = [one for theirs in seen for one in theirs]
        makers = share_out([float(cost) for _, cost, *_ in said], homes, self.world.size)
        return [
            Piece(ENCODERS[part], home, maker, tuple(facts))
            for (part, _, *facts), home, maker in zip(said, homes, makers, strict=True)
        ]

    def _send(self, tensors: Sequence[Tensor], pieces: Sequence[Piece], *, back: bool) -> list[Tensor]:
        """From each piece's home to its maker, or back.

        Args:
            tensors: One for each piece that lies here, in the order of the pieces.

        Returns:
            One for each piece that is wanted here, in the order of the pieces.
        """
        here, size = self.world.rank, self.world.size
        ways = [(piece.maker, piece.home) if back else (piece.home, piece.maker) for piece in pieces]
        parcels: list[list[Tensor]] = [[] for _ in range(size)]
        for tensor, to in zip(tensors, [to for source, to in ways if source == here], strict=True):
            parcels[to].append(tensor)
        staying, parcels[here] = parcels[here], []
        sources = [source for source, to in ways if to == here]
        counts = [0 if rank == here else sources.count(rank) for rank in range(size)]
        got = swap(self.world, parcels, counts)
        got[here] = staying
        queues = [iter(parcel) for parcel in got]
        return [next(queues[source]) for source in sources]

    def _encode(self, media: Sequence[tuple[EncoderPart, Medium]]) -> list[Tensor]:
        """Embeddings of media of all parts, in their order."""
        found: dict[int, Tensor] = {}
        with self.counted():
            for part in ENCODERS:
                numbers = [i for i, (wanted, _) in enumerate(media) if wanted == part]
                for first in range(0, len(numbers), TOGETHER):
                    some = numbers[first : first + TOGETHER]
                    found.update(zip(some, embeddings(self.model, part, [media[i][1] for i in some]), strict=True))
        return [found[i] for i in range(len(media))]

    def _learn(
        self, made: Sequence[Tensor], mine: Sequence[Piece], ready: Sequence[Tensor], pieces: Sequence[Piece]
    ) -> None:
        """Take the gradients of all embeddings that a trained encoder made to whoever made them, and on into it."""
        learned = [piece for piece in pieces if piece.part in self.learned]
        if not learned or not torch.is_grad_enabled():
            return
        grads = [torch.zeros_like(t) if t.grad is None else t.grad for t in ready if t.requires_grad]
        coming = self._send(grads, learned, back=False)
        outputs = [tensor for tensor, piece in zip(made, mine, strict=True) if piece.part in self.learned]
        if outputs:
            torch.autograd.backward(outputs, coming)

    @contextmanager
    def _prepared(self, made: dict[EncoderPart, list[Tensor]]) -> Iterator[None]:
        before: FeatureStore | None = self.model.features
        self.model.features = Prepared(made)
        try:
            yield
        finally:
            self.model.features = before


def spread_of(
    run: RunConfig,
    stage: Stage,
    world: World,
    model: AvlmForConditionalGeneration,
    console: Console,
    counted: Callable[[], AbstractContextManager[None]],
) -> Spread | None:
    """What spreads the encoder work of a stage, where that is asked for and there is anybody to share it with."""
    if run.parallel.encoders == "own" or world.alone:
        return None
    if stage.supervise == "words":
        tell(
            console,
            f"{stage.name}: every process encodes what it reads, parallel.encoders=spread notwithstanding, because the "
            "encoder is all that learns here, and what it makes is not handed on",
        )
        return None
    return Spread(world, model, counted)


def reading(
    spread: Spread | None, rows: Sequence[Row] | None
) -> AbstractContextManager[Callable[[int], AbstractContextManager[None]]]:
    """What the rows of a step are read in, by number, where their media may be encoded elsewhere."""
    return nullcontext(lambda number: nullcontext()) if spread is None or rows is None else spread.step(rows)
