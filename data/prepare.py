"""Prepare data: find it, tokenize and pack it once, and keep the sequences in `data_cache_dir`.

    python -m data.prepare OPTIONS

The command takes the options of train.py. It prepares data ahead of a run, on a machine that needs no GPU.
"""

import hashlib
import json
import os
import sys
from collections import Counter
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby, islice

import transformers
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from chat.messages import brief
from chat.template import DATE, check_variables, names_in
from config.checks import check_data
from config.command_line import parse
from config.errors import OptionError
from config.options import Options
from config.prompts import read_prompts
from config.validation import check_validation
from data.cache import Prepared, cache_key, prepare_source
from data.packing import Packing
from data.records import RawRecord, Source, read
from data.sequences import Mixture, PreparedDataset, Split, total
from data.sources import cache_directory, find_sources
from data.stream import StreamingDataset, Text
from data.tokens import Prompt, Rendering, detect_shape, encode_prompt, encoder, stop_tokens
from model.build import load_config_and_tokenizer
from model.documents.trial import document_obstacle

GREEN, GRAY, PLAIN = "\033[32m", "\033[90m", "\033[0m"  # of a terminal

DEFAULT_PACKING = {"text": "concat", "preference": "pairs"}  # by the shape of the records; for other shapes, documents


@dataclass(frozen=True)
class Data:
    """Training and validation sequences, with counts for each split and a fingerprint (SHA-256) of all tokens.

    The fingerprint of a stream covers the names, sizes and times of its files instead.
    """

    source: str
    tokenizer: str
    fingerprint: str
    packing: str
    stop_tokens: list[int]  # special tokens that end documents and turns, and are trained on
    unused: dict[str, int]  # columns that hold something but are not used, and in how many records
    train: PreparedDataset | Mixture | StreamingDataset
    validation: dict[str, PreparedDataset | Mixture]  # by the start of the names of its metrics: eval, or eval_NAME
    counts: dict[str, Split]  # of train, and of all validation sets together
    prompts: tuple[Prompt, ...] = ()  # to complete at each evaluation
    last_prompt: Prompt | None = None  # to complete when training has ended

    @property
    def evaluated(self) -> bool:
        """Whether an evaluation has anything to do."""
        return bool(self.validation or self.prompts)


