"""Proves metrics/report: the page of a real run, and of files that are cut off, hostile, long or of another version.

docs/output.md describes the page. It was looked at in Chromium, at the width of a phone and of a desk, light and dark.
"""

import importlib.util
import json
import math
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import metrics.recorder
import optim
from config.checks import check
from config.command_line import parse
from config.errors import OptionError
from metrics.report import __main__ as command
from tests.launch import ROOT, train, train_ok

pytest.importorskip("matplotlib", reason="matplotlib is optional")

from metrics import report
from metrics.report import charts, page, plots
from metrics.report.charts import MOST_POINTS, curve, make_charts, predicted_gib, smooth
from metrics.report.page import POLICY, history, render
from metrics.report.runs import Run, read_run, read_runs

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(1)> \" ' & $a$ \x1b[31m \u202e \ud800 </pre></style>"


class Page(HTMLParser):
    """The tags, the attributes and the text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: dict[str, list[str]] = {}
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            self.attributes.setdefault(name, []).append(value or "")

    def handle_data(self, data: str) -> None:
        self.text += f"{data}\n"


def record(step: int, **values: Any) -> dict[str, Any]:
    """A record of training, as recorder.py writes it."""
    usual = {"epoch": step / 100, "tokens_seen": 1000 * step, "loss": 2 + 1 / step, "grad_norm": 0.5, "mfu": None}
    usual |= {"learning_rate": 1e-3, "skipped_steps": 0, "tokens_per_second": 1e4, "peak_memory_gib": 1.5}
    return {"step": step, **usual, "data_wait_seconds": 0.01, "save_seconds": 0.0, **values}


def write(directory: Path, *lines: Any, events: list[dict[str, Any]] | None = None) -> Path:
    """An output directory with these records, or lines as they are."""
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / "metrics.jsonl", "wb") as file:
        for line in lines:
            file.write(line if isinstance(line, bytes) else json.dumps(line).encode() + b"\n")
    if events is not None:
        (directory / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    return directory


def read(*directories: Path) -> list[Run]:
    return read_runs(list(directories))


@pytest.fixture(scope="module")
def resumed(tiny: list[object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was traced, evaluated, sampled, ended at step 4, and resumed on two ranks up to step 8."""
    directory = tmp_path_factory.mktemp("resumed") / "output"
    shared = [*tiny, "--eval_steps", 2, "--sample_prompts", "the <b>", "--report", "--output_dir", directory]
    train_ok(1, *shared, "--max_steps", 4, "--trace_steps", 1)
    more = ["--max_steps", 8, "--resume_from_checkpoint", "auto", "--learning_rate", 1e-3]
    output = train_ok(2, *shared, *more)
    assert f"wrote {directory}/report.html" in output
    return directory


def test_the_page_of_a_run(resumed: Path) -> None:
    text = (resumed / "report.html").read_text()
    names = ("loss", "bits", "rate", "norm", "speed", "memory", "waiting", "trace-0")
    assert all(f'id="chart-{name}"' in text for name in names)
    seen = Page(text)
    for words in (
        "finished",
        "Qwen3ForCausalLM",
        "resumed after step 4 on 2 ranks",
        "the <b>",
        "step 8",
        "global batch",
    ):
        assert words in seen.text, words
    assert "learning_rate 0.003 → 0.001, max_steps 4 → 8" in seen.text
    assert "http" not in "".join(value for name in ("href", "src") for value in seen.attributes.get(name, []))
    assert {"script", "link", "img", "iframe", "object"}.isdisjoint(seen.tags)
    assert POLICY in seen.attributes["content"]
    assert not any(name.startswith("on") for name in seen.attributes)
    assert len(text) < 400_000


def test_the_page_reads_what_the_trainer_writes(resumed: Path) -> None:
    (run,) = read(resumed)
    assert run.notes == []
    assert run.training.steps.tolist() == list(range(1, 9))
    assert run.evaluations.steps.tolist() == [0, 2, 4, 6, 8]
    assert list(run.samples) == [0, 2, 4, 6, 8]
    assert run.options["learning_rate"] == 1e-3
    assert run.description["ranks"] == "2 on CPU, backend gloo"
    gib = predicted_gib(run)
    assert gib is not None
    assert 0 < gib < 0.1
    kinds = [event["event"] for event in run.events]
    assert kinds == ["start", "trace", "end", "start", "end"]
    (bars,) = [chart.bars for chart in make_charts([run]) if chart.bars]
    assert sum(value for _, value in bars) > 0
    assert bars == sorted(bars, key=lambda bar: -bar[1])


