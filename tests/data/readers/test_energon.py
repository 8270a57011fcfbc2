"""Energon's datasets: our rows are the samples that Energon's own loader yields, text for text and byte for byte."""

from __future__ import annotations

import contextlib
import io
import json
import pickle
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from PIL import Image

from avlm.config.data import DataConfig
from avlm.data.decoding.files import LIMITS, read
from avlm.data.forms.folders import Folders
from avlm.data.forms.parse import parse_row, recognise
from avlm.data.readers.joined import JoinedSource
from avlm.data.readers.types import TYPES
from avlm.data.sources import open_source
from avlm.errors import ConfigError, DataError
from avlm.samples import MediaItem, Sample, Text

energon = pytest.importorskip(
    "megatron.energon", reason="megatron-energon is not installed: pip install 'avlm[energon]'"
)


def png(seed: int) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def tars(folder: Path, samples: Iterable[dict[str, bytes]], *, per_tar: int = 3, prefix: str = "s") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    tar = None
    for number, files in enumerate(samples):
        if number % per_tar == 0:
            if tar is not None:
                tar.close()
            tar = tarfile.open(folder / f"{prefix}-{number // per_tar:03d}.tar", "w")  # noqa: SIM115
        for ending, data in files.items():
            member = tarfile.TarInfo(f"{prefix}{number:04d}.{ending}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    tar.close()
    return folder


def prepare(folder: Path, kind: str, *more: str, splits: str = "train:.*") -> Path:
    from megatron.energon.cli.main import main

    quiet = ["--non-interactive", "--force-overwrite", "--no-progress", "--num-workers", "1"]
    parts = [word for split in splits.split(" ") for word in ("--split-parts", split)]
    main(["prepare", *quiet, *parts, "--sample-type", kind, *more, str(folder)], standalone_mode=False)
    return folder


class Raw:
    """Decodes texts as Energon does, and leaves media the bytes that they are."""

    def __call__(self, sample: dict[str, Any]) -> dict[str, Any]:
        def decoded(name: str, value: Any) -> Any:
            if name.endswith("json"):
                return json.loads(value)
            return value.decode() if name.endswith(("txt", "cls")) else value

        return {name: decoded(name, value) if isinstance(value, bytes) else value for name, value in sample.items()}

    def config(self) -> dict[str, Any]:
        return {}


@energon.edataclass
class Plain(energon.Sample):
    """What leaves the encoder: the sample as it came."""

    given: Any


class Keep(energon.TaskEncoder):
    decoder = Raw()

    @energon.stateless
    def encode_sample(self, sample: Any) -> Plain:
        base = (
            sample
            if isinstance(sample, energon.Sample)
            else energon.TextSample(**energon.basic_sample_keys(sample), text="")
        )
        return Plain.derive_from(base, given=sample)


class Crude(Keep):
    """As `Keep`, for samples that are cooked: they come as dictionaries."""

    cookers = [
        energon.Cooker(
            energon.stateless(energon.cooker(lambda sample: Plain(**energon.basic_sample_keys(sample), given=sample)))
        )
    ]

    @energon.stateless
    def encode_sample(self, sample: Any) -> Plain:
        return sample


def theirs(path: Path, split: str = "train", encoder: type = Keep) -> list[Any]:
    """Every sample of a split once, as Energon's own loader yields it, in its order."""
    here = energon.WorkerConfig(rank=0, world_size=1, num_workers=0, global_error_handler=energon.reraise_exception)
    found = energon.get_val_dataset(path, split_part=split, worker_config=here, batch_size=None, task_encoder=encoder())
    return [(row.__key__, row.given) for row in energon.get_loader(found)]


def told(sample: Sample) -> list[Any]:
    return [
        (turn.role, [part.text if isinstance(part, Text) else read(part, LIMITS) for part in turn.parts])
        for turn in sample.turns
    ]


def test_captions(tmp_path: Path) -> None:
    made = tars(tmp_path / "captions", ({"png": png(i), "txt": f"a square, number {i}".encode()} for i in range(7)))
    prepare(made, "CaptioningSample", "--field-map", '{"image": "png", "caption": "txt"}')
    source = open_source(made)
    expected = [(key, [("user", [given.image]), ("assistant", [given.caption])]) for key, given in theirs(made)]
    assert len(expected) == 7 and [(sample.id, told(sample)) for sample in source] == expected
    assert source.kind == "Energon's CaptioningSample, split train" and source.name == "captions"
    assert told(pickle.loads(pickle.dumps(source))[6]) == expected[6][1]


def test_questions_about_pictures(tmp_path: Path) -> None:
    rows = [
        {"q": f"<image>\nq{i}" if i % 2 else f"q{i}", "a": [f"wrong{i}", f"right{i}", f"late{i}"], "w": [0.2, 0.8, 0.8]}
        for i in range(6)
    ]
    made = tars(tmp_path / "vqa", ({"jpg": png(i), "json": json.dumps(row).encode()} for i, row in enumerate(rows)))
    prepare(
        made,
        "VQASample",
        "--field-map",
        '{"image": "jpg", "context": "json[q]", "answers": "json[a]", "answer_weights": "json[w]"}',
    )
    for sample, (key, given) in zip(open_source(made), theirs(made), strict=True):
        best = given.answers[int(np.argmax(given.answer_weights))]
        context = given.context.removeprefix("<image>")
        assert (sample.id, told(sample)) == (key, [("user", [given.image, context]), ("assistant", [best])])


def test_conversations_of_lists_of_questions_and_answers(tmp_path: Path) -> None:
    made = tars(
        tmp_path / "chat",
        [{"png": png(1), "json": json.dumps({"q": ["What?", "Sure?"], "a": ["cat", "yes"]}).encode()}],
    )
    prepare(made, "VQASample", "--field-map", '{"image": "png", "context": "json[q]", "answers": "json[a]"}')
    ((_, given),) = theirs(made)
    asked, answers = given.context, given.answers
    expected = [
        ("user", [given.image, asked[0]]),
        ("assistant", [answers[0]]),
        ("user", [asked[1]]),
        ("assistant", [answers[1]]),
    ]
    assert told(open_source(made)[0]) == expected


LOADER = '''
def part_filter(part):
    return True

def interleaved(sample):
    return {"sequence": [sample[part] if part.endswith("png") else part for part in sample["json"]["sequence"]]}

def similar(sample):
    told = sample["json"]
    return {"images": [sample["0.png"], sample["1.png"]], "texts": told["texts"], "matched_text_indices": told["at"]}
'''  # fmt: skip


def loaded(path: Path, kind: str, function: str) -> Path:
    """A dataset whose samples its own Python loads, as Energon's documentation describes it."""
    prepare(path, "CrudeWebdataset")
    (path / ".nv-meta" / "sample_loader.py").write_text(LOADER)
    config = {
        "sample_type": {"__module__": "megatron.energon", "__class__": kind},
        "part_filter": "sample_loader.py:part_filter",
        "sample_loader": f"sample_loader.py:{function}",
    }
    (path / ".nv-meta" / "dataset.yaml").write_text(yaml.safe_dump(config))
    return path


def test_interleaved(tmp_path: Path) -> None:
    sequences = [
        ["first", "0.png", "about it", "and more", "1.png", "about that"],
        ["1.png", "0.png", "both"],
        ["words"],
    ]
    made = tars(
        tmp_path / "mix",
        (
            {"0.png": png(i), "1.png": png(i + 10), "json": json.dumps({"sequence": s}).encode()}
            for i, s in enumerate(sequences)
        ),
    )
    loaded(made, "InterleavedSample", "interleaved")
    with pytest.raises(
        ConfigError, match=r"needs sample_loader.py:interleaved, Python that lies in the dataset, .* data.run_code=true"
    ):
        open_source(made)
    samples = list(open_source(made, DataConfig(run_code=True)))
    for sample, (key, given) in zip(samples, theirs(made), strict=True):
        parts = [part for turn in told(sample) for part in turn[1] if part != ""]
        sequence = given.sequence
        if "and more" in sequence:
            sequence = [sequence[0], sequence[1], "about it and more", *sequence[4:]]
        assert (sample.id, parts) == (key, list(sequence))
    assert [turn.role for turn in samples[0].turns] == ["user", "assistant"] * 3
    assert all(isinstance(part, Text) == (turn.role == "assistant") for turn in samples[1].turns for part in turn.parts)


def test_similarity_interleaved(tmp_path: Path) -> None:
    rows = [{"texts": ["a", "b", "c"], "at": at} for at in ([2, 0], [1, 1], [0, 2])]
    made = tars(
        tmp_path / "mmc4",
        ({"0.png": png(i), "1.png": png(i + 10), "json": json.dumps(row).encode()} for i, row in enumerate(rows)),
    )
    loaded(made, "SimilarityInterleavedSample", "similar")
    for sample, (key, given) in zip(open_source(made, DataConfig(run_code=True)), theirs(made), strict=True):
        expected: list[Any] = []
        for number, text in enumerate(given.texts):
            before = [image for image, at in zip(given.images, given.matched_text_indices, strict=True) if at == number]
            if expected and isinstance(expected[-1], str) and not before:
                expected[-1] += f" {text}"
            else:
                expected += [*before, text]
        assert sample.id == key and [part for turn in told(sample) for part in turn[1] if part != ""] == expected


def talk(i: int) -> dict[str, bytes]:
    said = [{"from": "human", "value": f"<image>What is {i}?"}, {"from": "gpt", "value": f"number {i}"}]
    return {"json": json.dumps({"conversations": said, "images": ["png"]}).encode(), "png": png(i)}


def test_crude_samples_are_read_by_what_their_json_says(tmp_path: Path) -> None:
    made = prepare(tars(tmp_path / "crude", map(talk, range(5)), per_tar=2), "CrudeWebdataset")
    for sample, (key, given) in zip(open_source(made), theirs(made, encoder=Crude), strict=True):
        said = given["json"]["conversations"]
        question = said[0]["value"].removeprefix("<image>")
        assert (sample.id, told(sample)) == (
            key,
            [("user", [given["png"], question]), ("assistant", [said[1]["value"]])],
        )


def test_splits_and_what_they_leave_out(tmp_path: Path) -> None:
    made = tars(tmp_path / "crude", map(talk, range(9)))
    prepare(made, "CrudeWebdataset", splits="train:s-00[01].* val:s-002.*")
    file = made / ".nv-meta" / "split.yaml"
    file.write_text(
        yaml.safe_dump({**yaml.safe_load(file.read_text()), "exclude": ["s-000.tar/s0001", "s-00{1..1}.tar/s0004"]})
    )
    for split, source in (
        ("train", open_source(made)),
        ("val", open_source(made, use="eval")),
        ("val", open_source(f"{made}:val")),
    ):
        keys = [sample.id for sample in source]
        assert keys == [f"s{i:04d}" for i in ((0, 2, 3, 5) if split == "train" else (6, 7, 8))]
        assert keys == [key for key, _ in theirs(made, split, Crude)]
    with pytest.raises(ConfigError, match=r"crude: has no split dev \(it has train, val\)"):
        open_source(f"{made}:dev")


def blend(path: Path, splits: dict[str, Any]) -> Path:
    path.write_text(
        yaml.safe_dump(
            {"__module__": "megatron.energon", "__class__": "MetadatasetV2", "splits": splits}, sort_keys=False
        )
    )
    return path


@pytest.fixture
def two(tmp_path: Path) -> Path:
    """Two datasets, `a` of 8 and `b` of 6 samples, each with a held-out tar."""
    for name, count in (("a", 8), ("b", 6)):
        made = tars(tmp_path / name, map(talk, range(count)), prefix=name, per_tar=2)
        prepare(made, "CrudeWebdataset", splits=f"train:{name}-00[^0].* val:{name}-000.*")
    return tmp_path


def weights_of(path: Path, split: str = "train") -> list[float]:
    """How Energon itself weighs the datasets of a blend, or how often it repeats them."""
    from megatron.energon.dataset_config import load_config
    from megatron.energon.epathlib import EPath
    from megatron.energon.metadataset.metadataset import Metadataset

    loader = load_config(EPath(path), default_type=Metadataset, default_kwargs={"path": EPath(path)})
    loader.post_initialize()
    here = energon.WorkerConfig(rank=0, world_size=1, num_workers=0)
    found = loader.get_datasets(training=False, split_part=split, worker_config=here)
    return [one.weight if one.weight is not None else one.repetitions * len(one.dataset) for one in found.datasets]


def test_a_blend_is_its_datasets_with_their_weights(two: Path) -> None:
    inner = blend(
        two / "inner.yaml", {"train": {"blend": [{"path": "./b", "weight": 1}, {"path": "./a", "weight": 4}]}}
    )
    outer = blend(
        two / "outer.yaml",
        {
            "train": {"blend": [{"path": "./a", "weight": 3}, {"path": f"./{inner.name}", "weight": 2}]},
            "val": {"path": "./a"},
        },
    )
    source = open_source(outer)
    assert isinstance(source, JoinedSource) and [part.name for part in source.members] == ["a", "b", "a"]
    assert source.weights == pytest.approx(weights_of(outer)) and source.weights == pytest.approx([0.6, 0.08, 0.32])
    assert [len(part) for part in source.members] == [6, 4, 6] and source.kind == "an Energon blend of 3, split train"
    assert [sample.id for sample in open_source(outer, use="eval")] == [key for key, _ in theirs(outer, "val", Crude)]
    every = {sample.id for sample in source}
    assert every == {f"a{i:04d}" for i in range(2, 8)} | {f"b{i:04d}" for i in range(2, 6)}
    assert source[6].id == "b0002" and source.where(6) == "b-001.tar b0002" and source.part(9) == (1, 3)


def test_a_blend_by_epochs_weighs_by_samples(two: Path) -> None:
    listed = [{"path": "./a", "repetitions": 2}, {"path": "./b", "repetitions": 0.5}]
    path = blend(two / "epochs.yaml", {"train": {"blend_epochized": listed}})
    source = open_source(path)
    assert isinstance(source, JoinedSource) and source.weights == weights_of(path) == [12, 2]


@pytest.mark.parametrize("bounds", [["25%", "75%"], [1, 4], [2, "end"], ["0%", "100%"]])
def test_a_subset_is_the_one_that_energon_takes(two: Path, bounds: list[Any]) -> None:
    path = blend(two / "some.yaml", {"train": {"path": "./a", "subset": {"range": bounds}}})
    assert [sample.id for sample in open_source(path)] == [key for key, _ in theirs(path, "train", Crude)]


def test_other_wrong_things_are_one_message_each(two: Path) -> None:
    def refusal(splits: Any) -> str:
        with pytest.raises(ConfigError) as error:
            open_source(blend(two / "wrong.yaml", splits))
        return str(error.value).replace(str(two), "TMP")

    assert (
        refusal({"val": {"path": "./a"}})
        == "TMP/wrong.yaml: has no split train (it has val). Write TMP/wrong.yaml:SPLIT with one of those"
    )
    assert (
        refusal({"train": {"blend": []}})
        == "TMP/wrong.yaml: splits.train lists no datasets. Give each a path and a weight"
    )
    assert (
        refusal({"train": {"blend": [{"path": "./c"}]}})
        == "TMP/c: is no Energon dataset, and a blend names it. Run `energon prepare` on it"
    )
    assert (
        refusal({"train": {"blend": [{"path": "./a", "weight": "x"}]}})
        == 'TMP/wrong.yaml: ./a has weight="x". Give a number'
    )
    assert (
        refusal({"train": {"blend": [{"path": "./a", "weight": 0}, {"path": "./b", "weight": 0.0}]}})
        == "TMP/wrong.yaml: the weights of splits.train add up to 0. Give one a weight above 0"
    )
    assert (
        refusal({"train": {"path": "wrong.yaml"}}) == "TMP/wrong.yaml: is a blend that holds itself. Correct its paths"
    )
    assert "joins datasets, which Python of yours decides how to" in refusal(
        {"train": {"join": [{"path": "./a"}], "joiner": "x"}}
    )
    assert "Write range: [25%, 75%] or [100, end]" in refusal({"train": {"path": "./a", "subset": {"range": ["x", 2]}}})


def test_a_dataset_that_changed_since_it_was_prepared_is_refused(two: Path) -> None:
    tars(two / "b" / "more", map(talk, range(3)), prefix="b")
    (two / "b" / "more" / "b-000.tar").rename(two / "b" / "b-001.tar")
    with pytest.raises(
        ConfigError,
        match=r"b-001.tar: has 3 samples and had 2 when the dataset was prepared, .* Run `energon prepare` again",
    ):
        open_source(two / "b")
    (two / "b" / ".nv-meta" / "split.yaml").unlink()
    with pytest.raises(ConfigError, match=r"split.json: not readable \(No such file or directory\)"):
        open_source(two / "b")


ANY = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 3) | st.floats() | st.text("ab<image>[0]", max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["q", "a", "w", "range", "path"]), inner, max_size=3)
    ),
    max_leaves=6,
)
FIELDS = st.sampled_from(["json", "json[q]", "json[a][0]", "png", "txt,json[w]", "json[", "", "bin"])
NAMES = [
    "image",
    "caption",
    "context",
    "answers",
    "answer_weights",
    "text",
    "label",
    "sequence",
    "images",
    "texts",
    "similarity_matrix",
    "matched_text_indices",
    "video",
]


