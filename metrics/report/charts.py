"""Which charts a run has, or several runs in one chart: what is drawn, in which unit, and what was left out."""

from typing import Any

import numpy as np

from metrics.report.plots import RUN_COLORS, Chart, Kind, Series
from metrics.report.runs import Numbers, Run

MOST_POINTS = 600  # of a curve; a chart is 400 to 600 pixels wide
SMOOTHED = 50  # a smoothed curve averages over 1 / 50 of a run, ...
FEWEST = 40  # ... if the run has so many records
SMOOTH = f"The line is the mean of 1/{SMOOTHED} of the records around it."
MOST_RUNS = len(RUN_COLORS)


def make_charts(runs: list[Run]) -> list[Chart]:
    """All charts for which the runs have something to show. With several runs, each has a color."""
    charts = [
        *loss(runs),
        *([] if len(runs) > 1 else [bits_per_byte(runs)]),
        learning_rate(runs),
        gradient_norm(runs),
        simple(runs, "tokens_per_second", "Speed", "tokens / s, all ranks", "speed", from_zero=True),
        simple(runs, "mfu", "Model FLOPs utilization (MFU)", "% of the peak", "mfu", from_zero=True, percent=True),
        memory(runs),
        waiting(runs),
        simple(runs, "expert_load_max", "Load of the busiest expert", "x the mean of its layer", "load"),
        simple(runs, "experts_unused", "Experts without a token", "% of the experts", "unused", percent=True),
        simple(runs, "router_aux_loss", "Load-balancing loss", "before its coefficient", "router"),
        *traces(runs),
    ]
    return [chart for chart in charts if chart.bars or any(np.size(series.y) for series in chart.series)]


def loss(runs: list[Run]) -> list[Chart]:
    """Training loss, smoothed, and the loss of each validation set: for one run in one chart, for several in more."""
    unit = f"nats per {'pair' if runs[0].options.get('objective') == 'dpo' else 'token'}"
    if len(runs) > 1:
        names = list(dict.fromkeys(name for run in runs for name in _losses(run)))
        charts = [simple(runs, "loss", "Training loss", unit, "loss", smoothed=True)]
        for number, name in enumerate(names):
            chart = Chart(f"validation-{number}", f"Validation loss{_set(name)}", unit)
            for index, run in enumerate(runs):
                if name in _losses(run):
                    chart.series.append(_points(run, name, run.name, RUN_COLORS[index % MOST_RUNS]))
            charts.append(chart)
        return charts
    (run,) = runs
    chart = simple(runs, "loss", "Loss", unit, "loss", smoothed=True)
    if len(chart.series) == 1:
        chart.series[0].label = "training"
        if smoothing(len(run.training)) > 1:
            raw = curve(run.training.step, run.training["loss"], "each record", RUN_COLORS[0], "faint")
            chart.series.insert(0, raw)
    for index, name in enumerate(_losses(run)):
        chart.series.append(_points(run, name, f"validation{_set(name)}", RUN_COLORS[(index + 1) % MOST_RUNS]))
    return [chart]


def _set(name: str) -> str:
    """The name of a validation set in that of its loss, after a space; "" for eval_loss."""
    which = name.removeprefix("eval_").removesuffix("loss").strip("_")
    return f" {which}" if which else ""


def _points(run: Run, name: str, label: str, color: str) -> Series:
    known = np.isfinite(run.evaluations[name])
    return curve(run.evaluations.step[known], run.evaluations[name][known], label, color, "points")


def bits_per_byte(runs: list[Run]) -> Chart:
    """Bits per byte of each validation set, the measure that does not depend on the tokenizer."""
    chart = Chart("bits", "Validation: bits per byte", "bits per byte of text")
    (run,) = runs
    names = [name for name in run.evaluations.values if name.endswith("_bits_per_byte") and run.evaluations.has(name)]
    for index, name in enumerate(sorted(names)):
        label = name.removesuffix("_bits_per_byte").removeprefix("eval").strip("_") or "validation"
        color = RUN_COLORS[(index + 1) % MOST_RUNS]
        chart.series.append(curve(run.evaluations.step, run.evaluations[name], label, color, "points"))
    return chart


def learning_rate(runs: list[Run]) -> Chart:
    return simple(runs, "learning_rate", "Learning rate", "of this step", "rate", from_zero=True)


