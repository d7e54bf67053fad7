"""Documents are tokenized and packed once, and kept in `data_cache_dir`. This may be done ahead, on a host without GPU:

python -m data.prepare OPTIONS          the options of train.py
"""

import hashlib
import json
import sys
from dataclasses import dataclass
from itertools import groupby, islice

import transformers
from transformers import PreTrainedTokenizerBase

from config.checks import check_data
from config.command_line import parse
from config.errors import OptionError
from config.options import Options
from data.cache import Prepared, cache_key, prepare_source
from data.packing import Packing
from data.records import read
from data.sequences import Mixture, PreparedDataset, Split, total
from data.sources import Source, cache_directory, find_sources
from data.stream import StreamingDataset
from data.tokens import Rendering, detect_shape
from model.build import load_config_and_tokenizer

GREEN, GRAY, PLAIN = "\033[32m", "\033[90m", "\033[0m"  # of a terminal

DEFAULT_PACKING = {"text": "concat", "preference": "pairs"}  # by the shape of the records; else documents


@dataclass(frozen=True)
class Data:
    """Training and validation rows, with their counts and a fingerprint (SHA-256) of all their tokens."""

    source: str
    tokenizer: str
    fingerprint: str
    packing: str
    stop_tokens: list[int]  # the special tokens with which documents end, as far as they are learned; at most two
    train: "PreparedDataset | Mixture | StreamingDataset"
    validation: PreparedDataset | Mixture | None
    counts: dict[str, Split]


def prepare_data(options: Options, tokenizer: PreTrainedTokenizerBase) -> Data:
    """The rows that `options` ask for, from the cache or made now. Raises OptionError.

    Every rank may call this before there is a process group: the first one to come prepares, the others wait for its
    lock, as long as that takes, and read what it wrote.
    """
    assert options.block_size
    block_size, cache, workers = (
        options.block_size,
        cache_directory(options.data_cache_dir),
        options.preprocessing_num_workers,
    )

    def rendering_of(source: Source) -> Rendering:
        first = next(read(source), None)
        shape = detect_shape(source, first, options.data_format, options.objective, options.text_column)
        return Rendering(shape, options.text_column, block_size, options.max_targetless_fraction, tokenizer)

    sources, held_out = find_sources(options)
    renderings = [rendering_of(source) for source in sources]
    kinds = {options.packing or DEFAULT_PACKING.get(rendering.shape, "documents") for rendering in renderings}
    if len(kinds) > 1:
        raise OptionError("train_mixture: conversations and texts would be packed in different ways; pass --packing")
    packing = Packing(kinds.pop(), block_size)
    name = options.tokenizer_name or tokenizer.name_or_path or "embedded"
    name = f"{type(tokenizer).__name__} of {len(tokenizer):,} tokens, {name}"
    if options.streaming:
        validation = prepare_source(held_out, rendering_of(held_out), packing, 0, cache, workers) if held_out else None
        return _stream(name, sources[0], renderings[0], packing, options.seed, validation)
    percentage = 0 if held_out else options.validation_split_percentage
    training = [
        prepare_source(source, rendering, packing, percentage, cache, workers)
        for source, rendering in zip(sources, renderings, strict=True)
    ]
    validation = prepare_source(held_out, rendering_of(held_out), packing, 0, cache, workers) if held_out else None
    return _read_prepared(name, sources, packing, training, validation)


def tokens_per_sequence(data: Data, block_size: int) -> int:
    """The slots of a row: a pair has two sequences."""
    return block_size * (2 if data.packing == "pairs" else 1)


def describe_data(data: Data, block_size: int) -> dict[str, str]:
    """What was prepared, for the start block and for data/prepare.py."""
    held_out = data.counts.get("validation")
    validation = f"{held_out.documents:,} documents, {held_out.rows:,} rows" if held_out else "none"
    if "train" not in data.counts:
        rows = f"of up to {block_size} tokens, packing {data.packing}"
        return {"tokenizer": data.tokenizer, "data": data.source, "rows": rows, "validation": validation}
    train, slots = data.counts["train"], tokens_per_sequence(data, block_size)
    lines = {
        "tokenizer": data.tokenizer,
        "data": f"{data.source}: {train.documents:,} documents ({train.shape}), {train.tokens:,} tokens, "
        f"{train.trained_tokens / train.tokens:.1%} of them learned",
        "left out": f"{train.empty_documents} empty documents, {train.targetless_documents} with nothing to learn, "
        f"what {train.cut_documents} documents had beyond a row, {train.dropped_tokens} tokens of a last partial row",
        "rows": f"{train.rows:,} of {slots} tokens, packing {data.packing}, "
        f"{train.filled(slots):.2%} of their slots used",
        "validation": validation,
    }
    if len(data.train.sources) > 1:
        drawn = [f"{quota:,} from {rows:,} rows" for rows, quota in data.train.sources]
        lines["mixture"] = f"an epoch draws {', '.join(drawn)}"
    return lines


