# ruff: noqa: E501 (whole messages are compared)
"""The processor as transformers' users know theirs: saved and loaded, called, templated, collated."""

from __future__ import annotations

import base64
import subprocess
import sys
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from chat_families import CHATML, FAMILIES, MEDIA, PARTS, VICUNA, Family, processor, spans_by_hand, tokenizer
from PIL import Image
from transformers import PreTrainedTokenizerFast

from avlm.config.media import MediaSpec, VisionSpec
from avlm.data.given import conversation_sample, media_item
from avlm.data.processor import AvlmProcessor
from avlm.data.text.vocabulary import END, PAD, add_tokens, make_tokenizer
from avlm.errors import ConfigError, DataError, MediaError
from avlm.samples import MediaItem, Picture, Sample, Sound, Text, Turn


@pytest.fixture
def made() -> AvlmProcessor:
    return AvlmProcessor(tokenizer(CHATML), media=MEDIA.model_dump(mode="json"), chat_template=CHATML.template)


@pytest.fixture
def asked(picture: Callable[..., Path], sound: Callable[..., Path]) -> list[dict[str, Any]]:
    return [
        {
            "role": "user",
            "content": [
                {"type": "image", "path": str(picture())},
                {"type": "text", "text": "What?"},
                {"type": "audio", "path": str(sound())},
            ],
        }
    ]


def same(one: Any, other: Any) -> None:
    assert sorted(one) == sorted(other)
    for name in one:
        assert torch.equal(one[name], other[name]), name


def without_labels(made: AvlmProcessor, *samples: Sample, prompt_only: bool = True, side: str = "left") -> Any:
    batch = made.collate([made.encode(sample, prompt_only=prompt_only) for sample in samples], side)
    batch.pop("labels")
    return batch


# ---------------------------------------------------------------- saving


LOAD = """
import sys, avlm
from transformers import AutoProcessor
made = AutoProcessor.from_pretrained(sys.argv[1])
assert type(made).__name__ == "AvlmProcessor", type(made)
conversation = [{"role": "user", "content": [{"type": "image", "path": sys.argv[2]}, {"type": "text", "text": "What?"}]}]
batch = made.apply_chat_template(conversation, add_generation_prompt=True, tokenize=True, return_dict=True)
print(batch["input_ids"].tolist(), sorted(batch), float(batch["pixel_values"].double().sum()))
"""