def fail_in_step_3() -> None:
    """A program error, in the middle of training."""
    rate = optim.learning_rate

    def broken(step: int, *others: Any) -> float:
        if step == 3:
            raise RuntimeError("a <broken> schedule")
        return rate(step, *others)

    optim.learning_rate = broken  # type: ignore[assignment]


def fail_to_write() -> None:
    def broken(*arguments: Any) -> list[Path]:
        raise MemoryError("no room for a page")

    report.write_report = broken  # type: ignore[assignment]


def test_a_failure_is_on_the_page(tiny: list[object], tmp_path: Path) -> None:
    outcome = train(1, [*tiny, "--output_dir", tmp_path], before=fail_in_step_3)
    assert outcome.exit_codes == [1]
    text = render(read(tmp_path))
    assert "failed after step 2: RuntimeError: a &lt;broken&gt; schedule" in text
    assert '<span class="state bad">failed</span>' in text


def test_a_report_that_fails_does_not_end_the_run(tiny: list[object], tmp_path: Path) -> None:
    outcome = train(2, [*tiny, "--max_steps", 1, "--report", "--output_dir", tmp_path], before=fail_to_write)
    assert outcome.exit_codes == [0, 0]
    assert "report true: it could not be written: no room for a page; run python -m metrics.report" in outcome.output


def test_what_happened(tmp_path: Path) -> None:
    """A start without an end was killed, unless it is the last one, which may still run."""
    start: dict[str, Any] = {"event": "start", "time": 0, "ranks": 8, "options": {"seed": 1}}
    events: list[dict[str, Any]] = [
        {**start, "step": 0},
        {**start, "step": 500, "ranks": 1, "options": {"seed": 1, "resume_from_checkpoint": "auto"}},
        {"event": "end", "time": 86400.5, "step": 700, "reason": "stopped by a signal"},
        {**start, "step": 700, "time": "never", "ranks": None, "options": None},
        {"event": "unknown to this version"},
        {"event": "trace"},
        {"event": ["no", "name"]},
    ]
    (run,) = read(write(tmp_path, record(701), events=events))
    happened = history(run)
    assert happened[0] == ("1970-01-01 00:00:00", "started on 8 ranks")
    assert "killed" in happened[1][1]
    assert happened[2] == ("1970-01-01 00:00:00", "resumed after step 500 on 1 rank")
    assert happened[3] == ("1970-01-02 00:00:00", "stopped by a signal after step 700")
    assert happened[4] == ("", "resumed after step 700; changed: seed 1 → None")
    assert "no end yet: it runs, or" in happened[-1][1]
    assert "(last record: step 701)" in happened[-1][1]
    assert "running, or killed" in render([run])


CUT = json.dumps(record(3)).encode()[:40]


