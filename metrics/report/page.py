"""The page: one HTML file with its style and its pictures inside, which loads nothing and runs nothing.

Whatever comes from a run is escaped: a model may write HTML, and a directory may be called anything.
"""

import html
import re
import time
from pathlib import Path
from typing import Any

import numpy as np

from config.options import Options
from metrics.report.charts import MOST_RUNS, make_charts
from metrics.report.plots import RUN_COLORS, Chart, to_svg
from metrics.report.runs import Columns, Numbers, Run

# A second wall behind the escapes: no script, and nothing from elsewhere.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
MOST_SAMPLES = 12  # evaluations of a prompt that are shown
MOST_EVENTS = 60
MOST_ROWS = 12  # of the table of numbers
LONGEST = 4000  # characters of a text of the run


class Html(str):
    """A text that is HTML already. A table escapes all others, so that a forgotten one is safe."""


Cells = list[str]  # of a row


def render(runs: list[Run]) -> str:
    """The HTML of the page for one run, or for several beside one another."""
    title = ", ".join(run.name for run in runs)
    charts = "\n".join(figure(chart) for chart in make_charts(runs))
    sections = {
        "curves": ("Curves", f'<div class="charts">{charts}</div>' if charts else "<p>No records yet.</p>"),
        "samples": ("Samples of the model", samples(runs)),
        "events": ("What happened", events(runs)),
        "options": ("Options", options(runs)),
        "start": ("Model, data and topology", descriptions(runs)),
        "numbers": ("Numbers", numbers(runs)),
    }
    shown = {name: section for name, section in sections.items() if section[1]}
    links = "".join(f'<a href="#{name}">{heading}</a>' for name, (heading, _) in shown.items())
    body = "\n".join(f'<h2 id="{name}">{heading}</h2>\n{content}' for name, (heading, content) in shown.items())
    style = (Path(__file__).parent / "style.css").read_text()
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>
{style}</style>
</head>
<body>
<header>{heading(runs)}<nav>{links}</nav></header>
{summary(runs)}
{notes(runs)}
{body}
<footer>Written {date(time.time())} by python -m metrics.report</footer>
</body>
</html>
"""


def figure(chart: Chart) -> str:
    """A chart with its title, unit, legend and caption as text of the page, where they wrap."""
    unit = "" if chart.bars else f" <small>{escape(chart.unit)}</small>"
    entries = [
        f'<li class="{series.kind}" style="--color:var({series.color})">{escape(series.label)}</li>'
        for series in chart.series
    ]
    legend = f'<ul class="legend">{"".join(entries)}</ul>' if len(entries) > 1 else ""
    caption = f"<figcaption>{escape(chart.caption)}</figcaption>" if chart.caption else ""
    title = f"<h3>{escape(chart.title)}{unit}</h3>"
    return f'<figure id="chart-{chart.name}">{title}{legend}{to_svg(chart, for_page=True)}{caption}</figure>'


def heading(runs: list[Run]) -> str:
    """The names of the runs; for one run also its state, its model and its ranks."""
    if len(runs) > 1:
        return f"<h1>{len(runs)} runs</h1><p>{escape(', '.join(run.name for run in runs))}</p>"
    (run,) = runs
    word, kind = state(run)
    facts = [run.description[key].split("; ")[0] for key in ("model", "ranks") if key in run.description]
    if run.description.get("strategy"):
        facts.append(run.description["strategy"].split(":")[0])
    chip = f'<span class="state {kind}">{escape(word)}</span>' if word else ""
    return f"<h1>{escape(run.name)}{chip}</h1><p>{escape(' · '.join(facts))}</p>"


def state(run: Run) -> tuple[str, str]:
    """How the last start of the run has ended, and whether that is good, a warning, or bad."""
    last = next((event for event in reversed(run.events) if event["event"] in ("start", "end", "failure")), None)
    match last and last["event"]:
        case "end":
            reason = str(last["reason"] if last and "reason" in last else "ended")
            return reason, "good" if reason.startswith("finished") else "warn"
        case "failure":
            return "failed", "bad"
        case "start":
            return "running, or killed", "warn"
    return "", ""


def summary(runs: list[Run]) -> str:
    """The most important numbers: tiles for one run, and a table for several."""
    rows = [facts(run, alone=len(runs) == 1) for run in runs]
    if len(runs) == 1:
        tiles = "".join(
            f'<div class="tile"><b>{escape(value)}</b><span>{escape(name)}</span></div>'
            for name, value in rows[0].items()
            if value
        )
        return f'<div class="tiles">{tiles}</div>'
    names = [name for name in dict.fromkeys(name for row in rows for name in row) if any(row.get(name) for row in rows)]
    head = ["run", *names]
    body = []
    for number, (run, row) in enumerate(zip(runs, rows, strict=True)):
        body.append([named(run, number), *(row.get(name) or "-" for name in names)])
    return f'<div class="card scroll" style="margin-top:20px">{table(head, body, numeric=range(1, len(head)))}</div>'


def facts(run: Run, alone: bool) -> dict[str, str]:
    """Name and value of the important numbers; "" for one that the run does not have."""
    training, evaluations = run.training, run.evaluations
    plan: dict[str, Any] = next((event for event in reversed(run.events) if event["event"] == "start"), {})
    total = plan.get("total_steps")
    of = "" if not alone else f" of {total:,}" if is_count(total) and total else ""
    result = {f"steps{of}": f"{run.last_step:,}", "training loss, last": last(training, "loss", "{:.4f}")}
    losses = sorted(name for name in evaluations.values if re.fullmatch(r"eval_(.+_)?loss", name))
    for name in losses[:4]:
        values = evaluations[name]
        if np.isfinite(values).any():
            best = int(np.nanargmin(values))
            which = name.removeprefix("eval_").removesuffix("loss").strip("_")
            at = f", step {evaluations.steps[best]:,}" if alone else ""
            result[f"{f'{which}: ' if which else ''}best validation loss{at}"] = f"{values[best]:.4f}"
    tokens = training["tokens_seen"][np.isfinite(training["tokens_seen"])]
    result["tokens"] = short(float(tokens[-1])) if len(tokens) else ""
    result["tokens / s, median"] = median(training, "tokens_per_second", short)
    result["MFU, median"] = median(training, "mfu", lambda value: f"{value:.1%}")
    memory = training["peak_memory_gib"]
    result["peak memory, rank 0"] = f"{np.nanmax(memory):.2f} GiB" if np.isfinite(memory).any() else ""
    skipped = training["skipped_steps"]
    most = np.nanmax(skipped) if np.isfinite(skipped).any() else 0
    result["skipped steps"] = f"{int(most):,}" if most else ""
    return result


def finite(values: Numbers) -> Numbers:
    return values[np.isfinite(values)]


def last(columns: Columns, name: str, form: str) -> str:
    values = columns[name]
    if not len(values):
        return ""
    return form.format(values[-1]) if np.isfinite(values[-1]) else "not finite"


def median(columns: Columns, name: str, form: Any) -> str:
    values = finite(columns[name])
    return form(float(np.median(values))) if len(values) else ""


def notes(runs: list[Run]) -> str:
    """What could not be used, so that nothing is missing in silence."""
    found = [(f"{run.name}: " if len(runs) > 1 else "") + note for run in runs for note in run.notes]
    for run in runs:
        if (run.path / "hang").is_dir():
            found.append(f"{run.name}: a hang was reported; hang/ in its directory says where each rank was")
        bad = int((~np.isfinite(run.training["loss"])).sum())
        if bad:
            found.append(f"{run.name}: the loss was not finite in {bad:,} of {len(run.training):,} records")
    if len(runs) > MOST_RUNS:
        found.append(f"{len(runs)} runs have {MOST_RUNS} colors, so some are equal")
    units = {str(run.options.get("objective", "sft")) for run in runs}
    if len(units) > 1:
        found.append("the runs have different objectives, so their losses cannot be compared")
    items = "".join(f"<li>{escape(note)}</li>" for note in found)
    return f'<ul class="card notes">{items}</ul>' if items else ""


def samples(runs: list[Run]) -> str:
    """For each prompt, the completions at the evaluations; with several runs, the last of each."""
    prompts = list(dict.fromkeys(sample["prompt"] for run in runs for each in run.samples.values() for sample in each))
    cards = []
    for prompt in prompts[:32]:
        rows = []
        for number, run in enumerate(runs):
            of_prompt = [
                (step, sample["completion"])
                for step, each in sorted(run.samples.items())
                for sample in each
                if sample["prompt"] == prompt
            ]
            chosen = thinned(of_prompt, MOST_SAMPLES) if len(runs) == 1 else of_prompt[-1:]
            for step, completion in chosen:
                name = named(run, number, f", step {step:,}") if len(runs) > 1 else f"step {step:,}"
                kind = "name" if len(runs) > 1 else "step"
                rows.append(f'<tr><td class="{kind}">{name}</td><td><pre>\n{escape(completion)}</pre></td></tr>')
            if len(chosen) < len(of_prompt) and len(runs) == 1:
                rows.append(
                    f'<tr><td class="step"></td><td><p>{len(chosen)} of {len(of_prompt)} evaluations are shown; '
                    "metrics.jsonl has all.</p></td></tr>"
                )
        cards.append(
            f'<div class="card"><h3>Prompt</h3><pre>\n{escape(prompt)}</pre><table>{"".join(rows)}</table></div>'
        )
    if len(prompts) > 32:
        cards.append(f"<p>32 of {len(prompts):,} prompts are shown.</p>")
    return "\n".join(cards)


def events(runs: list[Run]) -> str:
    """Starts, resumes, stops and failures, and where a start ended without a last word."""
    cards = []
    for run in runs:
        rows: list[Cells] = [list(row) for row in history(run)]
        if not rows:
            continue
        more = len(rows) - MOST_EVENTS
        rows = [*rows[:10], ["", f"… {more:,} more …"], *rows[-MOST_EVENTS + 10 :]] if more > 0 else rows
        name = f"<h3>{escape(run.name)}</h3>" if len(runs) > 1 else ""
        cards.append(f'<div class="card scroll">{name}{table(["time (UTC)", "event"], rows, step=True)}</div>')
    return "\n".join(cards)


def history(run: Run) -> list[tuple[str, str]]:
    """Time and text of each event."""
    rows: list[tuple[str, str]] = []
    before: dict[str, Any] | None = None  # the start that has not ended yet
    options: dict[str, Any] = {}
    lost = Html('<span class="bad">no last word: killed, or its node or another rank failed</span>')
    for event in run.events:
        when, step = date(event.get("time")), f"{event.get('step', 0):,}" if is_count(event.get("step")) else "?"
        match event["event"]:
            case "start":
                if before is not None:
                    rows.append(("", lost))
                before = event
                ranks = event.get("ranks")
                on = f" on {ranks:,} rank{'s' * (ranks != 1)}" if is_count(ranks) else ""
                began = "started" if not event.get("step") else f"resumed after step {step}"
                now = event.get("options")
                now = now if isinstance(now, dict) else {}
                passing = {"resume_from_checkpoint", "overwrite_output_dir"}
                changed = [
                    f"{name} {options.get(name)} → {now.get(name)}"
                    for name in sorted(options.keys() | now.keys())
                    if name not in passing and options.get(name) != now.get(name)
                ]
                other = f"; changed: {', '.join(changed)}" if options and changed else ""
                options = now
                rows.append((when, f"{began}{on}{other}"))
            case "end":
                before = None
                rows.append((when, f"{event.get('reason', 'ended')} after step {step}"))
            case "failure":
                before = None
                text = escape(f"failed after step {step}: {event.get('message', '')}")
                rows.append((when, Html(f'<span class="bad">{text}</span>')))
            case "trace":
                steps = f"{event.get('first')} to {event.get('last')}"
                rows.append((when, f"traced steps {steps}: {event.get('path')}"))
    if before is not None:
        rows.append(("", Html(f"no end yet: it runs, or {lost} (last record: step {run.last_step:,})")))
    return rows


def options(runs: list[Run]) -> str:
    """With several runs, the options in which they differ; with one, those that are not the default. And all."""
    known = [run for run in runs if run.options]
    if not known:
        return ""
    names = list(dict.fromkeys(name for run in known for name in run.options))
    if len(runs) > 1:
        differ = [name for name in names if len({repr(run.options.get(name)) for run in runs}) > 1]
        heading = "Options that differ between the runs"
        columns: Cells = [named(run, number) for number, run in enumerate(runs)]
    else:
        differ = [name for name in names if known[0].options[name] != getattr(Options, name, None)]
        heading, columns = "Options that are not the default", ["value"]

    def rows(chosen: list[str]) -> list[Cells]:
        return [[name, *(value(run.options[name]) if name in run.options else "-" for run in runs)] for name in chosen]

    first = table(["option", *columns], rows(differ)) if differ else "<p>None.</p>"
    return (
        f'<div class="card scroll"><h3>{heading}</h3>{first}</div>'
        f'<details><summary>All {len(names)} options</summary><div class="card scroll">'
        f"{table(['option', *columns], rows(names))}</div></details>"
    )


def descriptions(runs: list[Run]) -> str:
    """The start block of each run. With several runs, the lines in which they differ come first."""
    known = [run for run in runs if run.description]
    if not known:
        return ""
    names = list(dict.fromkeys(name for run in known for name in run.description))
    columns: Cells = [named(run, number) for number, run in enumerate(runs)] if len(runs) > 1 else ["value"]
    if len(runs) > 1:
        names.sort(key=lambda name: len({run.description.get(name) for run in runs}) == 1)
    rows = [[name, *(run.description.get(name, "-") for run in runs)] for name in names]
    return f'<div class="card scroll">{table(["", *columns], rows)}</div>'


def numbers(runs: list[Run]) -> str:
    """A few records as numbers, for what a curve does not tell."""
    fields = ("loss", "learning_rate", "grad_norm", "tokens_per_second", "mfu", "peak_memory_gib")
    cards = []
    for run in runs:
        for kind, columns, names in (
            ("training", run.training, [name for name in fields if run.training.has(name)]),
            ("evaluation", run.evaluations, [name for name in run.evaluations.values if name.startswith("eval_")][:8]),
        ):
            chosen = thinned(list(range(len(columns))), MOST_ROWS)
            if not chosen:
                continue
            values = {name: columns[name] for name in names}
            rows = [[f"{columns.steps[at]:,}", *(number(values[name][at]) for name in names)] for at in chosen]
            of = f"{len(chosen)} of {len(columns):,}" if len(chosen) < len(columns) else f"{len(chosen)}"
            name = f"{run.name}: " if len(runs) > 1 else ""
            shown = table(["step", *names], rows, numeric=range(len(names) + 1))
            cards.append(
                f"<details><summary>{escape(name)}{of} records of {kind}</summary>"
                f'<div class="card scroll">{shown}</div></details>'
            )
    return "\n".join(cards)


def table(head: Cells, rows: list[Cells], numeric: Any = (), step: bool = False) -> str:
    """A table. `numeric` columns are aligned to the right."""

    def cell(tag: str, column: int, text: str) -> str:
        text = text if isinstance(text, Html) else escape(text)
        kind = "number" if column in numeric else "step" if step and column == 0 else "name" if column == 0 else ""
        return f'<{tag} class="{kind}">{text}</{tag}>' if kind else f"<{tag}>{text}</{tag}>"

    parts = ["".join(cell("th", column, text) for column, text in enumerate(head))]
    parts += ["".join(cell("td", column, text) for column, text in enumerate(row)) for row in rows]
    return "<table>" + "".join(f"<tr>{part}</tr>" for part in parts) + "</table>"


def thinned(entries: list[Any], most: int) -> list[Any]:
    """At most `most` entries, evenly chosen, with the first and the last."""
    if len(entries) <= most:
        return entries
    return [entries[round(index * (len(entries) - 1) / (most - 1))] for index in range(most)]


def named(run: Run, number: int, more: str = "") -> Html:
    """The name of a run with its color in the charts."""
    color = f'<span class="swatch" style="background:var({RUN_COLORS[number % MOST_RUNS]})"></span>'
    return Html(color + escape(run.name + more))


def value(option: Any) -> str:
    """The value of an option. A password in an address is masked."""
    text = str(option).lower() if isinstance(option, bool) else "-" if option is None else str(option)
    return re.sub(r"(://[^/\s:@]*):[^/\s@]+@", r"\1:***@", text)


def number(value: float) -> str:
    return f"{value:,.4g}" if np.isfinite(value) else "-"


def short(value: float) -> str:
    """A large number with three digits: 1.23 M."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e4)):
        if value >= size:
            return f"{value / (1e3 if unit == 'k' else size):.3g} {unit}"
    return f"{value:,.0f}"


def date(seconds: Any) -> str:
    """A time in UTC; "" for what is none."""
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(seconds)) if is_number(seconds) else ""
    except (OverflowError, ValueError, OSError):
        return ""


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def escape(text: str) -> str:
    """Text of a run as HTML. Control characters and those that turn the direction of writing are replaced."""
    if len(text) > LONGEST:
        text = f"{text[: LONGEST // 2]} … {text[-LONGEST // 2 :]}"
    kept = "\n\t\u200c\u200d"  # the joiners belong to letters and emoji
    clean = "".join(one if one.isprintable() or one in kept else "\ufffd" for one in text)
    return html.escape(clean, quote=True)