@pytest.mark.slow
def test_a_saved_processor_is_loaded_by_auto_processor_in_another_process(
    made: AvlmProcessor, picture: Callable[..., Path], tmp_path: Path
) -> None:
    made.save_pretrained(tmp_path / "model")
    assert {"processor_config.json", "tokenizer.json", "chat_template.jinja"} <= {
        p.name for p in (tmp_path / "model").iterdir()
    }
    again = AvlmProcessor.from_pretrained(tmp_path / "model")
    assert again.media_spec() == MEDIA
    assert again.chat_template == CHATML.template
    # the class is found through the processor's own file, or through a model's config.json; here through the latter
    (tmp_path / "model" / "config.json").write_text('{"model_type": "avlm"}')
    path = str(picture())
    done = subprocess.run([sys.executable, "-c", LOAD, str(tmp_path / "model"), path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    sample = Sample("0", (Turn("user", (MediaItem("image", path=Path(path)), Text("What?"))),))
    expected = without_labels(made, sample)
    total = float(expected["pixel_values"].double().sum())
    assert done.stdout.strip() == f"{expected['input_ids'].tolist()} {sorted(expected)} {total}"


def test_a_tokenizer_without_placeholders_is_refused_and_what_it_lacks_is_named() -> None:
    bare = PreTrainedTokenizerFast(tokenizer_object=make_bare())
    with pytest.raises(ConfigError) as error:
        AvlmProcessor(bare, media=MEDIA.model_dump(mode="json"))
    assert str(error.value) == (
        "the tokenizer has no token <image>, <audio>, so media have no place in the text. "
        "Add them with `avlm compose`, which also gives them embeddings"
    )
    add_tokens(bare)
    AvlmProcessor(bare)
    ids = [bare.convert_tokens_to_ids(t) for t in ("<image>", "<audio>", "<video>")]
    assert bare("a<image><audio>b<video>", add_special_tokens=False).input_ids[1:3] == ids[:2]
    size = len(bare)
    add_tokens(bare)
    assert len(bare) == size


def make_bare() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    bare = Tokenizer(models.BPE())
    bare.pre_tokenizer, bare.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    bare.train_from_iterator(
        ["ab"], trainers.BpeTrainer(initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    )
    return bare


def test_wrong_media_settings_are_refused_with_their_key() -> None:
    with pytest.raises(ConfigError) as error:
        AvlmProcessor(tokenizer(CHATML), media={"vision": {"image_size_px": 28, "cell": 14}})
    assert str(error.value) == ("the processor's media: vision.cell is not a setting. Did you mean vision.cell_px?")


def test_a_new_template_is_used_from_then_on(made: AvlmProcessor) -> None:
    sample = Sample("0", (Turn("user", (Text("What?"),)),))
    before = made.encode(sample, prompt_only=True).ids
    made.chat_template = VICUNA.template.replace("</s>", "<|im_end|>")
    after = made.encode(sample, prompt_only=True).ids
    assert tokenizer(CHATML).decode(after) == "USER: What? ASSISTANT:"
    assert after != before


# ---------------------------------------------------------------- templating and calling


def test_a_templated_conversation_is_what_encode_gives(made: AvlmProcessor, asked: list[dict[str, Any]]) -> None:
    expected = without_labels(made, conversation_sample(asked))
    for options in ({"add_generation_prompt": True}, {}):
        same(made.apply_chat_template(asked, tokenize=True, return_dict=True, **options), expected)
    assert torch.equal(made.apply_chat_template(asked, tokenize=True), expected["input_ids"])
    answered = [*asked, {"role": "assistant", "content": "red"}]
    same(
        made.apply_chat_template(answered, tokenize=True, return_dict=True),
        without_labels(made, conversation_sample(answered), prompt_only=False),
    )
    with_other = made.apply_chat_template(asked, VICUNA.template.replace("</s>", "<|im_end|>"), tokenize=True)
    assert "USER:" in tokenizer(CHATML).decode(with_other[0])


def test_each_conversation_of_a_batch_is_written_by_how_it_ends(made: AvlmProcessor) -> None:
    question = [{"role": "user", "content": "What?"}]
    answered = [*question, {"role": "assistant", "content": "red"}]
    batch = made.apply_chat_template([question, answered], tokenize=True, return_dict=True, padding_side="right")
    prompt = made.encode(conversation_sample(question), prompt_only=True).ids
    whole = made.encode(conversation_sample(answered)).ids
    assert batch["input_ids"][0, : len(prompt)].tolist() == prompt
    assert batch["input_ids"][1].tolist() == whole
    assert batch["attention_mask"].sum(1).tolist() == [len(prompt), len(whole)]


def test_the_text_of_a_conversation_is_what_its_template_writes(
    made: AvlmProcessor, asked: list[dict[str, Any]]
) -> None:
    assert made.apply_chat_template(asked, add_generation_prompt=True) == (
        "<|im_start|>user\n<image>What?\n<audio><|im_end|>\n<|im_start|>assistant\n"
    )
    answered = [*asked, {"role": "assistant", "content": "red"}]
    assert made.apply_chat_template([answered]) == [
        "<|im_start|>user\n<image>What?\n<audio><|im_end|>\n<|im_start|>assistant\nred<|im_end|>\n"
    ]


def test_that_text_with_its_media_is_the_same_again(made: AvlmProcessor, asked: list[dict[str, Any]]) -> None:
    """The way of transformers' documentation: template to text, then text and media to the processor."""
    path, sound = asked[0]["content"][0]["path"], asked[0]["content"][2]["path"]
    text = made.apply_chat_template(asked, add_generation_prompt=True)
    expected = without_labels(made, conversation_sample(asked))
    same(made(text=text, images=path, audio=sound), expected)
    same(made(text=[text], images=[path], audio=[sound], return_tensors="pt"), expected)
    same(made(text=text, images=Image.open(path), audio=soundfile.read(sound, dtype="float32")[0]), expected)
    plain = made.apply_chat_template([{"role": "user", "content": "What?"}], add_generation_prompt=True)
    assert made(text=plain)["input_ids"].tolist() == [tokenizer(CHATML)(plain, add_special_tokens=False).input_ids]
    both = made(text=[text, plain], images=[[path], []], audio=[[sound], []], padding=True)
    alone = [without_labels(made, conversation_sample(asked))["input_ids"][0], made(text=plain)["input_ids"][0]]
    for row, mask, ids in zip(both["input_ids"], both["attention_mask"], alone, strict=True):
        assert row[mask.bool()].tolist() == ids.tolist()


def test_that_text_needs_no_more_of_media_than_their_kind(made: AvlmProcessor, asked: list[dict[str, Any]]) -> None:
    bare = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}, {"type": "audio"}]}]
    assert made.apply_chat_template(bare, tokenize=False) == made.apply_chat_template(asked, tokenize=False)
    with pytest.raises(DataError, match='a part of type image has no "path"'):
        made.apply_chat_template(bare, tokenize=True)


