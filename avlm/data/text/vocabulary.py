"""Tokenizers: byte-level BPE learned from the run's own texts, and tokens added to any."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from avlm.data.text.templates import PLACEHOLDERS, placeholders, without_media
from avlm.errors import ConfigError
from avlm.samples import Sample

PAD, END = "<|pad|>", "<|end|>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")


LONGEST = 10_000
"""Characters of one text from which a vocabulary is learned. A word of a hundred thousand letters (somebody's file as a
text, say) would keep the learner for ten seconds, and one of a million for many minutes."""


def sample_texts(samples: Iterable[Sample]) -> Iterable[str]:
    """Every text of every turn, with the words that stand for media; of very long ones the beginning."""
    return (turn.text()[:LONGEST] for sample in samples for turn in without_media(sample).turns)


def make_tokenizer(texts: Iterable[str], size: int) -> PreTrainedTokenizerBase:
    """Learn a tokenizer.

    Args:
        texts: What it will have to write. Any other text can be written too, in more tokens.
        size: Largest vocabulary.

    Returns:
        A tokenizer with a pad token, an end token, a token for each role, and the placeholders of media.

    Source:
        Byte-level BPE as in GPT-2 (Radford et al., 2019), by the `tokenizers` library.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [PAD, END, *ROLES, *PLACEHOLDERS.values()]
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[*ROLES, *PLACEHOLDERS.values()],
    )


def add_tokens(tokenizer: PreTrainedTokenizerBase, ordinary: Sequence[str] = (), special: Sequence[str] = ()) -> None:
    """Give a tokenizer the tokens that it lacks: those that are asked for, and the placeholders of media.

    Args:
        ordinary: Words that become one token each wherever they are written.
        special: The same, and left out where text is decoded without special tokens.
    """
    known = tokenizer.get_added_vocab()
    tokenizer.add_tokens([t for t in ordinary if t not in known])
    there = placeholders(tokenizer)
    media = [token for kind, token in PLACEHOLDERS.items() if kind not in there]
    tokenizer.add_tokens([t for t in (*special, *media) if t not in known], special_tokens=True)


def add_wraps(tokenizer: PreTrainedTokenizerBase, tokens: Iterable[str]) -> None:
    """Give a tokenizer special tokens around media, where its vocabulary lacks them.

    Raises:
        ConfigError: One of them is a placeholder.
    """
    tokens = list(tokens)
    for token in PLACEHOLDERS.values():
        if token in tokens:
            raise ConfigError(
                f"the token {token} stands for media itself, so it cannot stand around them. "
                f"Use another, such as {token[:-1]}_start>"
            )
    missing = [t for t in dict.fromkeys(tokens) if t not in tokenizer.get_vocab()]
    if missing:
        tokenizer.add_tokens(missing, special_tokens=True)