@pytest.mark.parametrize(
    ("lines", "steps", "note"),
    [
        ([], [], "metrics.jsonl has no records yet"),
        ([record(1)], [1], ""),
        ([record(1), record(2), CUT], [1, 2], "1 line of metrics.jsonl could not be read"),
        ([record(1), CUT + b"\n", record(4)], [1, 4], "1 line of"),
        ([b"\x00\xff\xfe\n\n[1]\nnull\n5\n" + b"[" * 100_000 + b"\n", record(2)], [2], "5 lines of"),
        ([{"step": True, "loss": 1}, {"step": -1, "loss": 1}, {"step": 10**30, "loss": 1}, record(1)], [1], "3 lines"),
        ([{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.5}], [1, 2], ""),  # of a version with fewer fields
        ([{"step": 1, "novelty": 3.0}, record(2)], [2], "1 record of metrics.jsonl of an unknown kind"),
        ([record(n) for n in (1, 2, 3, 4, 3, 4, 5)], [1, 2, 3, 4, 5], "2 records left out, because a resumed run"),
        ([record(n, loss=None, grad_norm=None) for n in (1, 2, 3)], [1, 2, 3], "not finite in 3 of 3 records"),
        ([b'{"step": 1, "loss": NaN, "grad_norm": -Infinity, "mfu": "x", "learning_rate": [1]}\n'], [1], "1 of 1"),
        ([record(1, loss=10**400), record(2, grad_norm=1e308), record(3, grad_norm=5e-324)], [1, 2, 3], "1 of 3"),
        ([record(1, tokens_per_second=0.0, tokens_seen=0), record(2, tokens_per_second=-1)], [1, 2], ""),
        ([record(1, skipped_steps=None), record(2, skipped_steps=5), record(3, skipped_steps=2)], [1, 2, 3], ""),
        ([{"step": 0, "eval_loss": None}, {"step": 5, "eval_loss": 1.0}], [], ""),
        ([record(1), {"step": 1, "samples": [{}, 3, {"prompt": None, "completion": {"a": 1}}]}], [1], ""),
        ([record(1, **{f"field {n}": n for n in range(500)}), record(2)], [1, 2], ""),
        ([b" " * 5_000_000 + b"\n", record(1)], [1], ""),
        ([b"x" * 5_000_000 + b"\n", record(1)], [1], "2 lines of"),
    ],
)
@pytest.mark.fault(
    "data", "metrics.jsonl is cut off, damaged, repeated or of another version", "the page says what it left out"
)
def test_any_metrics(lines: list[Any], steps: list[int], note: str, tmp_path: Path) -> None:
    (run,) = read(write(tmp_path, *lines, events=[{"event": "start"}]))
    text = render([run])
    assert run.training.steps.tolist() == steps
    seen = Page(text).text
    assert note in seen
    notes = len(run.notes) + seen.count("not finite in")
    assert notes == bool(note), run.notes
    assert "nan" not in text.replace("nanmax", "")
    plots.to_png(make_charts([run]), run.name)


def test_an_older_version_has_no_events(tmp_path: Path) -> None:
    """The options then come from the newest checkpoint that can be read."""
    write(tmp_path, record(1))
    for step, content in ((1, '{"options": {"seed": 7}}'), (2, "{"), (3, "[]"), (4, '{"options": 3}')):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "state.json").write_text(content)
    (run,) = read(tmp_path)
    assert run.options == {"seed": 7}
    assert "the run is of an older version" in render([run])


@pytest.mark.fault("security", "a model, an option or a directory name holds HTML", "the page shows it as text")
def test_hostile_text_is_shown_as_text(tmp_path: Path) -> None:
    """Nothing that a run wrote becomes a tag or an attribute, in the page and in its pictures."""
    hostile = HOSTILE.encode("utf-8", "surrogatepass").decode("utf-8", "replace")
    options = {"learning_rate": HOSTILE, HOSTILE: 1, "max_grad_norm": HOSTILE}
    start: dict[str, Any] = {
        "event": "start",
        "time": 1,
        "step": HOSTILE,
        "ranks": HOSTILE,
        "total_steps": HOSTILE,
        "options": options,
    }
    start["description"] = f"ranks         {HOSTILE}\nmodel         {HOSTILE}\nmemory        predicted {HOSTILE}"
    trace = {"event": "trace", "first": HOSTILE, "last": HOSTILE, "path": HOSTILE, "times": {HOSTILE: 1.0}}
    events: list[dict[str, Any]] = [start, trace, {"event": "end", "step": 1, "reason": HOSTILE}]
    sample = {"prompt": HOSTILE, "completion": HOSTILE}
    lines = [record(1), {"step": 1, f"eval_{HOSTILE}_loss": 1.0}, {"step": 1, "samples": [sample]}]
    name = hostile.replace("/", "").replace("\x1b", "")[:90]
    directories = [write(tmp_path / f"{number}" / name, *lines, events=events) for number in (1, 2)]
    plain = [write(tmp_path / "a", *lines[:1], events=events[:1]), write(tmp_path / "b", record(1), events=[])]
    for runs in (read(directories[0]), read(*directories), read(*plain)):
        text = render(runs)
        seen = Page(text)
        assert {"script", "img", "iframe", "a<"}.isdisjoint(seen.tags)
        assert not any(attribute.startswith("on") for attribute in seen.attributes)
        assert set("\x1b\u202e\ud800").isdisjoint(text)
        text.encode()
    assert "<script>alert(1)</script>" in Page(render(read(directories[0]))).text
    plots.to_png(make_charts(read(directories[0])), HOSTILE)