def prepare_data(
    options: Options, tokenizer: PreTrainedTokenizerBase, model_config: PretrainedConfig | None = None
) -> Data:
    """The sequences that `options` ask for, from the cache or made now. Raises OptionError.

    Documents are packed only for a model in which they stay apart, by the trial in model/documents/trial.py. Without
    `model_config`, the caller answers for that.
    Every rank calls this before a process group exists. The first rank takes a file lock and prepares. The others
    wait for the lock without a time limit, and then read what it wrote.
    """
    assert options.block_size
    block_size = options.block_size

    variables = check_variables(tokenizer, options.chat_template_kwargs) if options.chat_template_kwargs else {}
    firsts: dict[str, RawRecord | None] = {}

    def rendering_of(source: Source) -> Rendering:
        first = firsts[source.name] = next(read(source), None)
        shape = detect_shape(source, first, options.data_format, options.objective, options.text_column)
        fraction, last_turn = options.max_targetless_fraction, options.train_on_last_turn
        return Rendering(shape, options.text_column, block_size, fraction, tokenizer, last_turn, variables)

    sources, held_out = find_sources(options)
    renderings = [rendering_of(source) for source in sources]
    _report_template(renderings)
    kinds = {options.packing or DEFAULT_PACKING.get(rendering.shape, "documents") for rendering in renderings}
    if len(kinds) > 1:
        raise OptionError("train_mixture: conversations and texts have different defaults of packing; pass --packing")
    packing = Packing(_packing_for_model(options, kinds.pop(), model_config), block_size)
    name = options.tokenizer_name or tokenizer.name_or_path or "embedded"
    name = f"{type(tokenizer).__name__} of {len(tokenizer):,} tokens, {name}"
    cache = cache_directory(options.data_cache_dir)
    prepare = partial(prepare_source, packing=packing, cache=cache, workers=options.preprocessing_num_workers)
    percentage = 0 if held_out else options.validation_split_percentage
    to_prepare = [] if options.streaming else zip(sources, renderings, strict=True)
    training = [prepare(source, rendering, percentage=percentage) for source, rendering in to_prepare]
    validation = {name: prepare(source, rendering_of(source), percentage=0) for name, source in held_out.items()}
    check_validation(options, exists=bool(validation or (percentage and training)))
    stops = {
        stop for source, one in zip(sources, renderings, strict=True) for stop in stop_tokens(one, firsts[source.name])
    }
    if options.streaming:
        texts = [Text(source, one, source.weight or 1) for source, one in zip(sources, renderings, strict=True)]
        data = _stream(name, texts, packing, options.seed, validation)
    else:
        data = _read_prepared(name, sources, packing, training, validation)
    stops.update(data.stop_tokens)
    if not stops and os.environ.get("RANK", "0") == "0":
        print(
            f"chat_template: no special token ends a turn, so the finished model stops at {tokenizer.eos_token} only\n"
            "pass a --chat_template that ends a turn with a special token; see "
            "docs/troubleshooting.md#gibberish-after-fine-tuning",
            file=sys.stderr,
        )
    number = next((index for index, rendering in enumerate(renderings) if rendering.shape != "text"), 0)
    # In a mixture, a prompt is encoded as its first conversations are.
    encode = partial(_prompts, rendering=renderings[number], first=firsts[sources[number].name])
    sampled = (
        encode("sample_prompts", read_prompts(options.sample_prompts)) if options.sample_prompts is not None else ()
    )
    last = encode("prompt", [options.prompt])[0] if options.prompt else None
    return replace(data, stop_tokens=sorted(stops), prompts=sampled, last_prompt=last)


def _prompts(option: str, texts: list[str], rendering: Rendering, first: RawRecord | None) -> tuple[Prompt, ...]:
    """The prompts of an option. Half of a sequence is left for what the model writes. Raises OptionError."""
    prompts = tuple(encode_prompt(text, rendering, first) for text in texts)
    for prompt in prompts:
        if not 0 < len(prompt.tokens) <= rendering.block_size // 2:
            raise OptionError(
                f"{option} {brief(prompt.text)}: has {len(prompt.tokens)} tokens\n"
                f"pass prompts of 1 to {rendering.block_size // 2} tokens, which is half of block_size"
            )
    return prompts


def tokens_per_sequence(data: Data, block_size: int) -> int:
    """The tokens that an item of the data can have: block_size, or twice that for a pair of sequences."""
    return block_size * (2 if data.packing == "pairs" else 1)


