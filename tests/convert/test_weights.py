"""Model directories: whole or absent, and nothing else is taken for one."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from avlm.convert import weights
from avlm.convert.weights import aside, load_model, publish_copy, save_model, save_part
from avlm.errors import ConfigError, WeightsError
from avlm.samples import Sample


@pytest.fixture
def saved(make_model: Callable[..., Any], tmp_path: Path) -> Path:
    save_model(*make_model(), tmp_path / "model")
    return tmp_path / "model"


def refused(kind: type[Exception], folder: Path) -> str:
    with pytest.raises(kind) as error:
        load_model(folder)
    return str(error.value)


# ---------------------------------------------------------------- there and back


@torch.no_grad()
def test_a_model_comes_back_with_the_same_logits_and_the_same_tokens(
    make_model: Callable[..., Any], make_sample: Callable[..., Sample], tmp_path: Path
) -> None:
    model, processor = make_model()
    save_model(model, processor, tmp_path / "model")
    again, reader = load_model(tmp_path / "model")
    sample = make_sample("image", "audio", "video")
    ours, theirs = processor.collate([processor.encode(sample)]), reader.collate([reader.encode(sample)])
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)
    torch.testing.assert_close(again(**theirs).logits, model(**ours).logits, rtol=0, atol=1e-6)
    assert not again.training and again.language_model.config._attn_implementation == "avlm"


def test_a_directory_holds_what_transformers_expects_and_no_pickle(saved: Path) -> None:
    names = {path.name for path in saved.iterdir()}
    assert names >= {
        "config.json",
        "model.safetensors",
        "processor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "generation_config.json",
    }
    assert not [n for n in names if n.endswith((".bin", ".pt", ".pth", ".pkl"))]


def test_a_part_is_saved_as_if_it_had_been_downloaded(make_model: Callable[..., Any], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, processor = make_model()
    save_part(model.language_model, tmp_path / "language", processor.tokenizer)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "language")
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.language_model.parameters(), strict=True))
    assert AutoTokenizer.from_pretrained(tmp_path / "language")("red").input_ids == processor.tokenizer("red").input_ids


# ---------------------------------------------------------------- whole or absent


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_an_error_while_writing_leaves_the_old_model_alone(
    saved: Path, make_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = content(saved)
    model, processor = make_model(seed=5)
    monkeypatch.setattr(type(processor), "save_pretrained", lambda *a, **k: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        save_model(model, processor, saved)
    assert content(saved) == before
    assert [p.name for p in saved.parent.iterdir() if "model" in p.name] == ["model"]


def test_an_error_while_writing_a_new_model_leaves_nothing(tmp_path: Path) -> None:
    def interrupted() -> None:
        with aside(tmp_path / "new") as folder:
            (folder / "half").write_text("x")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_seen_under_the_name_before_all_is_written(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "model"
    with aside(out) as folder:
        (folder / "a").write_text("1")
        assert not out.exists()
    assert (out / "a").read_text() == "1"
    with aside(out) as folder:
        (folder / "b").write_text("2")
        assert content(out) == {"a": b"1"}
    assert content(out) == {"b": b"2"}
    assert [p.name for p in out.parent.iterdir()] == ["model"]


def test_a_rename_that_fails_puts_the_old_model_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "model"
    with aside(out) as folder:
        (folder / "a").write_text("1")
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self.name.endswith(".writing"):
            raise OSError("no")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="no"), aside(out) as folder:
        (folder / "a").write_text("2")
    assert content(out) == {"a": b"1"}


def test_a_program_killed_between_the_renames_loses_nothing(tmp_path: Path) -> None:
    out = tmp_path / "model"
    with aside(out) as folder:
        (folder / "a").write_text("1")
    out.rename(tmp_path / ".model.old")  # where such a death leaves it
    with pytest.raises(ValueError, match="again"), aside(out) as folder:
        raise ValueError("again")
    assert content(out) == {"a": b"1"}


def test_a_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    for value in ("1", "2"):
        with aside(tmp_path / "link") as folder:
            (folder / "a").write_text(value)
    assert (tmp_path / "link").is_symlink() and content(tmp_path / "real") == {"a": b"2"}


def test_a_published_copy_holds_the_model_and_what_is_laid_beside_it(saved: Path, tmp_path: Path) -> None:
    publish_copy(saved, tmp_path / "copy", extra={"stage.json": '{"stage": "joint"}'})
    publish_copy(tmp_path / "copy", tmp_path / "second", extra={"stage.json": '{"stage": "last"}'})
    assert json.loads((tmp_path / "copy" / "stage.json").read_text()) == {"stage": "joint"}
    assert json.loads((tmp_path / "second" / "stage.json").read_text()) == {"stage": "last"}
    for folder in (tmp_path / "copy", tmp_path / "second"):
        assert {k: v for k, v in content(folder).items() if k != "stage.json"} == content(saved)
        load_model(folder)


# ---------------------------------------------------------------- refusals


def test_a_directory_that_is_none_is_refused(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        assert refused(ConfigError, folder) == (
            f"{folder}: is not a model directory (it has no config.json). "
            "Give one that avlm compose or avlm train wrote"
        )


def test_another_models_directory_is_refused_before_anything_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    LlamaForCausalLM(
        LlamaConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=50)
    ).save_pretrained(tmp_path)
    monkeypatch.setattr(weights.AvlmForConditionalGeneration, "from_pretrained", lambda *a, **k: pytest.fail("built"))
    message = refused(ConfigError, tmp_path)
    assert message.startswith(f"{tmp_path}: is a model of type llama, not one of avlm.")
    assert message.endswith(f"avlm compose OUT --language {tmp_path}")


@pytest.mark.parametrize("text", ["", "{", "[]", "\x00"])
def test_a_broken_configuration_is_refused(text: str, saved: Path) -> None:
    (saved / "config.json").write_text(text)
    assert refused(WeightsError, saved).startswith(f"{saved}/config.json: is not readable (")


def change_weights(saved: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(saved / "model.safetensors")
    change(tensors)
    save_file(tensors, saved / "model.safetensors", {"format": "pt"})


def test_a_missing_tensor_is_refused(saved: Path) -> None:
    name = "model.vision_connector.layers.0.weight"
    change_weights(saved, lambda tensors: tensors.pop(name))
    assert refused(WeightsError, saved) == (
        f"{saved}: the model lacks 1 tensors, {name} among them. Copy the directory again"
    )


def test_a_tensor_without_a_place_is_refused(saved: Path) -> None:
    change_weights(saved, lambda tensors: tensors.update(stowaway=torch.zeros(2)))
    assert refused(WeightsError, saved) == (
        f"{saved}: the model has no place for 1 tensors, stowaway among them. Copy the directory again"
    )


def test_a_tensor_of_another_size_is_refused(saved: Path) -> None:
    change_weights(saved, lambda tensors: tensors.update({"model.vision_connector.layers.0.bias": torch.zeros(5)}))
    assert "cannot be loaded" in refused(WeightsError, saved)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "processor_config.json"])
@pytest.mark.parametrize("how", ["missing", "half"])
def test_a_half_copied_directory_is_refused(name: str, how: str, saved: Path) -> None:
    path = saved / name
    if how == "half":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    else:
        path.unlink()
    with pytest.raises((WeightsError, ConfigError), match=str(saved)):
        load_model(saved)


def test_a_directory_with_a_shard_missing_is_refused(make_model: Callable[..., Any], tmp_path: Path) -> None:
    model, processor = make_model()
    model.save_pretrained(tmp_path / "model", max_shard_size="100KB")
    processor.save_pretrained(tmp_path / "model")
    load_model(tmp_path / "model")
    shards = sorted((tmp_path / "model").glob("model-*.safetensors"))
    assert len(shards) > 1
    shards[1].unlink()
    assert "cannot be loaded" in refused(WeightsError, tmp_path / "model")


def test_media_settings_that_disagree_are_refused(saved: Path) -> None:
    path = saved / "processor_config.json"
    settings = json.loads(path.read_text())
    settings["media"]["vision"]["image_size_px"] = 42
    path.write_text(json.dumps(settings))
    assert refused(ConfigError, saved).startswith(
        f"{saved}: config.json and processor_config.json disagree about the media settings"
    )


def test_placeholders_that_disagree_are_refused(saved: Path) -> None:
    path = saved / "config.json"
    settings = json.loads(path.read_text())
    settings["image_token_id"] += 3
    path.write_text(json.dumps(settings))
    assert "and the tokenizer's <image> is" in refused(ConfigError, saved)


def test_pickled_weights_are_not_read(saved: Path) -> None:
    tensors = load_file(saved / "model.safetensors")
    (saved / "model.safetensors").unlink()
    torch.save(tensors, saved / "pytorch_model.bin")
    assert "cannot be loaded" in refused(WeightsError, saved)