def test_passwords_in_addresses_are_masked(tmp_path: Path) -> None:
    options = {"train_file": "https://me:hidden@example.com/a.jsonl"}
    write(tmp_path, record(1), events=[{"event": "start", "time": 1, "step": 0, "options": options}])
    assert "hidden" not in render(read(tmp_path))


def test_a_long_run_is_drawn_in_groups() -> None:
    """The line is the mean of each group, and no extreme is lost. NaN counts as no value."""
    steps = np.arange(1, 100_001, dtype=np.float64)
    values = np.sin(steps)
    values[77_777], values[:200], values[5] = 50.0, np.nan, -9.0
    series = curve(steps, values, "a", "--c1")
    assert len(np.asarray(series.x)) == MOST_POINTS
    assert np.nanmax(np.asarray(series.high)) == 50
    assert np.nanmin(np.asarray(series.low)) == -9
    edges = np.linspace(0, len(steps), MOST_POINTS + 1).astype(int)
    for group in (0, 1, 300, MOST_POINTS - 1):
        expected = values[edges[group] : edges[group + 1]]
        assert np.asarray(series.y)[group] == pytest.approx(np.nanmean(expected))


@pytest.mark.parametrize("records", [20_000, pytest.param(1_000_000, marks=pytest.mark.slow)])
def test_a_long_run_has_a_small_page(records: int, tmp_path: Path) -> None:
    line = json.dumps(record(7)).encode().replace(b'"step": 7', b'"step": %d') + b"\n"
    write(tmp_path, *(line % step for step in range(1, records + 1)), events=[])
    text = render(read(tmp_path))
    assert len(text) < 500_000
    assert f"{records:,} records, drawn as {MOST_POINTS} groups" in text


@pytest.mark.parametrize("width", [3, 4, 7])
def test_a_smoothed_curve_is_a_mean_of_its_surroundings(width: int) -> None:
    values = np.random.default_rng(0).normal(size=60)
    values[[0, 10, 11, 12, 59]] = np.nan
    half = width // 2
    for at, smoothed in enumerate(smooth(values, width)):
        around = values[max(0, at - half) : at + half + 1]
        expected = np.nan if math.isnan(values[at]) else np.nanmean(around)
        assert smoothed == pytest.approx(expected, nan_ok=True)


def test_several_runs(tmp_path: Path) -> None:
    """Each has a color and a name of its own, and the options in which they differ come first."""
    for number, rate in enumerate((1e-3, 1e-4)):
        options = {"learning_rate": rate, "seed": 3}
        events = [
            {"event": "start", "time": 1, "step": 0, "options": options, "description": f"ranks         {number}"}
        ]
        write(tmp_path / f"{number}" / "output", *(record(n, loss=rate) for n in range(1, 9)), events=events)
    runs = read(tmp_path / "0" / "output", tmp_path / "1" / "output")
    assert [run.name for run in runs] == ["0/output", "1/output"]
    text = render(runs)
    differ = text[text.index("Options that differ") : text.index("All 2 options")]
    assert "learning_rate" in differ
    assert "seed" not in differ
    loss = next(chart for chart in make_charts(runs) if chart.name == "loss")
    assert len({series.color for series in loss.series}) == 2
    with pytest.raises(OptionError, match="is named twice; name each once"):
        read(tmp_path / "0" / "output", tmp_path / "0" / ".." / "0" / "output")
    other = write(tmp_path / "dpo", record(1), events=[{"event": "start", "options": {"objective": "dpo"}}])
    assert "different objectives" in render([*runs, *read(other)])