def describe_data(data: Data, block_size: int) -> dict[str, str]:
    """What was prepared, as names and values: for the start block of a run and for `python -m data.prepare`."""
    held_out = data.counts.get("validation")
    validation = f"{held_out.documents:,} documents, {held_out.sequences:,} sequences" if held_out else "none"
    unused = ", ".join(f"{name} ({records:,})" for name, records in sorted(data.unused.items()))
    if len(data.validation) > 1:
        sets = (f"{len(dataset):,} {name.removeprefix('eval_')}" for name, dataset in data.validation.items())
        validation += f": {', '.join(sets)}"
    if "train" not in data.counts:
        sequences = f"of up to {block_size} tokens, packing {data.packing}"
        lines = {"tokenizer": data.tokenizer, "data": data.source, "sequences": sequences, "validation": validation}
        if isinstance(data.train, StreamingDataset) and len(data.train.texts) > 1:
            lines["mixture"] = f"{', '.join(f'{text.weight:.1%}' for text in data.train.texts)} of the sequences"
        return lines | ({"not used": f"columns {unused} of the first record"} if unused else {})
    train, slots = data.counts["train"], tokens_per_sequence(data, block_size)
    lines = {
        "tokenizer": data.tokenizer,
        "data": f"{data.source}: {train.documents:,} documents ({train.shape}), {train.tokens:,} tokens, "
        f"{train.trained_tokens / train.tokens:.1%} of them trained on",
        "left out": f"{train.empty_documents} empty documents, {train.targetless_documents} with no token to train on, "
        f"the ends of {train.cut_documents} truncated documents, "
        f"{train.dropped_tokens} tokens of a last partial sequence",
        "sequences": f"{train.sequences:,} of {slots} tokens, packing {data.packing}, "
        f"{train.filled(slots):.2%} of their positions used",
        "validation": validation,
    }
    if unused:
        lines["not used"] = f"columns, and the records that have them: {unused}"
    if train.had_bos or train.had_eos:
        lines["added once"] = (
            f"BOS and EOS: {train.had_bos} texts already began with BOS, and {train.had_eos} already ended with EOS"
        )
    if len(data.train.sources) > 1:
        drawn = [f"{quota:,} from {sequences:,} sequences" for sequences, quota in data.train.sources]
        lines["mixture"] = f"an epoch draws {', '.join(drawn)}"
    return lines


def show_examples(
    sequences: PreparedDataset | Mixture | StreamingDataset,
    number: int,
    tokenizer: PreTrainedTokenizerBase,
    colored: bool,
) -> str:
    """The text of the first `number` sequences: tokens trained on in green and masked tokens in gray if `colored`.

    Without colors, «marks» are around tokens trained on.
    A line with its counts opens each sequence, and each of its segments starts on a new line.
    """
    trained_on, masked = (f"{GREEN}%s{PLAIN}", f"{GRAY}%s{PLAIN}") if colored else ("«%s»", "%s")
    lines = []
    for sequence in islice(iter(sequences), number):
        trained = int(sequence.trained_on.sum())
        lines.append(f"--- sequence {sequence.number}: {len(sequence.tokens)} tokens, {trained} of them trained on ---")
        start = 0
        for length in sequence.segment_lengths:
            segment = slice(start, start + length)
            pairs = zip(sequence.tokens[segment].tolist(), sequence.trained_on[segment].tolist(), strict=True)
            runs = [(on, [token for token, _ in run]) for on, run in groupby(pairs, key=lambda pair: pair[1])]
            lines.append("".join((trained_on if on else masked) % tokenizer.decode(ids) for on, ids in runs))
            start += length
    return "\n".join([*lines, f"--- {trained_on % 'trained on'}, {masked % 'masked'} ---"])


def main(argv: list[str]) -> None:
    """Prepare the data of a run and print what was prepared. Raises OptionError."""
    transformers.utils.logging.set_verbosity_error()
    options = parse(argv)
    check_data(options)
    model_config, tokenizer = load_config_and_tokenizer(options)
    data = prepare_data(options, tokenizer, model_config)
    assert options.block_size
    print("\n".join(f"{key:<13} {value}" for key, value in describe_data(data, options.block_size).items()))


def _packing_for_model(options: Options, kind: str, model_config: PretrainedConfig | None) -> str:
    """The packing `kind`, or none instead of documents that the model would mix. Refused if the user asked for them."""
    if kind != "documents" or model_config is None:
        return kind
    if not (obstacle := document_obstacle(model_config, options.trust_remote_code)):
        return kind
    model = f"{model_config.model_type}: {obstacle}"
    if options.packing:
        raise OptionError(f"packing documents: would mix the documents of a sequence in {model}\npass --packing none")
    if os.environ.get("RANK", "0") == "0":
        print(f"packing: none, because packed conversations would mix in {model}", file=sys.stderr)
    return "none"