def gradient_norm(runs: list[Run]) -> Chart:
    """The norm before clipping, where clipping begins, and the steps that were skipped."""
    chart = simple(runs, "grad_norm", "Gradient norm", "L2 norm before clipping", "norm", smoothed=len(runs) > 1)
    chart.log = True
    limits = {run.options.get("max_grad_norm") for run in runs}
    if len(limits) == 1 and isinstance(limit := limits.pop(), int | float) and limit > 0 and chart.series:
        chart.series.append(Series(f"clipped above {limit:g}", [0, 1], [limit, limit], "--soft", "level"))
    for number, run in enumerate(runs):
        known = np.isfinite(run.training["skipped_steps"])
        total = run.training["skipped_steps"][known]
        new = np.diff(total, prepend=0)
        if (new > 0).any():
            label = f"{run.name}: " if len(runs) > 1 else ""
            color = "--bad" if len(runs) == 1 else RUN_COLORS[number % MOST_RUNS]
            at = run.training.step[known][new > 0]
            text = f"{label}skipped steps ({int(total.max()):,})"
            chart.series.append(Series(text, _thinned(at), np.full(len(_thinned(at)), np.nan), color, "marks"))
    missing = sum(int((~np.isfinite(run.training["grad_norm"])).sum()) for run in runs)
    if missing:
        chart.caption = f"{chart.caption} The norm was not finite in {missing:,} records: gaps.".strip()
    return chart


def memory(runs: list[Run]) -> Chart:
    """The peak so far, and the prediction of a run on a GPU. On a CPU, the peak counts the whole process."""
    chart = simple(runs, "peak_memory_gib", "Peak memory of rank 0", "GiB", "memory", from_zero=True)
    predictions = {run.name: predicted_gib(run) for run in runs if on_gpu(run) and predicted_gib(run)}
    for number, run in enumerate(runs):
        if (gib := predictions.get(run.name)) is not None:
            label = f"{run.name}: predicted" if len(runs) > 1 else f"predicted before the run: {gib:.3g} GiB"
            color = "--soft" if len(runs) == 1 else RUN_COLORS[number % MOST_RUNS]
            chart.series.append(Series(label, [0, 1], [gib, gib], color, "level"))
    if len(runs) == 1 and chart.series and not on_gpu(runs[0]) and runs[0].description:
        of_tensors = predicted_gib(runs[0])
        more = f" The prediction, {of_tensors:.2g} GiB, is for the tensors alone." if of_tensors else ""
        chart.caption = f"On a CPU: the whole process, with Python and libraries.{more}"
    return chart


def waiting(runs: list[Run]) -> Chart:
    """The fractions of the time in which training did not compute: data, checkpoints, a slower rank."""
    chart = Chart("waiting", "Waiting", "% of the time", from_zero=True, percent=True)
    for number, run in enumerate(runs):
        training = run.training
        tokens = np.diff(training["tokens_seen"], prepend=np.nan)
        speed = training["tokens_per_second"]
        seconds = np.divide(tokens, speed, out=np.full(len(training), np.nan), where=speed > 0)
        seconds[~(seconds > 0)] = np.nan
        saving = training["save_seconds"]
        parts = {
            "for data": training["data_wait_seconds"] / seconds,
            "for checkpoints": saving / (seconds + saving),
            "for the slowest rank": training["slowest_rank_lag"],
        }
        for index, (name, values) in enumerate(parts.items()):
            if len(runs) > 1 and name != "for data":
                continue
            if np.isfinite(values).any():
                label = run.name if len(runs) > 1 else name
                color = RUN_COLORS[number % MOST_RUNS if len(runs) > 1 else index]
                width = smoothing(len(values)) if len(runs) > 1 else 1
                chart.series.append(curve(training.step, smooth(np.minimum(values, 1), width), label, color))
    if len(runs) > 1:
        chart.title, chart.caption = "Waiting for data", SMOOTH
    elif any(series.label == "for the slowest rank" for series in chart.series):
        chart.caption = "The lag of the slowest rank is an estimate."
    _note_downsampling(chart, max((len(run.training) for run in runs), default=0))
    return chart


def traces(runs: list[Run]) -> list[Chart]:
    """Where the time of a step went, by the last profiler trace of each run."""
    charts = []
    for number, run in enumerate(runs):
        found = [event for event in run.events if event["event"] == "trace" and isinstance(event.get("times"), dict)]
        for event in found[-1:]:
            times = {
                str(kind)[:40]: float(seconds)
                for kind, seconds in event["times"].items()
                if isinstance(seconds, int | float) and 0 < seconds < 1e9
            }
            bars = [(kind, 1000 * seconds) for kind, seconds in sorted(times.items(), key=lambda item: -item[1])]
            of_run = f" ({run.name})" if len(runs) > 1 else ""
            chart = Chart(f"trace-{number}", f"Where the time of a step went{of_run}", "ms", bars=bars)
            chart.caption = (
                f"Rank 0, steps {event.get('first')} to {event.get('last')}, by kind of kernel (of operator on a CPU). "
                "Kernels may run at the same time, and recording makes steps slower."
            )
            charts.append(chart)
    return charts