def test_skipped_steps_are_marked_where_they_were(tmp_path: Path) -> None:
    counts = (0, 0, 2, 2, 3)
    write(tmp_path, *(record(10 * n + 10, skipped_steps=count) for n, count in enumerate(counts)), events=[])
    norm = next(chart for chart in make_charts(read(tmp_path)) if chart.name == "norm")
    (marks,) = [series for series in norm.series if series.kind == "marks"]
    assert list(np.asarray(marks.x)) == [30, 50]
    assert marks.label == "skipped steps (3)"


def test_memory_against_the_forecast(tmp_path: Path) -> None:
    """On a GPU as a line; on a CPU in words, because the process holds more than tensors."""

    def chart(device: str) -> charts.Chart:
        memory = "memory        predicted 21.3 GiB as the backward begins: parameters 2.2 GiB"
        start = {"event": "start", "description": f"ranks         8 on {device}, backend x\n{memory}"}
        write(tmp_path, record(1), events=[start])
        return next(chart for chart in make_charts(read(tmp_path)) if chart.name == "memory")

    on_gpu, on_cpu = chart("NVIDIA H100"), chart("CPU")
    assert [(series.kind, list(np.asarray(series.y))) for series in on_gpu.series[1:]] == [("level", [21.3, 21.3])]
    assert len(on_cpu.series) == 1
    assert "The prediction, 21 GiB, is for the tensors alone" in on_cpu.caption


def test_equal_files_give_equal_pictures(resumed: Path) -> None:
    first, second = (list(map(plots.to_svg, make_charts(read(resumed)))) for _ in range(2))
    assert first == second
    assert not any("<metadata>" in svg or "DejaVu" in svg for svg in first)


def test_the_command(resumed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command.main([str(resumed), "--png", "--output", str(tmp_path / "page.html")])
    assert capsys.readouterr().out == f"{tmp_path}/page.html\n{tmp_path}/page.png\n"
    assert (tmp_path / "page.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "link.html").symlink_to(tmp_path / "page.html")
    before = (tmp_path / "page.html").read_bytes()
    command.main([str(resumed), "--output", str(tmp_path / "link.html")])
    assert not (tmp_path / "link.html").is_symlink()
    assert (tmp_path / "page.html").read_bytes() == before
    shutil.copytree(resumed, tmp_path / "first")
    capsys.readouterr()
    command.main([str(tmp_path / "first"), str(resumed)])
    assert capsys.readouterr().out == f"{tmp_path}/first/compared.html\n", "report.html is of the first run alone"
    with pytest.raises(OptionError, match="it cannot be written: No such file or directory; pass another --output"):
        command.main([str(resumed), "--output", str(tmp_path / "missing" / "page.html")])


def test_a_directory_without_a_run(tmp_path: Path) -> None:
    outcome = subprocess.run(
        [sys.executable, "-m", "metrics.report", tmp_path], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert outcome.returncode == 2
    assert outcome.stderr.startswith(f"metrics.report: error: {tmp_path}: it has no metrics.jsonl")
    assert "\npass the --output_dir of a run" in outcome.stderr
    (tmp_path / "metrics.jsonl").symlink_to(tmp_path / "elsewhere.jsonl")
    (tmp_path / "elsewhere.jsonl").touch()
    with pytest.raises(OptionError, match="it is a link, which is not followed"):
        read_run(tmp_path, "a")


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The report and the option are refused before anything starts, with the line that helps."""
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name))
    pip = re.escape(f"{sys.executable} -m pip install matplotlib")
    with pytest.raises(OptionError, match=rf"^report.html: matplotlib is not installed here\n{pip}$"):
        report.write_report([tmp_path], tmp_path / "report.html")
    with pytest.raises(OptionError, match="report true: it needs matplotlib, which is not installed here\n" + pip):
        check(parse(["--report"]), 1)


def test_the_start_block_is_read_line_by_line() -> None:
    lines = "ranks         8\nmemory        predicted 1.0 GiB\n              more\n--- sequence 0 ---\nsecret text"
    assert metrics.recorder.__doc__
    from metrics.report.runs import _lines

    assert _lines(lines) == {"ranks": "8", "memory": "predicted 1.0 GiB more"}
    assert page.date(1e300) == ""