def _report_template(renderings: list[Rendering]) -> None:
    """Refuse variables that no conversation reads. Say which date a template writes. Once, on rank 0."""
    conversations = [rendering for rendering in renderings if rendering.shape != "text"]
    if not conversations and renderings[0].variables:
        raise OptionError(
            f"chat_template_kwargs {json.dumps(renderings[0].variables)}: the records are no conversations\n"
            "remove --chat_template_kwargs, or pass another --data_format"
        )
    for rendering in conversations[:1]:
        reads = names_in(rendering.tokenizer)
        if "strftime_now" in reads and "date_string" not in rendering.variables and os.environ.get("RANK", "0") == "0":
            print(
                f"chat_template: writes a date; it is {rendering.variables.get('strftime_now', DATE)} in every "
                'conversation\nchange it with --chat_template_kwargs \'{"strftime_now": "YYYY-MM-DD"}\'',
                file=sys.stderr,
            )


def _stream(
    tokenizer: str,
    texts: list[Text],
    packing: Packing,
    seed: int,
    held_out: dict[str, Prepared],
) -> Data:
    """Training sequences that are made during training, and prepared validation sequences."""
    keys: list[object] = [cache_key(text.source, text.rendering, packing, percentage=0) for text in texts]
    keys += [part.fingerprint for part in held_out.values()]
    keys += [[text.weight for text in texts]] if len(texts) > 1 else []
    firsts = [encoder(text.rendering)(list(islice(read(text.source), 1)))[0] for text in texts]
    return Data(
        source=f"{', '.join(text.source.name for text in texts)}, streamed",
        tokenizer=tokenizer,
        fingerprint=hashlib.sha256(json.dumps(keys).encode()).hexdigest(),
        packing=packing.kind,
        stop_tokens=[],  # prepare_data adds those that the template shows
        unused=sum((Counter(first.unused) for first in firsts), Counter()),
        train=StreamingDataset(texts, packing, seed),
        validation=_datasets(held_out, packing),
        counts=_counts(held_out),
    )


def _read_prepared(
    tokenizer: str,
    sources: list[Source],
    packing: Packing,
    training: list[Prepared],
    held_out: dict[str, Prepared],
) -> Data:
    """Prepared training and validation sequences: those of `held_out`, or the validation splits of the sources."""
    weights = [source.weight for source in sources if source.weight]
    fingerprints = [part.fingerprint for part in [*training, *held_out.values()]]
    train = [PreparedDataset(part.folder / "train", packing.padded_length) for part in training]
    counts = {"train": total([part.counts["train"] for part in training])} | _counts(held_out)
    validation = _datasets(held_out, packing)
    if "validation" in training[0].counts:
        splits = [PreparedDataset(part.folder / "validation", packing.padded_length) for part in training]
        validation = {"eval": splits[0] if len(splits) == 1 else Mixture(splits)}
        counts["validation"] = total([part.counts["validation"] for part in training])
    return Data(
        source=", ".join(source.name for source in sources),
        tokenizer=tokenizer,
        fingerprint=hashlib.sha256(json.dumps([weights, fingerprints]).encode()).hexdigest(),
        packing=packing.kind,
        stop_tokens=sorted({token for part in training for token in part.stop_tokens}),
        unused=sum((Counter(part.unused) for part in training), Counter()),
        train=train[0] if len(train) == 1 else Mixture(train, weights or None),
        validation=validation,
        counts=counts,
    )


def _datasets(held_out: dict[str, Prepared], packing: Packing) -> dict[str, PreparedDataset | Mixture]:
    return {name: PreparedDataset(part.folder / "train", packing.padded_length) for name, part in held_out.items()}


def _counts(held_out: dict[str, Prepared]) -> dict[str, Split]:
    return {"validation": total([part.counts["train"] for part in held_out.values()])} if held_out else {}


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except OptionError as error:
        print(f"data.prepare: error: {error}", file=sys.stderr)
        sys.exit(2)