def simple(
    runs: list[Run], field: str, title: str, unit: str, name: str, smoothed: bool = False, **settings: Any
) -> Chart:
    """A chart of one field of the training records, a line for each run."""
    chart = Chart(name, title, unit, **settings)
    for number, run in enumerate(runs):
        if run.training.has(field):
            label = run.name if len(runs) > 1 else title.lower()
            color = RUN_COLORS[number % MOST_RUNS]
            width = smoothing(len(run.training)) if smoothed else 1
            series = curve(run.training.step, smooth(run.training[field], width), label, color)
            series.width += 2 * min(len(runs) - 1 - number, 2)  # an equal curve under a later one stays visible
            chart.series.append(series)
            if width > 1:
                chart.caption = SMOOTH
            _note_downsampling(chart, len(run.training))
    return chart


def curve(steps: Numbers, values: Numbers, label: str, color: str, kind: Kind = "line") -> Series:
    """A curve of at most MOST_POINTS points. A longer one becomes means of groups, in a band of their extremes."""
    if len(steps) <= MOST_POINTS:
        return Series(label, steps, values, color, kind)
    edges = np.linspace(0, len(steps), MOST_POINTS + 1).astype(int)
    finite, ones = np.nan_to_num(values), np.isfinite(values)
    counts = np.add.reduceat(ones, edges[:-1])
    with np.errstate(invalid="ignore", divide="ignore"):
        means = np.add.reduceat(finite, edges[:-1]) / counts
    low = np.minimum.reduceat(np.where(ones, values, np.inf), edges[:-1])
    high = np.maximum.reduceat(np.where(ones, values, -np.inf), edges[:-1])
    low, high = np.where(counts > 0, low, np.nan), np.where(counts > 0, high, np.nan)
    return Series(label, steps[(edges[:-1] + edges[1:] - 1) // 2], means, color, kind, low=low, high=high)


def smoothing(records: int) -> int:
    """How many records a smoothed curve averages over."""
    return max(3, records // SMOOTHED) if records >= FEWEST else 1


def smooth(values: Numbers, width: int) -> Numbers:
    """The mean over `width` records around each, of those that are finite. NaN where it is not finite itself."""
    if width == 1:
        return values
    ones = np.isfinite(values)
    half = width // 2
    padded = np.pad(np.c_[np.nan_to_num(values), ones], ((half + 1, half), (0, 0)))
    sums = padded.cumsum(axis=0)
    window = sums[2 * half + 1 :] - sums[: -2 * half - 1]
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(ones, window[:, 0] / window[:, 1], np.nan)


def predicted_gib(run: Run) -> float | None:
    """The predicted memory of a rank in GiB, from the start block (estimate/stages.py)."""
    words = run.description.get("memory", "").split()
    units = {"bytes": 2.0**-30, "KiB": 2.0**-20, "MiB": 2.0**-10, "GiB": 1.0, "TiB": 2.0**10}
    if len(words) < 3 or words[0] != "predicted" or words[2].rstrip(",:") not in units:
        return None
    try:
        return float(words[1].replace(",", "")) * units[words[2].rstrip(",:")]
    except ValueError:
        return None


def on_gpu(run: Run) -> bool:
    """Whether the run was on GPUs, by its start block."""
    ranks = run.description.get("ranks", "")
    return bool(ranks) and " on CPU" not in ranks


def _losses(run: Run) -> list[str]:
    names = [name for name in run.evaluations.values if name.startswith("eval_") and name.endswith("_loss")]
    return sorted(name for name in names if run.evaluations.has(name))


def _note_downsampling(chart: Chart, records: int) -> None:
    text = f"{records:,} records, drawn as {MOST_POINTS} groups: the line is their mean, the shade their range."
    if records > MOST_POINTS and text not in chart.caption:
        chart.caption = f"{chart.caption} {text}".strip()


def _thinned(steps: Numbers) -> Numbers:
    """At most MOST_POINTS of these steps, evenly chosen."""
    return steps[np.linspace(0, len(steps) - 1, min(len(steps), MOST_POINTS)).astype(int)]
