"""The vocabulary grows: what was known keeps its row, what is new begins with something sensible, nothing shrinks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    PhiConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from avlm.config.model import LanguagePart, ModelConfig
from avlm.convert.compose import Composed, compose
from avlm.convert.weights import load_model, save_model
from avlm.data.text.templates import PLACEHOLDERS
from avlm.data.text.vocabulary import make_tokenizer
from avlm.samples import Sample

TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
SIZES: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
WIDE: dict[str, Any] = {**SIZES, "intermediate_size": 32, "num_key_value_heads": 2}
FAMILIES: dict[str, Callable[..., Any]] = {
    "llama": lambda **k: LlamaConfig(**WIDE, **k),
    "qwen2": lambda **k: Qwen2Config(**WIDE, **k),
    "mixtral": lambda **k: MixtralConfig(**WIDE, num_local_experts=2, **k),
    "gpt2": lambda **k: GPT2Config(**SIZES, **k),
    "phi": lambda **k: PhiConfig(**WIDE, **k),
}


def word_tokenizer(words: list[str], *special: str) -> PreTrainedTokenizerBase:
    """A tokenizer with byte fallback and a mark for spaces, as Llama's and Mistral's: the letters, and these words."""
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    vocabulary = ["<unk>", "<s>", "</s>", *special, "\u2581", *letters, *(f"<0x{b:02X}>" for b in range(256))]
    vocabulary += [word for word in words if word not in vocabulary]
    merges: list[tuple[str, str]] = []
    ids = {token: i for i, token in enumerate(vocabulary)}
    for word in words:
        for end in range(2, len(word) + 1):
            ids.setdefault(word[:end], len(ids))
            if (word[: end - 1], word[end - 1]) not in merges:
                merges.append((word[: end - 1], word[end - 1]))
    bpe = Tokenizer(models.BPE(ids, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    bpe.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first")])
    found = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    found.chat_template = TEMPLATE
    return found


SMALL = ["\u2581red", "\u2581blue"]
LARGE = ["\u2581green", "\u2581blue", "\u2581red", "green", "\u7d05"]


@pytest.fixture
def release(tmp_path: Path) -> Callable[..., Path]:
    """Write a language model and its tokenizer as if they had been downloaded."""

    def write(family: str = "llama", *, rows: int | None = None, tied: bool = False, **settings: Any) -> Path:
        tokenizer = word_tokenizer(SMALL)
        ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
        sizes = {"vocab_size": rows or len(tokenizer), "tie_word_embeddings": tied}
        torch.manual_seed(3)
        model = AutoModelForCausalLM.from_config(FAMILIES[family](**ids, **sizes, **settings))
        for parameter in model.parameters():
            parameter.data.normal_(std=0.3)
        model.save_pretrained(tmp_path / family)
        tokenizer.save_pretrained(tmp_path / family)
        return tmp_path / family

    return write


def tables(model: Any) -> dict[str, Tensor]:
    """Everything with a row for each token."""
    head = model.get_output_embeddings()
    found = {"in": model.get_input_embeddings().weight, "out": head.weight, "bias": getattr(head, "bias", None)}
    return {name: t.detach() for name, t in found.items() if t is not None}


def part(path: Path, **settings: Any) -> ModelConfig:
    return ModelConfig(language=LanguagePart(path=str(path), **settings))


def mean(table: Tensor, rows: list[int]) -> Tensor:
    """Row by row, in double precision."""
    total = torch.zeros_like(table[0], dtype=torch.float64)
    for row in rows:
        total = total + table[row].double()
    return (total / len(rows)).to(table.dtype)


# ---------------------------------------------------------------- tokens are added


@pytest.mark.parametrize("family", [*FAMILIES, "llama tied"])
@pytest.mark.parametrize("init", ["mean", "pieces"])
def test_new_tokens_begin_with_the_mean_of_all_or_of_their_pieces(
    release: Callable[..., Path], family: str, init: Any
) -> None:
    path = release(family.split()[0], tied="tied" in family or family == "gpt2")
    old, own = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    words = ("redblue", "\u261e")
    made = compose(part(path, add_tokens=words, add_special_tokens=("<2>",), init=init))
    tokenizer, model = made.processor.tokenizer, made.model
    new = [tokenizer.convert_tokens_to_ids(token) for token in (*words, "<2>", *PLACEHOLDERS.values())]
    assert new == list(range(len(own), len(own) + 6))
    before, after = tables(old), tables(model)
    rows = len(before["in"])  # Qwen's tokenizer class brings tokens along that this table has no row for
    assert before.keys() == after.keys() and (family == "phi") == ("bias" in before)
    for name, table in after.items():
        assert torch.equal(table[:rows], before[name])
        for number, token in zip(new, (*words, "<2>", *PLACEHOLDERS.values()), strict=True):
            pieces = own(token, add_special_tokens=False).input_ids if init == "pieces" else []
            known = [piece for piece in pieces if piece < rows] or list(range(rows))
            torch.testing.assert_close(table[number], mean(before[name], known), rtol=1e-6, atol=1e-7)
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert tied == (old.get_input_embeddings().weight is old.get_output_embeddings().weight)
    assert len(after["in"]) == len(after["out"]) == len(own) + 6 == model.config.text_config.vocab_size


def test_added_words_are_one_token_wherever_they_stand_and_special_ones_are_not_shown(
    release: Callable[..., Path], make_sample: Callable[..., Sample], tmp_path: Path
) -> None:
    made = compose(part(release(), add_tokens=("\u261e",), add_special_tokens=("<2>",)))
    save_model(*made, tmp_path / "out")
    for _, processor in (made, load_model(tmp_path / "out")):
        tokenizer = processor.tokenizer
        word, state = tokenizer.convert_tokens_to_ids(["\u261e", "<2>"])
        ids = processor.encode(make_sample(text="red", answer="\u261e<2>red")).ids
        assert ids.count(word) == ids.count(state) == 1 and ids.index(state) == ids.index(word) + 1
        assert tokenizer.decode([word, state], skip_special_tokens=True).strip() == "\u261e"


def test_a_table_with_rows_to_spare_does_not_change_its_size_and_its_spare_rows_are_not_noise_for_new_tokens(
    release: Callable[..., Path],
) -> None:
    path = release(rows=400)
    before, own = tables(AutoModelForCausalLM.from_pretrained(path)), AutoTokenizer.from_pretrained(path)
    model = compose(part(path, add_tokens=("<2>",))).model
    new = range(len(own), len(own) + 4)
    for name, table in tables(model).items():
        assert len(table) == 400 and torch.equal(table[: new.start], before[name][: new.start])
        assert torch.equal(table[new.stop :], before[name][new.stop :])
        for number in new:
            torch.testing.assert_close(table[number], mean(before[name], list(range(len(own)))), rtol=1e-6, atol=1e-7)


def test_a_fresh_language_model_has_rows_for_added_tokens_too(make_model: Callable[..., Composed]) -> None:
    model, processor = make_model("vision", add_tokens=("redblue",), add_special_tokens=("<2>",))
    ids = processor.tokenizer.convert_tokens_to_ids(["redblue", "<2>"])
    assert ids == [len(processor.tokenizer) - 2, len(processor.tokenizer) - 1]
    assert model.get_input_embeddings().num_embeddings == len(processor.tokenizer)


def test_half_precision_rows_that_stay_or_move_keep_their_bits(release: Callable[..., Path], tmp_path: Path) -> None:
    path = release()
    AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).save_pretrained(path)
    before, own = tables(AutoModelForCausalLM.from_pretrained(path)), AutoTokenizer.from_pretrained(path)
    word_tokenizer(LARGE, "<pad>").save_pretrained(tmp_path / "large")
    model, processor = compose(part(path, tokenizer=str(tmp_path / "large")))
    assert {t.dtype for t in tables(model).values()} == {torch.bfloat16}
    for token, number in own.get_vocab().items():
        now = processor.tokenizer.convert_tokens_to_ids(token)
        assert all(torch.equal(table[now], before[name][number]) for name, table in tables(model).items())


# ---------------------------------------------------------------- another tokenizer


def test_another_tokenizer_keeps_the_rows_of_tokens_that_both_have(
    release: Callable[..., Path], tmp_path: Path
) -> None:
    path = release()
    GenerationConfig(bos_token_id=1, eos_token_id=[2, 40], temperature=0.5, do_sample=True).save_pretrained(path)
    old, own = AutoModelForCausalLM.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)
    word_tokenizer(LARGE, "<pad>").save_pretrained(tmp_path / "large")
    model, processor = compose(part(path, tokenizer=str(tmp_path / "large"), init="pieces"))
    tokenizer = processor.tokenizer
    theirs, ours = own.get_vocab(), tokenizer.get_vocab()
    shared = [token for token in theirs if token in ours]
    assert len(shared) == len(theirs) < len(ours) and any(theirs[t] != ours[t] for t in shared)

    before, after = tables(old), tables(model)
    for token, number in ours.items():
        for name, table in after.items():
            if token in theirs:
                assert torch.equal(table[number], before[name][theirs[token]])
    for token, text in (("\u2581green", "green"), ("\u7d05", "\u7d05"), ("<pad>", "<pad>")):
        pieces = own(text, add_special_tokens=False).input_ids
        assert len(pieces) > 1
        for name, table in after.items():
            torch.testing.assert_close(table[ours[token]], mean(before[name], pieces), rtol=1e-6, atol=1e-7)

    words = ["\u2581red", "\u2581", "b", "\u2581blue"]
    with torch.no_grad():
        told = model(torch.tensor([[ours[w] for w in words]])).logits[..., [ours[t] for t in shared]]
        expected = old(torch.tensor([[theirs[w] for w in words]])).logits[..., [theirs[t] for t in shared]]
    torch.testing.assert_close(told, expected, rtol=1e-5, atol=1e-5)

    names = own.convert_ids_to_tokens([2, 40])
    assert ours["</s>"] == 2 and own.convert_tokens_to_ids(names[1]) != ours[names[1]]
    assert model.generation_config.eos_token_id == [ours[name] for name in names]
    assert (model.generation_config.temperature, model.generation_config.do_sample) == (0.5, True)
    assert model.config.bos_token_id == model.config.text_config.bos_token_id == ours["<s>"]


def test_a_token_that_is_no_whole_text_begins_with_the_mean(release: Callable[..., Path], tmp_path: Path) -> None:
    """Byte-level tokens may be a part of a letter; that was written with no pieces."""
    path = release()
    own = AutoTokenizer.from_pretrained(path)
    before = tables(AutoModelForCausalLM.from_pretrained(path))
    bytes_ = make_tokenizer(["a red", "a blue"] * 3, 320)
    bytes_.chat_template = TEMPLATE
    bytes_.save_pretrained(tmp_path / "bytes")
    made = compose(part(path, tokenizer=str(tmp_path / "bytes"), init="pieces"))
    ours = made.processor.tokenizer.get_vocab()
    every = list(range(len(own)))
    for token, pieces in (
        ("\u00c3", every),  # the byte 0xC3, the first half of many letters
        ("\u0120red", own(" red", add_special_tokens=False).input_ids),
        ("r", [own.get_vocab()["r"]]),
    ):
        for name, table in tables(made.model).items():
            torch.testing.assert_close(table[ours[token]], mean(before[name], pieces), rtol=1e-6, atol=1e-7)


def test_a_smaller_tokenizer_leaves_the_table_as_large_and_no_row_twice(
    release: Callable[..., Path], tmp_path: Path
) -> None:
    path = release()
    rows = len(AutoTokenizer.from_pretrained(path))
    before = tables(AutoModelForCausalLM.from_pretrained(path))
    word_tokenizer(["\u2581red"], "<pad>").save_pretrained(tmp_path / "small")
    model, processor = compose(part(path, tokenizer=str(tmp_path / "small")))
    used = set(processor.tokenizer.get_vocab().values())
    free = [i for i in range(len(tables(model)["in"])) if i not in used]
    for name, table in tables(model).items():
        assert len(table) >= rows
        for number in free:
            torch.testing.assert_close(table[number], mean(before[name], list(range(rows))), rtol=1e-6, atol=1e-7)


def test_a_tokenizer_given_for_a_model_without_one_is_taken_for_its_own(
    release: Callable[..., Path], tmp_path: Path
) -> None:
    path = release()
    own = AutoTokenizer.from_pretrained(path)
    own.save_pretrained(tmp_path / "apart")
    for file in path.glob("*token*"):
        file.unlink()
    before = tables(AutoModelForCausalLM.from_pretrained(path))
    model = compose(part(path, tokenizer=str(tmp_path / "apart"))).model
    assert all(torch.equal(table[: len(own)], before[name]) for name, table in tables(model).items())


# ---------------------------------------------------------------- and is trained


def test_a_text_stage_over_a_larger_vocabulary_comes_first(
    release: Callable[..., Path], rows: Callable[..., Path], small_run: Callable[..., Any], tmp_path: Path
) -> None:
    """VITA's first stage: Mixtral with another tokenizer's rows, trained on texts before it sees anything."""
    from avlm.config.io import build
    from avlm.config.run import RunConfig
    from avlm.training.chain import train

    path = release("mixtral")
    word_tokenizer(LARGE, "<pad>").save_pretrained(tmp_path / "large")
    settings = small_run("grown").model_dump(mode="json")
    language = {"path": str(path), "tokenizer": str(tmp_path / "large"), "init": "pieces", "chat_template": TEMPLATE}
    settings["model"]["language"] = language
    settings["model"]["audio"] = None
    steps = {"steps": 2, "batch_samples": 4, "row_tokens": 256}
    settings["stages"] = [
        {"name": "text", "rows": "text", "train": {"language": {"lr": 1e-2}}, "supervise": "everything"}
        | {"balance": 0.02, **steps},
        {"name": "align", "rows": "vision", "train": {"vision_connector": {"lr": 1e-2}}, **steps},
    ]
    out = tmp_path / "grown"
    train(build(RunConfig, settings))
    text, align = load_model(out / "stages" / "text").model, load_model(out / "stages" / "align").model
    start = compose(ModelConfig(language=LanguagePart(**language))).model
    assert len(tables(text)["in"]) == len(AutoTokenizer.from_pretrained(out / "model"))
    assert not torch.equal(tables(text)["in"], tables(start)["in"])
    for (name, a), (_, b) in zip(text.named_parameters(), align.named_parameters(), strict=True):
        assert torch.equal(a, b) != ("connector" in name), name
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert ["balance" in line for line in lines] == [True, True, False, False]
    assert all(1.9 < line["balance"] < 2.5 for line in lines[:2])  # two experts, both used for every token