def test_a_question_in_plain_words_is_put_into_the_template(made: AvlmProcessor, asked: list[dict[str, Any]]) -> None:
    path, sound = Path(asked[0]["content"][0]["path"]), Path(asked[0]["content"][2]["path"])
    parts = (MediaItem("image", path=path), MediaItem("audio", path=sound), Text("What?"))
    same(made("What?", images=path, audio=[sound]), without_labels(made, Sample("0", (Turn("user", parts),))))
    questions = [Sample("0", (Turn("user", (parts[0], Text("What?"))),)), Sample("1", (Turn("user", (Text("Why?"),)),))]
    same(made(["What?", "Why?"], images=[[path], []], padding=True), without_labels(made, *questions))


@pytest.mark.parametrize("place", ["", "text_kwargs", "processor_kwargs"])
def test_nothing_is_cut_off_at_a_length(place: str, made: AvlmProcessor, asked: list[dict[str, Any]]) -> None:
    def given(**options: Any) -> dict[str, Any]:
        return {place: options} if place else options

    for call in (
        lambda **more: made("What?", images=asked[0]["content"][0]["path"], **more),
        lambda **more: made.apply_chat_template(asked, tokenize=True, return_dict=True, **more),
    ):
        whole = call()
        count = whole["input_ids"].shape[1]
        same(call(**given(truncation=True, max_length=count)), whole)
        same(call(**given(truncation=False, max_length=9)), whole)
        with pytest.raises(ConfigError) as error:
            call(**given(truncation=True, max_length=count - 1))
        assert str(error.value) == (
            f"{count} tokens are to be cut off at {count - 1} (truncation, max_length), with media and what follows "
            "them, and avlm cuts nothing off. Leave out what is too long, or raise max_length"
        )


