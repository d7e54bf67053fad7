"""The timeline of one optimizer step on two ranks, from a trace of train.py.

--trace_steps traces rank 0. Here rank 1 traces, too. The clocks of both are those of one machine.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from transformers import Qwen3Config

import metrics.recorder
from metrics.trace import COLLECTIVES, Trace
from tests import world
from tests.drawings.svg import MARGIN, SIZE, WIDTH, Drawing, width_of
from tests.launch import train

STEPS = Path(__file__).parent / "steps.json"  # the recorded steps, of which the pictures are drawn
RANKS, TRACED = 2, 8
LAYERS = 4
PAUSE = 11_000  # microseconds without an operator that are a gap; shorter ones are those of Python and a busy CPU
ROUNDING = 1  # digits of a millisecond

LANES = {
    "forward": "blue",
    "backward": "orange",
    "update": "green",
    "all_gather": "purple",
    "reduce_scatter": "red",
    "all_reduce": "teal",
}
HEIGHT = 20  # of a box
TICKS = (50, 100, 200, 500, 1000, 2000)  # milliseconds between two marks of the time axis, at most MARKS of them
MARKS = 12


@dataclass
class Span:
    """Work of a rank from `start` to `end`, in milliseconds since the first rank began the step."""

    lane: str  # forward, backward or update; or the kind of a collective
    label: str  # of a collective: which tensors
    start: float
    end: float


def record(strategy: str, directory: Path) -> list[list[dict[str, Any]]]:
    """Train a model of 4 layers on two ranks. Returns the spans of each rank in the fastest of the traced steps."""
    tokenizer, model = directory / "tokenizer", directory / "model"
    if not model.exists():
        world.make_model(tokenizer)
        world.make_train_file(directory / "text.jsonl")
        make_larger_model(model, tokenizer)
    output_dir = directory / strategy
    words = [*world.options(model, directory / "text.jsonl", directory / "cache"), "--strategy", strategy]
    words += ["--output_dir", output_dir, "--max_steps", 3 + TRACED, "--trace_steps", TRACED, "--global_batch_size", 8]
    words += ["--logging_steps", 100, "--save_steps", 0, "--validation_split_percentage", 0]
    outcome = train(RANKS, words, before=trace_all_ranks)
    assert outcome.exit_codes == [0] * RANKS, outcome.output
    traces = []
    for rank in range(RANKS):
        (path,) = (output_dir / f"rank-{rank}" / "trace").glob("*.json")
        traces.append(json.loads(path.read_text()))
    steps = [[read_step(trace, number) for trace in traces] for number in range(TRACED)]
    fastest = min(steps, key=lambda ranks: max(span.end for spans in ranks for span in spans) - begin(ranks))
    first = begin(fastest)
    for span in (span for spans in fastest for span in spans):
        span.start, span.end = round(span.start - first, ROUNDING), round(span.end - first, ROUNDING)
    return [[asdict(span) for span in spans] for spans in fastest]


def make_larger_model(path: Path, tokenizer: Path) -> None:
    """A Qwen3 of 4 layers with 19 MB of gradients each, so DDP has several buckets (25 MiB)."""
    sizes = {"hidden_size": 640, "intermediate_size": 1792, "num_hidden_layers": LAYERS, "head_dim": 64}
    heads = {"num_attention_heads": 10, "num_key_value_heads": 5}
    world.make_family(
        Qwen3Config(vocab_size=world.VOCABULARY, tie_word_embeddings=True, eos_token_id=0, **sizes, **heads),
        path,
        tokenizer,
    )


def trace_all_ranks() -> None:
    """In each process: give each rank a trace of its own."""
    start = metrics.recorder.Recorder.start

    def start_with_trace(self: metrics.recorder.Recorder, *arguments: Any) -> None:
        directory = self.path.parent / f"rank-{dist.get_rank()}"
        directory.mkdir()
        self.trace = Trace(TRACED, directory, self.failures)
        start(self, *arguments)

    metrics.recorder.Recorder.start = start_with_trace  # type: ignore[assignment, method-assign]


def begin(ranks: list[list[Span]]) -> float:
    return min(span.start for spans in ranks for span in spans)


def read_step(trace: dict[str, Any], number: int) -> list[Span]:
    """The spans of one rank in traced step `number`, in milliseconds since 1970."""
    events = sorted((event for event in trace["traceEvents"] if event.get("ph") == "X"), key=lambda e: e["ts"])
    step = [event for event in events if event["name"].startswith("ProfilerStep#")][number]
    events = [e for e in events if step["ts"] <= e["ts"] < step["ts"] + step["dur"] and e["name"] != step["name"]]
    own = [event for event in events if event["tid"] == step["tid"]]
    forward = next(e["ts"] for e in own if e["name"] in ("DistributedDataParallel.forward", "FSDP::root_pre_forward"))
    ops = [e for e in own if e["name"].startswith("autograd::engine::evaluate_function")]
    backward, end = ops[0]["ts"], max(event["ts"] + event["dur"] for event in ops)

    def lane(time: float) -> str:
        return "forward" if time < backward else "backward" if time < end else "update"

    collectives: list[Span] = []
    called = [event for event in own if event["name"] in COLLECTIVES]
    done = [event for event in events if event["name"].startswith("gloo:")]
    buckets = 0
    for call, work in zip(called, done, strict=True):  # gloo starts them in the order of the calls
        kind = COLLECTIVES[call["name"]]
        units = [e["name"] for e in own if e["name"].startswith("FSDP::") and encloses(e, call)]
        if call["ts"] < forward:
            label = "counts"
        elif units:
            label = units[-1].split("layers.")[1].rstrip(")") if "layers." in units[-1] else "root"
        elif lane(call["ts"]) == "update":
            label = "norm"
        else:
            buckets += 1
            label = f"bucket {buckets}"
        collectives.append(Span(kind, label, work["ts"], work["ts"] + work["dur"]))
    # The backward pass has ended when its last collective has.
    end = max([end, *(span.end for span in collectives if span.label not in ("counts", "norm"))])
    spans: list[Span] = []
    for event in leaves([event for event in own if event["cat"] == "cpu_op"]):
        if event["ts"] < forward or event["name"] in COLLECTIVES:
            continue
        start, stop, name = event["ts"], event["ts"] + event["dur"], lane(event["ts"])
        if spans and spans[-1].lane == name and start - spans[-1].end < PAUSE:
            spans[-1].end = stop
        else:
            spans.append(Span(name, "", start, stop))
    since = trace["baseTimeNanoseconds"] / 1e6
    return [
        Span(span.lane, span.label, span.start / 1e3 + since, span.end / 1e3 + since) for span in spans + collectives
    ]


def encloses(outer: dict[str, Any], inner: dict[str, Any]) -> bool:
    return bool(outer["ts"] <= inner["ts"] and inner["ts"] + inner["dur"] <= outer["ts"] + outer["dur"])


def leaves(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The events of a thread that enclose no other: they compute, and the others call them."""
    return [
        event
        for event, following in zip(events, [*events[1:], None], strict=True)
        if not following or not encloses(event, following)
    ]