def show_examples(
    rows: PreparedDataset | Mixture | StreamingDataset, number: int, tokenizer: PreTrainedTokenizerBase
) -> str:
    """The first rows as text: learned tokens in green, given ones in gray, and a line between rows and documents."""
    lines = []
    for row in islice(iter(rows), number):
        lines.append(f"--- row {row.number}: {len(row.tokens)} tokens, {int(row.trained_on.sum())} of them learned ---")
        start = 0
        for length in row.segment_lengths:
            piece = zip(
                row.tokens[start : start + length].tolist(),
                row.trained_on[start : start + length].tolist(),
                strict=True,
            )
            runs = [(learned, [token for token, _ in run]) for learned, run in groupby(piece, key=lambda pair: pair[1])]
            lines.append("".join((GREEN if learned else GRAY) + tokenizer.decode(ids) + PLAIN for learned, ids in runs))
            start += length
    return "\n".join([*lines, f"--- {GREEN}learned{PLAIN}, {GRAY}given{PLAIN} ---"])


def main(argv: list[str]) -> None:
    """Prepare, and print what there is. Raises OptionError."""
    transformers.utils.logging.set_verbosity_error()
    options = parse(argv)
    check_data(options)
    data = prepare_data(options, load_config_and_tokenizer(options)[1])
    assert options.block_size
    print("\n".join(f"{key:<13} {value}" for key, value in describe_data(data, options.block_size).items()))


def _stream(
    tokenizer: str, source: Source, rendering: Rendering, packing: Packing, seed: int, held_out: Prepared | None
) -> Data:
    """Training rows that are made while they are learned from, and validation rows that are prepared."""
    keys = [cache_key(source, rendering, packing, percentage=0)] + ([held_out.fingerprint] if held_out else [])
    return Data(
        source=f"{source.name}, streamed",
        tokenizer=tokenizer,
        fingerprint=hashlib.sha256(json.dumps(keys).encode()).hexdigest(),
        packing=packing.kind,
        stop_tokens=[rendering.tokenizer.eos_token_id] if rendering.shape == "text" else [],
        train=StreamingDataset(source, rendering, packing, seed),
        validation=PreparedDataset(held_out.folder / "train", packing.padded_length) if held_out else None,
        counts={"validation": held_out.counts["train"]} if held_out else {},
    )


def _read_prepared(
    tokenizer: str, sources: list[Source], packing: Packing, training: list[Prepared], held_out: Prepared | None
) -> Data:
    """Training and validation rows that are on the disk. Without `held_out`, the sources' own last rows validate."""
    weights = [source.weight for source in sources]
    fingerprints = [part.fingerprint for part in training] + ([held_out.fingerprint] if held_out else [])
    train = [PreparedDataset(part.folder / "train", packing.padded_length) for part in training]
    counts = {"train": total([part.counts["train"] for part in training])}
    validation: list[PreparedDataset] = []
    if held_out:
        validation = [PreparedDataset(held_out.folder / "train", packing.padded_length)]
        counts["validation"] = held_out.counts["train"]
    elif "validation" in training[0].counts:
        validation = [PreparedDataset(part.folder / "validation", packing.padded_length) for part in training]
        counts["validation"] = total([part.counts["validation"] for part in training])
    return Data(
        source=", ".join(source.name for source in sources),
        tokenizer=tokenizer,
        fingerprint=hashlib.sha256(json.dumps([weights, fingerprints]).encode()).hexdigest(),
        packing=packing.kind,
        stop_tokens=sorted({token for part in training for token in part.stop_tokens}),
        train=train[0] if len(train) == 1 else Mixture(train, weights),
        validation=None if not validation else validation[0] if len(validation) == 1 else Mixture(validation),
        counts=counts,
    )


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except OptionError as error:
        print(f"data.prepare: error: {error}", file=sys.stderr)
        sys.exit(2)