@pytest.mark.parametrize("place", ["", "text_kwargs", "processor_kwargs"])
def test_padding_and_tensors_are_as_they_are_asked_for(place: str, made: AvlmProcessor) -> None:
    def given(**options: Any) -> dict[str, Any]:
        return {place: options} if place else options

    talks = [[{"role": "user", "content": text}] for text in ("What?", "What is it, and where?")]
    alone = [made.apply_chat_template(talk, tokenize=True)[0].tolist() for talk in talks]
    short, long = map(len, alone)
    assert short < long < 64 and short % 2
    ask = {"tokenize": True, "return_dict": True}
    lists = made.apply_chat_template(talks, **ask)
    assert lists["input_ids"] == alone and lists["attention_mask"] == [[1] * short, [1] * long]
    for side in ("left", "right"):
        for options, width in (
            ({}, long),
            ({"return_tensors": "pt"}, long),
            ({"pad_to_multiple_of": 16}, -(-long // 16) * 16),
            ({"padding": "max_length", "max_length": 64}, 64),
        ):
            batch = made.apply_chat_template(talks, **ask, **given(padding_side=side, **options))
            for ids, row, mask in zip(alone, batch["input_ids"], batch["attention_mask"], strict=True):
                at = slice(width - len(ids), width) if side == "left" else slice(0, len(ids))
                assert row.shape == (width,) and row[at].tolist() == ids
                assert mask[at].all() and mask.sum() == len(ids)
    same(made.apply_chat_template(talks, **ask, **given(padding="max_length")), made.apply_chat_template(talks, **ask, padding=True))  # fmt: skip
    arrays = made.apply_chat_template(talks, **ask, **given(return_tensors="np"))
    assert isinstance(arrays["input_ids"], np.ndarray) and arrays["input_ids"].shape == (2, long)
    with pytest.raises(ConfigError, match="return_tensors='tf' is no kind of tensors that there is here"):
        made("a", **given(return_tensors="tf"))


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_an_answer_is_left_open_to_go_on_with(family: Family, picture: Callable[..., Path]) -> None:
    """As transformers' tokenizers do it: the text up to the last word, whatever the template closes an answer with."""
    made = processor(family)
    said = [{"role": "user", "content": "Say it twice."}, {"role": "assistant", "content": "it and it"}]
    given = (
        [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in said] if family is PARTS else said
    )
    expected = made.tokenizer.apply_chat_template(given, chat_template=family.template, continue_final_message=True, tokenize=False)  # fmt: skip
    assert made.apply_chat_template(said, continue_final_message=True) == expected
    ids = made.apply_chat_template(said, continue_final_message=True, tokenize=True)[0].tolist()
    whole = made.apply_chat_template(said, tokenize=True)[0].tolist()
    assert whole[: len(ids)] == ids and made.tokenizer.decode(ids) == expected
    seen = [{"role": "user", "content": [{"type": "image", "path": str(picture())}]}, said[1]]
    batch = made.apply_chat_template(seen, continue_final_message=True, tokenize=True, return_dict=True)
    assert batch["pixel_values"].shape[0] == 1 and made.tokenizer.decode(batch["input_ids"][0]).endswith("it and it")


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
@pytest.mark.parametrize("side", ["left", "right", None])
def test_the_tokens_of_answers_are_told(family: Family, side: str | None) -> None:
    """Of several lengths: one that ends with an answer, one with a question, one without any answer."""
    made = processor(family)
    said = [("user", "Say."), ("assistant", "it and it"), ("user", "Again?"), ("assistant", "no"), ("user", "So?")]
    talks = [[{"role": role, "content": text} for role, text in said[:count]] for count in (4, 5, 1)]
    ask = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
    batch = made.apply_chat_template(talks, **ask, **({} if side is None else {"padding_side": side}))
    assert isinstance(batch["assistant_masks"], list) == (side is None)
    for count, ids, mask in zip((4, 5, 1), batch["input_ids"], batch["assistant_masks"], strict=True):
        assert len(ids) == len(mask)
        runs = groupby(zip(ids, mask, strict=True), key=lambda pair: bool(pair[1]))
        told = [made.tokenizer.decode([i for i, _ in run]) for of_answer, run in runs if of_answer]
        spans = spans_by_hand(family, said[: count if count % 2 == 0 else count - 1]) if count > 1 else []
        assert told == [text for text, is_learned in spans if is_learned]


def test_a_text_is_taken_as_it_is(made: AvlmProcessor) -> None:
    """The template is for conversations; a question about a picture that has no place in it is the one exception."""
    plain = made.tokenizer("What is it?")["input_ids"]
    assert made("What is it?")["input_ids"].tolist() == [plain]
    bare = made.tokenizer("What is it?", add_special_tokens=False)["input_ids"]
    assert made("What is it?", add_special_tokens=False)["input_ids"].tolist() == [bare]
    pixels = np.zeros((9, 9, 3), np.uint8)
    (ids,) = made("<image>What?", images=pixels, add_special_tokens=False)["input_ids"].tolist()
    place = made.tokenizer.convert_tokens_to_ids("<image>")
    assert [i for i in ids if i != place] == made.tokenizer("What?", add_special_tokens=False)["input_ids"]
    with pytest.raises(ConfigError, match="media have no placeholder in the text"):
        made("What?", images=pixels, add_special_tokens=False)


def test_a_sounds_rate_is_heard_wherever_it_stands(made: AvlmProcessor) -> None:
    wave = np.sin(np.arange(4000)).astype(np.float32)
    talk = [{"role": "user", "content": [{"type": "audio", "audio": wave}, {"type": "text", "text": "What?"}]}]
    ask = {"tokenize": True, "return_dict": True}
    expected = made("<audio>What?", audio=[wave], sampling_rate=8000)
    same(made("<audio>What?", audio=[wave], audio_kwargs={"sampling_rate": 8000}), expected)
    same(made("<audio>What?", audio=[{"array": wave, "sampling_rate": 8000}]), expected)
    assert expected["input_features"].shape != made("<audio>What?", audio=[wave])["input_features"].shape
    told = made.apply_chat_template(talk, **ask, sampling_rate=8000)
    assert torch.equal(told["input_features"], expected["input_features"])
    inner = made.apply_chat_template(talk, **ask, processor_kwargs={"sampling_rate": 8000})
    assert torch.equal(inner["input_features"], expected["input_features"])


def test_what_a_template_leaves_open_reaches_it_and_what_is_unknown_is_told(made: AvlmProcessor) -> None:
    template = "{{ messages[0]['content'] }}{% if thinking is defined and not thinking %} {{ words['a'][0] }}{% endif %}<|assistant|>"
    talk = [{"role": "user", "content": "What?"}]

    def written(**more: Any) -> Any:
        return made.apply_chat_template(talk, chat_template=template, **more)

    assert written() == "What?<|assistant|>" == written(thinking=True, words={"a": ["b"]})
    assert written(thinking=False, words={"a": ['say "é 🎉\n']}) == 'What? say "é 🎉\n<|assistant|>'
    ids = written(tokenize=True, thinking=False, words={"a": ["b"]})
    assert ids.tolist() == [made.tokenizer("What? b<|assistant|>", add_special_tokens=False)["input_ids"]]
    with pytest.raises(ConfigError, match=r"thinking=<object .* is for the chat template, and what it is given are"):
        written(thinking=object())
    with pytest.warns(UserWarning, match="num_frames is nothing that avlm's processor can be asked for"):
        written(num_frames=8)
    with pytest.warns(UserWarning, match="imagess is nothing that avlm's processor can be asked for"):
        made("What?", imagess=[1])


def test_texts_and_media_that_do_not_go_together_are_refused(made: AvlmProcessor, picture: Callable[..., Path]) -> None:
    path = picture()
    for call, message in (
        (lambda: made(), "neither a text nor a medium was given. Give at least one of them"),
        (lambda: made(["a", "b"], images=[path]), "2 texts were given, and not a list of image media for each. Give 2 lists, some of them empty"),
        (lambda: made(["a", "b"], images=[path, path]), "2 texts were given, and not a list of image media for each. Give 2 lists, some of them empty"),
        (lambda: made("<image><image>a", images=path), "text 0 has the placeholders ['image', 'image'], and not so many media are left. Add media"),
        (lambda: made("<image>a", images=[path, path]), "media have no placeholder in the text: {'image': 1}. Write one for each, such as <image>"),
        (lambda: made.collate([]), "there is nothing to make a batch of. Give at least one sample"),
        (lambda: made.collate([made.encode(Sample("", (Turn("user", (Text("a"),)),)), prompt_only=True)], "rigth"), "side='rigth' is neither end of a batch. Pad on the left or on the right"),
        (lambda: made.apply_chat_template([{"role": "user", "content": "a"}], tools=[{}]), "tools is not something that avlm's templates can do. Leave it out"),
        (lambda: made.apply_chat_template([{"role": "user", "content": "a"}], continue_final_message=True), "continue_final_message goes on with the words of the last answer, and there are none. Give some"),
        (lambda: made.apply_chat_template([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], continue_final_message=True, add_generation_prompt=True), "continue_final_message goes on with the words of the last answer, and add_generation_prompt asks for a new one. Leave one of them out"),
    ):  # fmt: skip
        with pytest.raises(ConfigError) as error:
            call()  # type: ignore[no-untyped-call]
        assert str(error.value) == message


def test_media_in_messages_are_found_under_any_of_their_names(
    picture: Callable[..., Path], sound: Callable[..., Path]
) -> None:
    path, pixels = picture(), np.zeros((4, 4, 3), np.uint8)
    for given, expected in (
        ({"path": str(path)}, MediaItem("image", path=path)),
        ({"url": str(path)}, MediaItem("image", path=path)),
        ({"image": path}, MediaItem("image", path=path)),
        ({"path": None, "image": str(path)}, MediaItem("image", path=path)),
        ({"image": b"abc"}, MediaItem("image", data=b"abc")),
        ({"image": pixels}, MediaItem("image", decoded=Picture(pixels))),
    ):
        sample = conversation_sample(
            [{"role": "user", "content": ({"type": "text", "text": "a"}, {"type": "image", **given})}]
        )
        assert sample.turns[0].parts == (Text("a"), expected)
    said = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "weight": 0}]
    assert [turn.text() for turn in conversation_sample(said).turns] == ["q", "a"]
    (part,) = conversation_sample(
        [{"role": "user", "content": [{"type": "audio", "audio": np.ones(9, np.float32), "sampling_rate": 8000}]}]
    ).media()
    assert part.decoded.sample_rate_hz == 8000
    for given, expected in (({}, (0.0, None)), ({"start": 1, "end": 2.5}, (1.0, 2.5))):
        (part,) = conversation_sample([{"role": "user", "content": [{"type": "video", "path": "a", **given}]}]).media()
        assert (part.start_s, part.end_s) == expected


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "a conversation has no message. Give at least one"),
        (["a"], 'a message is a text and not an object. Write {"role": ..., "content": ...}'),
        ([{"content": "a"}], "a message has the role null, and roles are system, user, assistant. Correct it"),
        ([{"role": "tool", "content": "a"}], 'a message has the role "tool", and roles are system, user, assistant. Correct it'),
        ([{"role": "user"}], 'a message has no "content". Give a text, or a list of typed parts'),
        ([{"role": "user", "content": [3]}], "a part is a number and not an object. Write {\"type\": \"text\", \"text\": ...}"),
        ([{"role": "user", "content": [{"type": "image"}]}], 'a part of type image has no "path". Give the path of its file, relative to the data file'),
    ],
)  # fmt: skip
def test_messages_that_are_not_understood_are_refused(messages: Any, message: str) -> None:
    with pytest.raises(DataError) as error:
        conversation_sample(messages)
    assert error.value.reason == message