def draw_step(strategy: str, title: str, description: str, note: str) -> str:
    """The picture of the recorded step of `strategy`, with a `note` below it."""
    recorded = json.loads(STEPS.read_text())[strategy]
    ranks = [[Span(**span) for span in spans] for spans in recorded]
    end = max(span.end for spans in ranks for span in spans)
    used = {span.lane for spans in ranks for span in spans}
    lanes = [lane for lane in LANES if lane in used]
    left = MARGIN + max(width_of(words(lane)) for lane in lanes) + 12
    scale = (WIDTH - MARGIN - left) / end
    drawing = Drawing(title, description)
    y = MARGIN + SIZE
    drawing.text(MARGIN, y, title, "bold")
    for rank, spans in enumerate(ranks):
        y += 28
        drawing.text(MARGIN, y, f"rank {rank}", "bold")
        y += 8
        for lane in lanes:
            labeled = any(span.label for span in spans if span.lane == lane)
            y += SIZE + 4 if labeled else 4
            drawing.text(MARGIN, y + HEIGHT / 2 + SIZE * 0.35, words(lane))
            drawing.box(left, y, WIDTH - MARGIN - left, HEIGHT, "lane")
            free = left - 20  # where the next label may begin
            for span in (span for span in spans if span.lane == lane):
                start, width = left + scale * span.start, max(1.5, scale * (span.end - span.start))
                drawing.box(start, y, width, HEIGHT, LANES[lane])
                if span.label:
                    half = width_of(span.label) / 2
                    middle = min(max(start + width / 2, free + half), WIDTH - 4 - half)
                    drawing.text(middle, y - 3, span.label, "soft", anchor="middle")
                    free = middle + half + 4
            y += HEIGHT
    y += 10
    tick = next(tick for tick in TICKS if end / tick <= MARKS)
    for time in range(0, int(end) + 1, tick):
        x = left + scale * time
        drawing.line(x, y, x, y + 5)
        drawing.text(x, y + 6 + SIZE, f"{time} ms" if time == 0 else str(time), "soft", anchor="middle")
    drawing.line(left, y, WIDTH - MARGIN, y)
    drawing.text(MARGIN, drawing.bottom + SIZE + 6, note, "soft")
    return drawing.svg()


def words(lane: str) -> str:
    """A lane as documents write it: all-gather."""
    return lane.replace("_", "-")
