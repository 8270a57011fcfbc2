"""``avlm live`` and ``avlm data voice`` on the command line."""

from __future__ import annotations

import importlib.util
import io
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch

from avlm import cli
from avlm.convert.weights import save_model


@pytest.fixture
def avlm(capsys, monkeypatch):
    def run(*arguments, stdin: bytes | None = None):
        monkeypatch.setattr(sys, "argv", ["avlm", *map(str, arguments)])
        if stdin is not None:
            monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(stdin)))
        status = 0
        try:
            cli.main()
        except SystemExit as stopped:
            status = stopped.code if isinstance(stopped.code, int) else 0
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def directory(make_model, tmp_path):
    model, processor = make_model()
    model.add_state_head(3)
    with torch.no_grad():
        model.state_head.weight.zero_()
        model.state_head.bias.copy_(torch.tensor([2.0, 0.0, 0.0]))  # everything is a question, at 1 / (1 + e^-2)
    save_model(model, processor, tmp_path / "model")
    return tmp_path / "model"


def vowel() -> np.ndarray:
    time_s = np.arange(12_800) / 16_000
    tones = [np.sin(2 * np.pi * k * 140 * time_s) / k for k in range(1, 15)]
    wave = 0.15 * np.asarray(sum(tones)) * (0.7 + 0.3 * np.sin(2 * np.pi * 4 * time_s))
    return np.concatenate([np.zeros(16_000), wave, np.zeros(16_000)]).astype(np.float32)


def test_a_recording_is_listened_to_and_its_events_are_written(avlm, directory, tmp_path):
    soundfile.write(tmp_path / "a.wav", vowel(), 16_000)
    status, out, _ = avlm(
        "live", directory, "--file", tmp_path / "a.wav", "--out", tmp_path / "e.jsonl", "--max-tokens", 3
    )
    assert status == 0
    events = [json.loads(line) for line in (tmp_path / "e.jsonl").read_text().splitlines()]
    names = [event["event"] for event in events]
    assert names[:4] == ["heard", "state", "gated", "answer_begins"] and names[-1] == "answer_ends"
    assert events[1]["probability"] == pytest.approx(1 / (1 + np.exp(-2)), abs=1e-4)
    assert len(out.splitlines()) == len(events)


def test_pcm_on_standard_input(avlm, directory, tmp_path):
    data = (vowel() * 32767).astype("<i2").tobytes()
    status, out, _ = avlm("live", directory, "--file", "-", "--max-tokens", 3, stdin=data + b"\0")
    assert status == 0
    assert "answer_ends" in out


def test_a_timeline_shows_and_types(avlm, directory, tmp_path, picture):
    lines = [{"at_s": 0, "image": picture("p.png").name}, {"at_s": 0.5, "text": "What is it?"}]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    status, out, _ = avlm("live", directory, "--file", tmp_path / "t.jsonl", "--max-tokens", 3)
    assert status == 0
    assert 'state="typed"' in out and "answer_ends" in out


@pytest.mark.skipif(importlib.util.find_spec("sounddevice") is not None, reason="there is a way to a microphone")
def test_without_a_way_to_the_microphone_it_says_what_to_do(avlm, directory):
    status, _, err = avlm("live", directory)
    assert status == 2
    assert err.strip() == (
        "ConfigError: no --file is given, and a microphone is listened to with the library sounddevice, which is not "
        "installed. Install it with: pip install sounddevice; or give --file RECORDING, or --file - for PCM"
    )


def test_a_file_that_is_not_there(avlm, directory, tmp_path):
    status, _, err = avlm("live", directory, "--file", tmp_path / "no.wav")
    assert status == 2
    assert err.strip() == f"ConfigError: --file={tmp_path / 'no.wav'}: there is no such file. Check the path"


def test_a_model_that_cannot_tell_who_is_meant_is_refused(avlm, make_model, tmp_path):
    save_model(*make_model(), tmp_path / "plain")
    soundfile.write(tmp_path / "a.wav", vowel(), 16_000)
    status, _, err = avlm("live", tmp_path / "plain", "--file", tmp_path / "a.wav")
    assert status == 2
    assert "the model has no state head" in err and "avlm train voice" in err


@pytest.mark.slow
def test_voice_data_on_the_command_line(avlm, tmp_path):
    pytest.importorskip("espeakng_loader")
    (tmp_path / "q.txt").write_text("where is the station\n")
    sizes = ("--rows", 20, "--eval-rows", 20, "--timelines", 1)
    status, out, _ = avlm("data", "voice", tmp_path / "out", "--questions", tmp_path / "q.txt", *sizes)
    assert status == 0, out
    assert len((tmp_path / "out" / "train.jsonl").read_text().splitlines()) == 20
    status, _, err = avlm("data", "voice", tmp_path / "out")
    assert status == 2
    assert "holds something already" in err
