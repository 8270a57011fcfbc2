"""A run's page: ``report.html``, one file that needs nothing but a browser.

It is made from the files of the run directory alone, at any moment: what is missing, empty or cut off is said on the
page, in its place. All text on it comes from data and is escaped, and the page forbids itself scripts and the network.
"""

from __future__ import annotations

import json
import math
import re
import statistics
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any

from avlm.config.io import read_mapping
from avlm.config.stage import PARTS
from avlm.data.showing.page import document, duration, esc, note, number, percent, table
from avlm.errors import ConfigError
from avlm.training.charts import STYLE, Band, Shelf, bar, line_chart
from avlm.training.counted import Chart, count_charts, drawn, median, part_charts, trouble_table
from avlm.training.measured import MEASUREMENT, held_out_section

MAX_PROMPTS, MAX_QUARANTINE = 40, 50
"""Entries shown; the rest is counted."""

NUMBER = (int, float)
METRIC: dict[str, Any] = dict.fromkeys(("lr", "seconds", "data_seconds", "tokens_per_s"), NUMBER)
METRIC |= dict.fromkeys(("loss", "grad_norm"), (*NUMBER, NoneType))
METRIC |= {"step": int, "stage": str, "stage_step": int, "tokens": int, "samples": int}
ANSWER = {"step": int, "stage": str, "when": str, "id": str, "answer": str}
TROUBLE = {"step": int, "stage": str, "kind": str}
BAD = {"step": int, "stage": str, "reason": str}

Row = dict[str, Any]


@dataclass(slots=True)
class RunFiles:
    """What a run directory holds at this moment, and by file name what is not there."""

    config: Row = field(default_factory=dict)
    report: Row = field(default_factory=dict)
    metrics: list[Row] = field(default_factory=list)
    answers: list[Row] = field(default_factory=list)
    quarantine: list[Row] = field(default_factory=list)
    evals: list[Row] = field(default_factory=list)
    trouble: list[Row] = field(default_factory=list)
    notes: dict[str, str] = field(default_factory=dict)

    def total(self, key: str, how: Callable[[list[Any]], Any] = sum) -> Any:
        """One column of the metrics, all steps together; 0 before the first."""
        return how([row[key] for row in self.metrics]) if self.metrics else 0

    def note(self, name: str) -> str:
        """The line that says what is wrong with a file, or nothing."""
        return note(self.notes[name]) if name in self.notes else ""


@dataclass(slots=True)
class StageFacts:
    """One stage: what was planned, and the lines it has written so far."""

    number: int
    name: str
    settings: Row
    steps: int | None
    """Planned; None where the settings do not tell."""
    rows: list[Row]

    @property
    def builds(self) -> str | None:
        """The part that the stage builds in a small model of its own."""
        return self.settings.get("builds")


def write_report(out: Path) -> Path:
    """Write the page of a run, whether it is done, under way or was killed.

    Args:
        out: The run's directory. Relative media paths in ``samples.jsonl`` are relative to the current one.

    Returns:
        The page, ``out/report.html``.

    Raises:
        ConfigError: There is no such directory.
    """
    out = Path(out)
    if not out.is_dir():
        raise ConfigError(f"{out}: there is no such directory, so there is no run to report on. Check the path")
    path = out / "report.html"
    aside = out / ".report.html.writing"
    aside.write_bytes(_page(_read(out)).encode("utf-8", "replace"))
    aside.replace(path)
    return path


# ---------------------------------------------------------------- the files


def _read(out: Path) -> RunFiles:
    run = RunFiles()
    for name, kinds, into in (
        ("metrics.jsonl", METRIC, run.metrics),
        ("samples.jsonl", ANSWER, run.answers),
        ("quarantine.jsonl", BAD, run.quarantine),
        ("evals.jsonl", MEASUREMENT, run.evals),
    ):
        if name == "evals.jsonl" and not (out / name).is_file():
            continue  # few runs are measured as they go
        wrong = _read_lines(out / name, kinds, into)
        if wrong:
            run.notes[name] = wrong
    for row in run.metrics:  # what is no number has no word in JSON
        row |= {name: math.nan for name in ("loss", "grad_norm") if row[name] is None}
    _read_lines(out / "watch.jsonl", TROUBLE, run.trouble)  # a run without trouble has none
    for name in ("config.yaml", "report.json"):
        if not (out / name).is_file():
            run.notes[name] = f"{name} is missing."
            continue
        try:
            found = read_mapping(out / name)
        except ConfigError:
            run.notes[name] = f"{name} is empty or cut off, and is left out."
            continue
        if name == "config.yaml":
            run.config = found
        else:
            run.report = found
    return run


