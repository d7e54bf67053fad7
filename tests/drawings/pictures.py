"""The pictures of the book, by the names of their files. Each returns an SVG."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from transformers import Qwen3Config
from transformers.masking_utils import create_causal_mask

from checkpoint.files import FOLDERS, MANIFEST, STATE
from config.options import Options
from config.plan import data_parallel_rank_and_size, mesh_shape
from data.batches import IGNORE_INDEX, Batch, collate, next_tokens
from data.sequences import Sequence
from tests.drawings.steps import draw_step
from tests.drawings.svg import MARGIN, SIZE, WIDTH, Drawing, width_of

LINE = SIZE + 5  # from one line of text to the next

# Whether a rank holds all of it during the backward pass (else its shard): parameters, gradients, optimizer states.
STAGES = {
    "DDP": (True, True, True),
    "ZeRO-1": (True, True, False),
    "ZeRO-2": (True, False, False),
    "ZeRO-3, FSDP": (False, False, False),
}
# The options that choose each stage.
STAGE_OPTIONS: dict[str, dict[str, object]] = {
    "DDP": {},
    "ZeRO-1": {"shard_optimizer": True},
    "ZeRO-2": {"strategy": "fsdp", "reshard_after_forward": False},
    "ZeRO-3, FSDP": {"strategy": "fsdp"},
}
KINDS = {"parameters": "blue", "gradients": "orange", "optimizer states": "green"}


def shards(ranks: int = 4) -> str:
    """Rows are stages, columns are ranks. Each bar has as many parts as there are ranks."""
    drawing = Drawing(
        "Which rank holds which shard, during the backward pass",
        "With DDP, each of 4 ranks holds all parameters, gradients and optimizer states. ZeRO-1 shards the optimizer "
        "states, ZeRO-2 also the gradients, ZeRO-3 or FSDP also the parameters: rank n then holds quarter n.",
    )
    y = MARGIN + SIZE
    drawing.text(MARGIN, y, drawing.title, "bold")
    left = MARGIN + max(map(width_of, KINDS)) + 16
    column = (WIDTH - MARGIN - left) / ranks
    bar = column - 16
    y += 2 * LINE
    for rank in range(ranks):
        drawing.text(left + rank * column + bar / 2, y, f"rank {rank}", anchor="middle")
    for stage, held in STAGES.items():
        y += LINE
        drawing.text(MARGIN, y, stage, "bold")
        y += 8
        for (kind, color), everything in zip(KINDS.items(), held, strict=True):
            drawing.text(MARGIN, y + SIZE, kind, "soft")
            for rank in range(ranks):
                for shard in range(ranks):
                    x = left + rank * column + shard * bar / ranks
                    drawing.box(x, y, bar / ranks - 2, SIZE + 3, color if everything or shard == rank else "lane")
            y += LINE + 2
    y += LINE
    drawing.legend(MARGIN, y, {**{color: kind for kind, color in KINDS.items()}, "lane": "held by another rank"})
    y += LINE + 4
    drawing.text(
        MARGIN, y, "ZeRO-3 also holds the full parameters of one or two layers, while it computes them.", "soft"
    )
    return drawing.svg()


def rank_grid(world_size: int = 8, tensor_parallel: int = 2) -> str:
    """A column is a data-parallel rank, a row is a fraction of each layer."""
    options = Options(strategy="fsdp", tensor_parallel=tensor_parallel)
    grid = torch.arange(world_size).view(mesh_shape(options, world_size))[0]  # [shard, tensor], as init_device_mesh
    groups, splits = grid.shape
    drawing = Drawing(
        f"{world_size} ranks: {groups} data-parallel x {splits} tensor-parallel",
        f"A grid of {groups} columns with {splits} ranks each. The ranks of a column have consecutive numbers, read "
        "the same sequences, and split each layer. The ranks of a row hold the same fraction of each layer, read "
        "different sequences, and shard this fraction.",
    )
    y = MARGIN + SIZE
    drawing.text(MARGIN, y, drawing.title, "bold")
    rows = [f"fraction {split + 1} of {splits}" for split in range(splits)]
    left = MARGIN + max(map(width_of, [*rows, "of each layer"])) + 12
    column, height = (WIDTH - MARGIN - left) / groups, 40
    top = y + LINE
    for group in range(groups):
        number, size = data_parallel_rank_and_size(options, int(grid[group, 0]), world_size)
        x, y = left + group * column, top
        drawing.box(x, y, column - 14, 2 * LINE + splits * (height + 10) + 12, "lane")
        middle = x + (column - 14) / 2
        drawing.text(middle, y + LINE, f"data-parallel rank {number}", anchor="middle")
        first = ", ".join(str(number + size * step) for step in range(2))
        drawing.text(middle, y + 2 * LINE, f"sequences {first}, ...", "soft", anchor="middle")
        y += 2 * LINE + 12
        for split in range(splits):
            rank = int(grid[group, split])
            assert data_parallel_rank_and_size(options, rank, world_size) == (number, size)
            drawing.box(x + 10, y, column - 34, height, ("blue", "orange")[split % 2], f"rank {rank}")
            if group == 0:
                drawing.text(MARGIN, y + height / 2 - 2, rows[split])
                drawing.text(MARGIN, y + height / 2 + LINE - 4, "of each layer", "soft")
            y += height + 10
    y += LINE + 8
    drawing.text(MARGIN, y, "In a column (tensor-parallel group): hidden states are communicated, in each layer.")
    y += LINE
    drawing.text(MARGIN, y, "In a row (FSDP): parameters are all-gathered, gradients are reduce-scattered.")
    return drawing.svg()


DOCUMENTS = {"a": 6, "b": 4, "c": 3}  # the names and the tokens of three documents
PACKED_LENGTH = 16


def packed_batch() -> tuple[list[str], Batch, Tensor]:
    """The names of the tokens in a packed sequence, its batch, and its mask [T, T]: which keys a query sees."""
    names = [f"{document}{number}" for document, length in DOCUMENTS.items() for number in range(1, length + 1)]
    tokens = torch.arange(1, len(names) + 1)
    sequence = Sequence(0, tokens, torch.ones_like(tokens, dtype=torch.bool), list(DOCUMENTS.values()))
    batch = collate([sequence], PACKED_LENGTH)
    config = Qwen3Config(attn_implementation="sdpa")
    positions_BT = batch["position_ids"]
    mask: Tensor | None = create_causal_mask(config, torch.zeros(1, PACKED_LENGTH, 1), None, None, positions_BT)
    assert mask is not None
    return names, batch, mask[0, 0]


def packed_sequence() -> str:
    """Columns are positions. The rows of the mask are queries."""
    names, batch, mask = packed_batch()
    drawing = Drawing(
        "Three documents in one sequence",
        "A sequence of 16 positions has documents a (6 tokens), b (4 tokens) and c (3 tokens), and 3 positions of "
        "padding. Positions restart at each document. The last token of a document has no target. The mask has a "
        "triangle for each document: a token sees itself and the tokens before it in its own document.",
    )
    names = names + ["pad"] * (PACKED_LENGTH - len(names))
    colors = [dict(zip(DOCUMENTS, ("blue", "orange", "green"), strict=True)).get(name[0], "gray") for name in names]

    def named(labels: Tensor) -> list[str]:
        return ["" if label == IGNORE_INDEX else names[label - 1] for label in labels.tolist()]

    labels_BT = batch["labels"]
    lines = {
        "token": names,
        "position": [str(position) for position in batch["position_ids"][0].tolist()],
        "label": named(labels_BT[0]),
        "target": named(next_tokens(labels_BT)[0]),
    }
    y = MARGIN + SIZE
    drawing.text(MARGIN, y, drawing.title, "bold")
    left = MARGIN + width_of("query a1 sees") + 8
    cell, height = (WIDTH - MARGIN - left) / PACKED_LENGTH, SIZE + 5
    y += 14
    for line, values in lines.items():
        drawing.text(MARGIN, y + SIZE, line)
        for index, value in enumerate(values):
            drawing.box(left + index * cell, y, cell - 2, height, colors[index] if value else "lane", value or "-100")
        y += height + 4
    y += LINE + 6
    drawing.text(MARGIN, y, "The mask: the token of each row (query) sees the tokens of the filled columns.", "soft")
    y += 10
    for query, sees in enumerate(mask.tolist()):
        drawing.text(left - 12, y + SIZE - 1, names[query], anchor="end")
        for key, seen in enumerate(sees):
            drawing.box(left + key * cell, y, cell - 2, height - 3, colors[query] if seen else "lane")
        y += height - 1
    return drawing.svg()


SAVING = ".saving-*"
WHOLE = [STATE, *FOLDERS, MANIFEST]
OLD, NEW = "checkpoint-2", "checkpoint-4"
# Each moment of a save at step 4, with save_total_limit 1: the directories on the disk with their files, and the
# checkpoint from which a run that is killed then resumes.
MOMENTS: dict[str, tuple[dict[str, list[str]], str]] = {
    "1. directory": ({OLD: WHOLE, SAVING: []}, OLD),
    "2. files": ({OLD: WHOLE, SAVING: [STATE, *FOLDERS]}, OLD),
    "3. manifest": ({OLD: WHOLE, SAVING: WHOLE}, OLD),
    "4. rename": ({OLD: WHOLE, NEW: WHOLE}, NEW),
    "5. unmark old": ({OLD: [STATE, *FOLDERS], NEW: WHOLE}, NEW),
    "6. remove old": ({NEW: WHOLE}, NEW),
}


def checkpoint_life() -> str:
    """Columns are moments, from left to right."""
    drawing = Drawing(
        "The life of a checkpoint: a save at step 4, with --save_total_limit 1",
        "A save at step 4 in six moments. The temporary directory .saving-* is made, filled with files, and gets a "
        "manifest; then it is renamed to checkpoint-4; then checkpoint-2 loses its manifest and its files. A run that "
        "is killed before the rename continues from checkpoint-2, and after it from checkpoint-4.",
    )
    y = MARGIN + SIZE
    drawing.text(MARGIN, y, drawing.title, "bold")
    y += LINE + 4
    drawing.text(
        MARGIN, y, "A column shows the disk after a moment of the save. A run that is killed then finds it so.", "soft"
    )
    gap = 8
    column = (WIDTH - 2 * MARGIN + gap) / len(MOMENTS)
    slots = {OLD: 0, SAVING: 1, NEW: 1}  # a rename keeps the place
    height = (len(WHOLE) + 1) * LINE + 10
    y += 2 * LINE
    for number, (moment, (directories, resumed)) in enumerate(MOMENTS.items()):
        x = MARGIN + number * column
        drawing.text(x, y, moment, "bold")
        for name, files in directories.items():
            top = y + 10 + slots[name] * (height + 8)
            drawing.box(x, top, column - gap, height, "green" if MANIFEST in files and name != SAVING else "gray")
            drawing.text(x + 6, top + LINE, f"{name}/")
            for line, file in enumerate(file for file in WHOLE if file in files):
                drawing.text(x + 18, top + (line + 2) * LINE, f"{file}/" if file in FOLDERS else file)
        bottom = y + 10 + 2 * (height + 8) + LINE
        drawing.text(x, bottom, "resumes from", "soft")
        drawing.text(x, bottom + LINE, resumed)
    drawing.legend(
        MARGIN,
        drawing.bottom + LINE + 8,
        {"green": "a checkpoint", "gray": "no checkpoint; removed when the run resumes"},
    )
    return drawing.svg()


PICTURES: dict[str, Callable[[], str]] = {
    "step-ddp": partial(
        draw_step,
        "ddp",
        "One optimizer step with DDP on two ranks, traced on a CPU",
        "Two ranks compute forward, backward and update. DDP all-reduces the gradients in four buckets. The first ones "
        "overlap with the rest of the backward pass. The last one ends after it, and the update waits for it.",
        "A gap in a lane: the rank waits, for a collective or for a CPU core. Counts: the targets of both ranks.",
    ),
    "step-fsdp": partial(
        draw_step,
        "fsdp",
        "One optimizer step with FSDP on two ranks, traced on a CPU",
        "Two ranks compute forward, backward and update. FSDP all-gathers the parameters of the root and of layers 0 "
        "to 3 before the forward pass of each, and again of layers 3 to 0 in the backward pass. It reduce-scatters the "
        "gradients of each layer after the backward pass of the layer. An all-reduce sums the gradient norm.",
        "0 to 3: decoder layers. Root: embedding, last norm and head. In a gap, the rank waits.",
    ),
    "shards": shards,
    "rank-grid": rank_grid,
    "packed-sequence": packed_sequence,
    "checkpoint-life": checkpoint_life,
}