@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@hypothesis.given(
    row=ANY,
    kind=st.sampled_from([*TYPES, "Crude", "Mine"]),
    fields=st.dictionaries(st.sampled_from(NAMES), FIELDS, max_size=6),
    wrong=st.dictionaries(st.sampled_from([".info.json", "split.yaml", "dataset.yaml"]), ANY, max_size=1),
)
def test_any_sample_and_any_settings_are_rows_or_are_refused(
    tmp_path: Path, row: Any, kind: str, fields: dict[str, str], wrong: dict[str, Any]
) -> None:
    made = tars(tmp_path / "any", [{"json": json.dumps(row).encode(), "png": png(0), "txt": b"words", "bin": b"?"}] * 2)
    config = {"sample_type": {"__module__": "megatron.energon", "__class__": f"{kind}Sample"}, "field_map": fields}
    meta = {
        ".info.json": {"shard_counts": {"s-000.tar": 2}},
        "split.yaml": {"split_parts": {"train": ["s-000.tar"]}, "exclude": []},
        "dataset.yaml": {"__class__": "CrudeWebdataset"} if kind == "Crude" else config,
    }
    (made / ".nv-meta").mkdir(exist_ok=True)
    for name, content in {**meta, **wrong}.items():
        (made / ".nv-meta" / name).write_text(yaml.safe_dump(content))
    with contextlib.suppress(ConfigError, DataError):
        for sample in open_source(made):
            assert all(isinstance(part, (Text, MediaItem)) for turn in sample.turns for part in turn.parts)


