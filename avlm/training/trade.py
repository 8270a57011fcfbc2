"""How an encoder learns its trade by itself: it tells in words what its media show or say.

No language model stands behind the encoder here, only one throwaway layer: a picture's
words are told all at once, place by place; a sound's words in the order of time, by CTC.
Gradients reach the encoder at first hand, which is several times quicker than through a
language model, and the encoder's embeddings come out readable by a single matrix.

Source:
    Parallel prediction of captions from an encoder as in CapPa (arXiv:2306.07915), with a linear layer as decoder;
    Connectionist Temporal Classification (Graves et al., ICML 2006).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from avlm.config.ctc import Ctc
from avlm.config.media import AudioSpec
from avlm.config.stage import Stage
from avlm.errors import ConfigError
from avlm.layout import image_embedding_count
from avlm.models.encoders import encoder_width
from avlm.models.hearing import encode_sounds
from avlm.models.modeling import AvlmForConditionalGeneration
from avlm.models.vision_encoders import encode_images
from avlm.samples import IGNORE, Row

GRID = 4
"""Finer grids of embeddings are averaged to this many rows and columns first, so that the layer stays small."""
PLACES = 12
"""Words of a picture that are told; what follows is left out."""
MOMENTS_PER_S = 12.5
"""Embeddings of a sound are averaged to about so many a second before its words are told: fewer blanks between them."""
BYTES = 256
"""Units that a text in UTF-8 is written in."""
NARROW = 48
"""Width that the words of all places share before the vocabulary."""


class PictureWords(nn.Module):
    """All words of a picture at once, from all its embeddings.

    Args:
        embeddings: How many a picture has, in a square grid.
        width: C, of each.
        vocabulary: V; the end of the text is one token more.
    """

    def __init__(self, embeddings: int, width: int, vocabulary: int) -> None:
        super().__init__()
        self.side = math.isqrt(embeddings)
        cells = min(self.side, GRID) ** 2
        self.places = nn.Linear(cells * width, PLACES * NARROW)
        self.words = nn.Linear(NARROW, vocabulary + 1)
        self.end = vocabulary

    def forward(self, states: Tensor) -> Tensor:
        """Embeddings (N, n, C) to logits (N, PLACES, V + 1)."""
        grid = states.transpose(1, 2).reshape(*states.shape[::2], self.side, self.side)
        if self.side > GRID:
            grid = F.adaptive_avg_pool2d(grid, GRID)
        logits: Tensor = self.words(self.places(grid.flatten(1)).reshape(-1, PLACES, NARROW))
        return logits

    def loss(self, states: Tensor, words: Sequence[Sequence[int]], label_smoothing: float) -> Tensor:
        """Sum of the cross-entropies of all words and one end for each picture."""
        told = [[*w, self.end][:PLACES] for w in words]
        targets = torch.tensor([w + [IGNORE] * (PLACES - len(w)) for w in told], device=states.device)
        logits = self(states).float().flatten(0, 1)
        return F.cross_entropy(logits, targets.flatten(), reduction="sum", label_smoothing=label_smoothing)


class SoundWords(nn.Module):
    """The words of a sound in the order of time, none of them aligned: CTC.

    Args:
        width: C, of each embedding.
        vocabulary: V; the blank is one token more.
        pool: Embeddings that are averaged before their word is told.
    """

    def __init__(self, width: int, vocabulary: int, pool: int = 4) -> None:
        super().__init__()
        self.pool = pool
        self.words = nn.Linear(width, vocabulary + 1)
        self.blank = vocabulary
        # Most of a sound is blank; an even start would spend a hundred steps on learning just that.
        nn.init.constant_(self.words.bias[self.blank : self.blank + 1], math.log(vocabulary))

    def loss(self, states: Sequence[Tensor], words: Sequence[Sequence[int]]) -> Tensor:
        """Sum over the sounds; one too short for its words teaches nothing."""
        pooled = [self._pooled(s) for s in states]
        padded = nn.utils.rnn.pad_sequence(pooled)
        return F.ctc_loss(
            self.words(padded).float().log_softmax(2),
            torch.tensor([w for sound in words for w in sound], device=padded.device),
            torch.tensor([len(s) for s in pooled]),
            torch.tensor([len(w) for w in words]),
            blank=self.blank,
            reduction="sum",
            zero_infinity=True,
        )

    def tell(self, states: Sequence[Tensor]) -> list[list[int]]:
        """The words of sounds: the likeliest token of each moment, without blanks and repetitions."""
        best = [self.words(self._pooled(s)).argmax(1).tolist() for s in states]
        return [[token for token, _ in itertools.groupby(one) if token != self.blank] for one in best]

    def _pooled(self, states: Tensor) -> Tensor:
        return F.avg_pool1d(states.T, min(self.pool, len(states)), self.pool, ceil_mode=True).T


def moment(spec: AudioSpec) -> int:
    """Embeddings of an encoder that are averaged to one moment: 4 of Whisper's, 2 of VITA's, 8 of BEATs'."""
    steps_per_s = spec.sample_rate_hz / (spec.hop * spec.stack) / math.prod(c.stride for c in spec.convolutions)
    return spec.rows * max(1, round(steps_per_s / MOMENTS_PER_S))


def make_head(model: AvlmForConditionalGeneration, stage: Stage, seed: int) -> PictureWords | SoundWords:
    """The throwaway layer of a stage that teaches an encoder by itself, the same for the same seed."""
    vocabulary = model.config.text_config.get_text_config().vocab_size
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if stage.builds == "vision":
            spec = model.config.media_spec().vision
            assert spec is not None
            if spec.sized:
                raise ConfigError(
                    f"stage {stage.name} teaches the vision encoder the words of whole pictures, one grid each, and "
                    "here pictures are cut into tiles or keep their own shape. Leave model.vision.tiling out, and use "
                    "an encoder that sees squares; or supervise answers"
                )
            head: PictureWords | SoundWords
            head = PictureWords(image_embedding_count(spec), encoder_width(model.config.vision_config), vocabulary)
        else:
            heard = model.config.media_spec().audio
            assert heard is not None
            width = encoder_width(model.config.audio_config)
            if stage.loss == "ctc":
                how = stage.ctc or Ctc()
                head = SoundWords(width, vocabulary if how.units == "tokens" else BYTES, how.pool * heard.rows)
            else:
                head = SoundWords(width, vocabulary, moment(heard))
    tower = model.model.vision_tower if stage.builds == "vision" else model.model.audio_tower
    assert tower is not None
    return head.to(next(tower.parameters()).device)  # the language model may be without memory


def words_loss(
    model: AvlmForConditionalGeneration, head: PictureWords | SoundWords, row: Row, label_smoothing: float = 0.0
) -> Tensor:
    """Sum of what the words of a row's media cost, in float32."""
    inner, config = model.model, model.config
    if isinstance(head, PictureWords):
        assert row.pixel_values is not None and inner.vision_tower is not None
        seen = encode_images(inner.vision_tower, row.pixel_values, config.vision_layer)
        return head.loss(torch.stack(seen).float(), row.words, label_smoothing)
    spec = config.media_spec().audio
    assert row.input_features is not None and row.input_features_mask is not None
    assert spec is not None and inner.audio_tower is not None
    states = encode_sounds(inner.audio_tower, row.input_features, row.input_features_mask, spec, config.audio_layer)
    edges = [0, *itertools.accumulate(row.chunks)]
    sounds = [states[a] if b == a + 1 else torch.cat(states[a:b]) for a, b in itertools.pairwise(edges)]
    return head.loss([sound.float() for sound in sounds], row.words)  # the head is in single precision