def _read_lines(path: Path, kinds: dict[str, Any], into: list[Row]) -> str | None:
    """Append the whole lines of a file that grows; return what is wrong with it, if anything."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return f"{path.name} is missing."
    unreadable = 0
    for line in filter(str.strip, text.split("\n")):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict) and all(isinstance(row.get(key), kind) for key, kind in kinds.items()):
            into.append(row)
        else:
            unreadable += 1
    if not unreadable:
        return None if into else f"{path.name} is empty."
    what = "1 line is" if unreadable == 1 else f"{unreadable} lines are"
    return f"{path.name}: {what} cut off or unreadable, and left out."


def _stages(run: RunFiles) -> list[StageFacts]:
    """The stages in the order of the settings, then any that only the metrics know."""
    most = run.config.get("max_steps")
    found: dict[str, StageFacts] = {}
    listed = run.config.get("stages")
    for settings in listed if isinstance(listed, list) else []:
        name, steps = _map(settings).get("name"), _map(settings).get("steps")
        if isinstance(name, str):
            planned = min(steps, most) if isinstance(steps, int) and isinstance(most, int) else steps
            found[name] = StageFacts(len(found) + 1, name, settings, planned if isinstance(planned, int) else None, [])
    for row in run.metrics:
        name = row["stage"]
        if name not in found:
            found[name] = StageFacts(len(found) + 1, name, {}, None, [])
        found[name].rows.append(row)
    return list(found.values())


def _map(value: object) -> Row:
    return value if isinstance(value, dict) else {}


# ---------------------------------------------------------------- the page


def _page(run: RunFiles) -> str:
    stages = _stages(run)
    title = str(run.config.get("recipe") or run.report.get("recipe") or "a run")
    sections = {
        "Results": _results(run),
        "Training curves": _curves(run, stages),
        **({"Held-out rows": _held_out(run, stages)} if run.evals else {}),
        **({"Watch": trouble_table(run.trouble)} if run.trouble else {}),
        "Stages": _stage_table(run, stages),
        "Answers": _answers(run, stages),
        "Quarantine": _quarantine(run),
    }
    links = " ".join(f'<a href="#{name.split()[0].lower()}">{name}</a>' for name in sections)
    body = "".join(
        f'<section><h2 id="{name.split()[0].lower()}">{name}</h2>{content}</section>'
        for name, content in sections.items()
    )
    whole = f"<header>{_header(run, stages, title)}<nav>{links}</nav></header><main>{body}</main>"
    return document(f"{title} - avlm run", whole, style=STYLE)


def _header(run: RunFiles, stages: Sequence[StageFacts], title: str) -> str:
    done, planned = run.total("step", max), sum(stage.steps or 0 for stage in stages)
    seconds, told = number(run.report.get("seconds")), "Time, all in all"
    if seconds is None or seconds < run.total("seconds"):  # a run that went on counts only from then
        seconds, told = run.total("seconds"), "Time in steps, parts built side by side added up"
    facts = {
        "Seed": esc(run.config.get("seed", run.report.get("seed", "not known"))),
        told: duration(seconds),
        "Parameters": _parameters(run.report.get("parameters")),
        "Steps": f"{done:,} of {planned:,}" if planned else f"{done:,}",
        "Tokens": f"{run.total('tokens'):,}",
        "Samples": f"{run.total('samples'):,}",
    }
    going = ""
    if done < planned - _spared(run, stages):
        now = f"at step {done:,}, in stage {run.metrics[-1]['stage']}" if done else "before its first step"
        going = note(f"Not finished: this page was made {now}. The run is still going on, or was stopped.")
    listed = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in facts.items())
    head = f'<p class="quiet">avlm run</p><h1>{esc(title)}</h1>'
    return f'{head}{going}{run.note("config.yaml")}<dl class="facts">{listed}</dl>'


def _spared(run: RunFiles, stages: Sequence[StageFacts]) -> int:
    """Steps that the last stage did not need: it ended early."""
    last = stages[-1] if stages else None
    ends = [row["stage_step"] for row in run.evals if last and row["stage"] == last.name and row.get("stops")]
    return (last.steps or 0) - ends[-1] if last and ends else 0


def _parameters(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{esc(name)} {_parameters(count)}" for name, count in value.items())
    return f"{value:,}" if isinstance(value, int) else "not known yet"


# ---------------------------------------------------------------- results


def _results(run: RunFiles) -> str:
    if not run.report:
        missing = run.note("report.json") or note("report.json is empty.")
        return f"{missing}<p>Scores are written when the run is done and was measured on held-out samples.</p>"
    kinds = ("accuracy", "guess", "swapped", "wer", "samples")
    scores, guesses, swaps, errors, asked = (_map(run.report.get(kind)) for kind in kinds)
    tasks = list(dict.fromkeys([*scores, *guesses, *swaps, *errors]))
    if not tasks:
        return note("report.json holds no scores: the run was not measured on held-out samples.")
    head = ["Task", "Accuracy", "Guessing", "Pictures swapped", "Sounds swapped", "Word errors", "Questions"]
    rows = []
    for task in tasks:
        accuracy, guess, swapped = number(scores.get(task)), number(guesses.get(task)), _map(swaps.get(task))
        drawn = "" if accuracy is None else bar(accuracy, guess)
        row = [esc(task), f'<span class="name"><span class="score">{percent(accuracy)}</span>{drawn}</span>']
        row += [percent(x) for x in (guess, *(number(swapped.get(sense)) for sense in ("image", "audio")))]
        rows.append([*row, percent(number(errors.get(task))), esc(asked.get(task, ""))])
    for column, known in ((6, asked), (5, errors)):
        if not known:
            for cells in (head, *rows):
                del cells[column]
    return (
        "<p>Accuracy is the share of held-out questions that were answered exactly. Guessing is the score of giving "
        "each question's most frequent answer without looking or listening; the tick on each bar stands there.</p>"
        f"{table('Scores by task', head, rows, numbers=range(2, 7))}"
        "<p>How to read the swaps: each question was asked again with the pictures, or the sounds, of another sample. "
        "Where the model relies on them, this score falls to about that of guessing, or below; where it stays near the "
        "accuracy, the model answers without them. A dash: the task has no such thing.</p>"
    )


# ---------------------------------------------------------------- curves


def _curves(run: RunFiles, stages: Sequence[StageFacts]) -> str:
    if not run.metrics:
        return run.note("metrics.jsonl")
    bands = _bands(stages)
    steps = [row["step"] for row in run.metrics]
    waited = run.total("data_seconds") / max(1e-9, run.total("seconds"))
    rates, norms, speeds = ([row[key] for row in run.metrics] for key in ("lr", "grad_norm", "tokens_per_s"))
    waits = [row["data_seconds"] / max(1e-9, row["seconds"]) for row in run.metrics]
    small: list[Chart] = [
        ("Learning rate", f"of the fastest part; highest {max(rates):g}", rates, "zero"),
        ("Gradient norm", f"before clipping; median {median(norms):.3g}", norms, "auto"),
        ("Tokens per second", f"median {statistics.median(speeds):,.0f}", speeds, "zero"),
        ("Waiting for data", f"share of each step; {percent(waited)} of all time", waits, "share"),
    ]
    charts = drawn([*small, *count_charts(run.metrics)], steps, bands) + drawn(part_charts(run.metrics), steps, bands)
    losses = [row["loss"] for row in run.metrics]
    broken = sum(not math.isfinite(x) for x in losses)
    gaps = note(f"The loss of {broken} steps is not a finite number; the line has gaps there.") if broken else ""
    label = f"Loss over {len(steps)} steps, from {losses[0]:.4g} to {losses[-1]:.4g}"
    legend = ", ".join(f'<span class="whole">{b.number} {esc(b.name)}</span>' for b in bands)
    return (
        f"{run.note('metrics.jsonl')}{gaps}<figure>"
        f"<figcaption>Loss per target token at each step (thin) and its mean over neighbouring steps (thick). "
        f"Stages: {legend}.</figcaption>"
        f"{line_chart(steps, losses, bands, label=label, axis='auto', size='tall')}</figure>"
        f"{charts}"
    )


def _bands(stages: Sequence[StageFacts]) -> list[Band]:
    """The stages that have begun, on the step axis."""
    return [Band(s.number, s.name, s.rows[0]["step"], s.rows[-1]["step"]) for s in stages if s.rows]


def _held_out(run: RunFiles, stages: Sequence[StageFacts]) -> str:
    return run.note("evals.jsonl") + held_out_section(run.evals, _bands(stages))


# ---------------------------------------------------------------- stages


def _stage_table(run: RunFiles, stages: Sequence[StageFacts]) -> str:
    if not stages:
        return note("Neither config.yaml nor metrics.jsonl tells of a stage.")
    parts = _model_parts(run, stages)
    head = ["Stage", *(part.replace("_", " ") for part in parts), "Steps", "Time", "Tokens", "First loss", "Last loss"]
    rows = [_stage_row(stage, parts) for stage in stages]
    foot = ["All", *("" for _ in parts), f"{run.total('step', max):,}", duration(run.total("seconds"))]
    foot += [f"{run.total('tokens'):,}", "", ""]
    unknown = "" if run.config else run.note("config.yaml") + "<p>So what was trained in each stage is not known.</p>"
    helper = (
        " A stage that builds a part does so in a small model of its own; what it trains beside that part "
        "(marked <i>helper</i>) is thrown away afterwards, and parts that this model lacks are left blank."
    )
    return (
        f"{unknown}<p>Numbers under a part are its peak learning rate; a dash means that it was frozen."
        f"{helper if any(stage.builds for stage in stages) else ''} Time is that of the steps alone.</p>"
        f"{table('What trained in each stage', head, rows, numbers=range(1, len(head)), foot=foot)}"
    )


def _stage_row(stage: StageFacts, parts: Sequence[str]) -> list[str]:
    made = f'<small class="below">builds {esc(stage.builds)}</small>' if stage.builds else ""
    cells = [f"{stage.number}&nbsp;{esc(stage.name)}{made}", *(_trained(stage, part) for part in parts)]
    done = stage.rows[-1]["stage_step"] if stage.rows else 0
    cells.append(f"{done:,}" if stage.steps in (None, done) else f"{done:,} of {stage.steps:,}")
    if not stage.rows:
        return [*cells, "", "", "", ""]
    cells += [duration(sum(row["seconds"] for row in stage.rows)), f"{sum(row['tokens'] for row in stage.rows):,}"]
    return cells + [f"{stage.rows[i]['loss']:.4g}" for i in (0, -1)]


def _model_parts(run: RunFiles, stages: Sequence[StageFacts]) -> list[str]:
    """The model's parts as far as the settings tell: a composed model's, else the trained ones and their encoders."""
    model = run.config.get("model")
    known = {part for stage in stages for part in _map(stage.settings.get("train"))}
    for sense in ("vision", "audio"):
        if _map(_map(model).get(sense)) or f"{sense}_connector" in known:
            known |= {sense, f"{sense}_connector"}
    if run.config:
        known.add("language")
    return [part for part in PARTS if part in known]


def _trained(stage: StageFacts, part: str) -> str:
    """How one stage treats one part: its rate, a dash for frozen, nothing for a part that is not there."""
    how = _map(stage.settings.get("train")).get(part)
    if not stage.settings:
        return ""
    if not isinstance(how, dict):
        there = stage.builds is None or part in (stage.builds, f"{stage.builds}_connector", "language")
        dash = '<span class="sr">frozen</span><span aria-hidden="true">\u2013</span>'
        return dash if there else '<span class="sr">not there</span>'
    lr = number(how.get("lr"))
    shown = "trained" if lr is None else f"{lr:g}"
    if how.get("lora"):
        shown += f'<small class="below">LoRA rank {esc(_map(how["lora"]).get("rank", ""))}</small>'
    return f'{shown}<small class="below">helper</small>' if stage.builds not in (None, part) else shown


# ---------------------------------------------------------------- answers


@dataclass(slots=True)
class _Prompt:
    """One fixed prompt and every answer to it."""

    facts: Row
    answers: list[Row]

    @property
    def id(self) -> str:
        return str(self.facts["id"])

    @property
    def expected(self) -> str:
        return str(self.facts.get("expected") or "")


def _answers(run: RunFiles, stages: Sequence[StageFacts]) -> str:
    if not run.answers:
        return run.note("samples.jsonl")
    prompts: dict[tuple[str, str], _Prompt] = {}
    for row in run.answers:
        prompts.setdefault((str(row.get("task", "")), row["id"]), _Prompt(row, [])).answers.append(row)
    told = list(dict.fromkeys(row["stage"] for row in run.answers))
    order = [s.name for s in stages if s.name in told]
    order += [name for name in told if name not in order]
    shelf = Shelf()
    shown = list(prompts.values())[:MAX_PROMPTS]
    cards = "".join(_card(prompt, order, shelf) for prompt in shown)
    more = len(prompts) - len(shown)
    held_out = _map(run.config.get("data")).get("eval")
    rest = note(f"{more} more prompts and their answers are in samples.jsonl.") if more else ""
    return (
        f"{run.note('samples.jsonl')}<p>The same {'held-out' if held_out else 'training'} prompts, answered before, "
        f"during and after each stage. "
        f"{_mark(True)} right: the expected words, whatever their case and punctuation. {_mark(False)} wrong: anything "
        f"else.</p>{_summary(list(prompts.values()), order)}{shelf.told()}{cards}{rest}"
    )


def _summary(prompts: Sequence[_Prompt], order: Sequence[str]) -> str:
    """How many of the prompts were right, by stage and moment."""
    rows = []
    for stage in order:
        cells = []
        for when in ("before", "during", "after"):
            counts: dict[int, list[bool]] = {}
            for prompt in prompts:
                for row in prompt.answers:
                    if prompt.expected and (row["stage"], row["when"]) == (stage, when):
                        counts.setdefault(row["step"], []).append(_right(row["answer"], prompt.expected))
            cells.append(", ".join(f"{sum(c)} of {len(c)}" for _, c in sorted(counts.items())))
        rows.append([esc(stage), *cells])
    return table("Right answers by stage", ["Right answers", "Before", "During", "After"], rows, numbers=(1, 2, 3))


def _card(prompt: _Prompt, order: Sequence[str], shelf: Shelf) -> str:
    facts = prompt.facts
    media = facts.get("media")
    listed = [_map(item) for item in media] if isinstance(media, list) else []
    figures = "".join(shelf.figure(str(m.get("type", "")), str(m.get("path", "")), prompt.id) for m in listed)
    rows = []
    for stage in order:
        cells = []
        for when in ("before", "during", "after"):
            mine = [row for row in prompt.answers if (row["stage"], row["when"]) == (stage, when)]
            cells.append("".join(_answer(row["answer"], prompt.expected) for row in mine))
        if any(cells):
            rows.append([esc(stage), *cells])
    expected = f'<b class="text" dir="auto">{esc(prompt.expected)}</b>' if prompt.expected else "<i>not given</i>"
    return (
        f'<article class="prompt"><div class="media">{figures or "<small>no media</small>"}</div><div>'
        f'<h3 dir="auto">{esc(facts.get("prompt") or "(no question)")}</h3>'
        f"<small>{esc(facts.get('task', ''))} \u00b7 {esc(prompt.id)}</small><p>Expected: {expected}</p>"
        f"{table(f'Answers to {prompt.id}', ['Stage', 'Before', 'During', 'After'], rows)}</div></article>"
    )


def _answer(answer: str, expected: str) -> str:
    shown = f'<span class="text" dir="auto">{esc(answer)}</span>' if answer.strip() else "<i>(nothing)</i>"
    if not expected:
        return shown
    right = _right(answer, expected)
    return f'<span class="answer {"right" if right else "wrong"}">{_mark(right)}{shown}</span>'


def _mark(right: bool) -> str:
    sign, word = ("\u2713", "right") if right else ("\u2717", "wrong")
    mark = f'<span class="mark" aria-hidden="true">{sign}</span><span class="sr">{word}:</span>'
    return f'<span class="{word}">{mark}</span>'


def _right(answer: str, expected: str) -> bool:
    return _words(answer) == _words(expected)


def _words(text: str) -> list[str]:
    """The same comparison as `avlm.eval.metrics.normalise`, which stands a floor above; a test holds them together."""
    return re.sub(r"[^\w\s]|_", " ", unicodedata.normalize("NFKC", text).casefold()).split()


# ---------------------------------------------------------------- quarantine


def _quarantine(run: RunFiles) -> str:
    bad = [row for row in run.quarantine if not row.get("cut")]
    cut = [row["cut"] for row in run.quarantine if isinstance(row.get("cut"), int) and row["cut"]]
    which = "1 sample was" if len(cut) == 1 else f"{len(cut):,} samples were"
    cuts = f"<p>{which} longer than a row and cut, by {sum(cut):,} tokens in all.</p>" if cut else ""
    if not bad:
        nothing = bool(cut) or run.notes.get("quarantine.jsonl", "").endswith("is empty.")
        return ("<p>No sample was left out.</p>" if nothing else run.note("quarantine.jsonl")) + cuts
    texts = [[row["stage"], row.get("sample_id") or "-", row.get("where") or "-"] for row in bad[:MAX_QUARANTINE]]
    rows = [
        [f"{row['step']:,}", *map(esc, text), f'<span class="text long">{esc(row["reason"])}</span>']
        for row, text in zip(bad, texts, strict=False)
    ]
    count = "1 sample was" if len(bad) == 1 else f"{len(bad):,} samples were"
    shown = f" The first {MAX_QUARANTINE} are listed; all are in quarantine.jsonl." if len(bad) > MAX_QUARANTINE else ""
    return (
        f"{run.note('quarantine.jsonl')}<p>{count} left out because something was wrong with them.{shown}</p>{cuts}"
        f"{table('Samples that were left out', ['Step', 'Stage', 'Sample', 'Where', 'Reason'], rows)}"
    )