NUMBERS = st.lists(st.lists(st.floats() | st.text(max_size=1) | st.none(), max_size=3), max_size=3)


@settings(deadline=None, max_examples=600)
@hypothesis.given(
    kind=st.sampled_from(list(TYPES)),
    values=st.dictionaries(
        st.sampled_from(NAMES),
        ANY | NUMBERS | st.lists(st.text(max_size=2) | st.just(MediaItem("image", data=b"x")), max_size=3),
    ),
)
def test_any_values_of_a_type_are_a_row_or_are_refused(kind: str, values: dict[str, Any]) -> None:
    with contextlib.suppress(DataError):
        row = TYPES[kind](values)
        assert parse_row(row, Folders(), "x", recognise(row)).turns


@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@hypothesis.given(
    split=st.dictionaries(
        st.sampled_from(["path", "blend", "blend_epochized", "datasets", "join", "subset", "weight"]),
        ANY
        | st.lists(
            st.dictionaries(
                st.sampled_from(["path", "weight", "repetitions", "subset", "split_part", "aux"]), ANY, max_size=3
            ),
            max_size=2,
        ),
        max_size=4,
    )
)
@hypothesis.example(split={"weight": 0})
def test_any_blend_is_read_or_refused(tmp_path: Path, split: Any) -> None:
    with contextlib.suppress(ConfigError, DataError):
        open_source(blend(tmp_path / "any.yaml", {"train": split}))


def test_a_type_that_nobody_knows_is_refused(two: Path) -> None:
    file = two / "a" / ".nv-meta" / "dataset.yaml"
    file.write_text(
        yaml.safe_dump({"sample_type": {"__module__": "mine", "__class__": "MineSample"}, "field_map": {"a": "json"}})
    )
    with pytest.raises(
        ConfigError, match=r"its samples are of type MineSample, and it is not known what they ask and answer"
    ):
        open_source(two / "a")
    data = DataConfig(
        columns={"image": "png", "question": "json[conversations][0][value]", "answer": "json[conversations][1][value]"}
    )
    assert told(open_source(two / "a", data)[0])[1] == ("assistant", ["number 2"])