# ---------------------------------------------------------------- media as people have them


@pytest.mark.parametrize(
    "changed",
    [
        lambda pixels: pixels.transpose(2, 0, 1),
        lambda pixels: torch.from_numpy(pixels).permute(2, 0, 1),
        lambda pixels: pixels.astype(np.float32) / 255,
        lambda pixels: torch.from_numpy(pixels).permute(2, 0, 1).double() / 255,
        lambda pixels: np.dstack([pixels, np.full(pixels.shape[:2], 255, np.uint8)]),
    ],
)
def test_an_array_of_a_picture_may_lie_in_any_way(changed: Callable[[np.ndarray], Any]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    seen = media_item("image", changed(pixels)).decoded
    assert isinstance(seen, Picture) and np.array_equal(seen.pixels, pixels)


def test_an_array_of_one_colour_is_grey() -> None:
    grey = np.random.default_rng(0).integers(0, 256, (6, 9), dtype=np.uint8)
    for given in (grey, grey[None], grey[:, :, None], grey / 255):
        seen = media_item("image", given).decoded
        assert isinstance(seen, Picture) and np.array_equal(seen.pixels, np.dstack([grey] * 3))


def test_a_pillow_picture_is_seen_as_its_file_is(made: AvlmProcessor, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (6, 9, 4), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels, "RGBA").save(tmp_path / "a.png", exif=exif)
    from avlm.data.decoding.decode import decode_image

    expected = decode_image(MediaItem("image", path=tmp_path / "a.png")).pixels
    found = media_item("image", Image.open(tmp_path / "a.png")).decoded.pixels
    assert expected.shape == (9, 6, 3)
    np.testing.assert_array_equal(found, expected)
    (tmp_path / "cut.png").write_bytes((tmp_path / "a.png").read_bytes()[:-60])
    with pytest.raises(MediaError, match="a Pillow picture does not load"):
        media_item("image", Image.open(tmp_path / "cut.png"))


@pytest.mark.parametrize(
    ("wave", "expected"),
    [
        (np.array([-32768, 0, 16384], np.int16), [-1.0, 0.0, 0.5]),
        (np.array([-(2**31), 2**30], np.int32), [-1.0, 0.5]),
        (np.array([0, 128, 192], np.uint8), [-1.0, 0.0, 0.5]),
        (np.array([0.25, -1.0]), [0.25, -1.0]),
        ([0.25, -1.0], [0.25, -1.0]),
        (np.array([[0.25, -1.0]]), [0.25, -1.0]),
        ([[0.25] * 40, [-0.75] * 40], [-0.25] * 40),
        ({"array": np.array([0.25, -1.0])}, [0.25, -1.0]),
        (torch.tensor([0.25, -1.0]), [0.25, -1.0]),
    ],
)
def test_a_waveform_has_the_scale_of_a_file(wave: Any, expected: list[float]) -> None:
    """int16, as scipy and wave read files, is not 32768 times as loud."""
    sound = media_item("audio", wave, 8000).decoded
    assert isinstance(sound, Sound)
    assert sound.waveform.tolist() == expected
    assert sound.waveform.dtype == np.float32
    assert sound.sample_rate_hz == 8000


@pytest.mark.parametrize(
    ("kind", "value", "message"),
    [
        ("image", 3, "an image was given as int, which is not understood. Give a path, bytes, or an array of uint8 or of 0 to 1, [height, width, 3]"),
        ("image", np.zeros((5, 4, 6), np.uint8), "an image was given as ndarray of (5, 4, 6) uint8, which is not understood. Give a path, bytes, or an array of uint8 or of 0 to 1, [height, width, 3]"),
        ("image", np.full((4, 4, 3), 2, np.float32), "an image was given as ndarray of (4, 4, 3) float32, which is not understood. Give a path, bytes, or an array of uint8 or of 0 to 1, [height, width, 3]"),
        ("image", np.zeros((0, 4, 3), np.uint8), "an image was given as ndarray of (0, 4, 3) uint8, which is not understood. Give a path, bytes, or an array of uint8 or of 0 to 1, [height, width, 3]"),
        ("audio", np.zeros((99, 2), np.float32), "an audio was given as ndarray of (99, 2) float32, which is not understood. Give a path, bytes, or an array of samples"),
        ("audio", np.array(["a"]), "an audio was given as ndarray of (1,) <U1, which is not understood. Give a path, bytes, or an array of samples"),
        ("video", np.zeros(9), "a video was given as ndarray of (9,) float64, which is not understood. Give a path, bytes"),
    ],
)  # fmt: skip
def test_what_is_no_medium_is_refused(kind: str, value: Any, message: str) -> None:
    with pytest.raises(DataError) as error:
        media_item(kind, value)
    assert str(error.value) == message


def test_a_url_is_read_where_it_holds_the_medium_and_refused_where_it_would_be_fetched(
    made: AvlmProcessor, picture: Callable[..., Path]
) -> None:
    path = picture()
    url = f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"
    same(made("a", images=path), made("a", images=url))
    asked = [{"role": "user", "content": [{"type": "image", "url": "http://169.254.169.254/x"}]}]
    for ask in (
        lambda: made("a", images="http://169.254.169.254/x"),
        lambda: made.apply_chat_template(asked, tokenize=True),
    ):
        with pytest.raises(MediaError) as error:
            ask()
        assert error.value.reason == (
            "http://169.254.169.254/x: is a URL, and nothing is fetched unless that is allowed. "
            "Download the file and give its path, or allow its host (data.fetch.hosts)"
        )


def test_bytes_and_files_are_the_same(
    made: AvlmProcessor, picture: Callable[..., Path], sound: Callable[..., Path]
) -> None:
    paths = {"images": picture(), "audio": sound()}
    same(made("a", **paths), made("a", **{kind: path.read_bytes() for kind, path in paths.items()}))


def test_a_model_that_sees_takes_a_batch_without_pictures() -> None:
    made = AvlmProcessor(
        tokenizer(CHATML),
        media=MediaSpec(vision=VisionSpec(image_size_px=28, cell_px=14)).model_dump(mode="json"),
        chat_template=CHATML.template,
    )
    assert sorted(made("What?")) == ["attention_mask", "input_ids"]


# ---------------------------------------------------------------- a tokenizer from nothing


def test_a_tokenizer_from_nothing_writes_any_text_and_keeps_its_special_tokens() -> None:
    made = make_tokenizer(["a red circle"] * 9, 300)
    assert len(made) <= 300
    for text in ("a red circle", "", "漢字 🎉\n\t", "\x00\x7f", " two  spaces "):
        assert made.decode(made(text, add_special_tokens=False).input_ids) == text
    special = [PAD, END, "<|system|>", "<|user|>", "<|assistant|>", "<image>", "<audio>", "<video>"]
    assert made("".join(special), add_special_tokens=False).input_ids == list(range(8))
    assert (made.pad_token, made.eos_token) == (PAD, END)
    assert made.decode(made("a<|end|>b", add_special_tokens=False).input_ids, skip_special_tokens=True) == "ab"
    assert make_tokenizer(["a red circle"] * 9, 300).get_vocab() == made.get_vocab()
