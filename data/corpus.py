"""Documents: the user's files or data set, or the source text of the running interpreter's standard library."""

import hashlib
import json
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import datasets
from filelock import FileLock
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from config import OptionError, Options

EMBEDDED_VOCABULARY = 4096
END_OF_TEXT = "<|endoftext|>"
PIECE = 16_384  # characters; a .txt file is read in pieces, so that its size does not bound memory


@dataclass(frozen=True)
class Source:
    """Where documents come from: what names it in messages, and a key that changes when its content does."""

    name: str
    key: str
    files: tuple[Path, ...] = ()
    dataset: datasets.Dataset | None = None


def find_sources(options: Options) -> tuple[Source, Source | None]:
    """The training source, and the validation source where one is given. Raises OptionError."""
    if options.dataset_name:
        return _find_dataset(options)
    if options.train_file is None:
        files = _embedded_files()
        return Source("the Python standard library", _hash_files(files), tuple(files)), None
    train = _find_file("train_file", options.train_file)
    return train, _find_file("validation_file", options.validation_file) if options.validation_file else None


def read_records(source: Source, scratch: Path) -> datasets.Dataset:
    """The records of a source, as they stand there; what they mean is for data/encode.py to find out.

    A line of a .jsonl file is {"json": str, "place": str}: not yet parsed, because Arrow would give all records the
    same keys and types, and with its place, for messages. A .txt file is one document, in records {"text": str,
    "begins": bool, "ends": bool} of a piece of it each. Other records have the columns of their data set.
    Copies that `datasets` makes go to `scratch`. Raises OptionError for a file that cannot be read.
    """
    if source.dataset is not None:
        return source.dataset
    suffix = source.files[0].suffix
    if suffix == ".parquet":
        try:
            files = [str(path) for path in source.files]
            return datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(scratch))
        except Exception as error:
            cause = str(error.__cause__ or error).strip().splitlines()[0][:200]
            raise OptionError(f"{source.name}: cannot be read as .parquet: {cause}") from error
    read = _read_lines if suffix == ".jsonl" else _read_pieces
    return datasets.Dataset.from_generator(
        read, gen_kwargs={"files": list(source.files)}, cache_dir=str(scratch), split="train"
    )


def embedded_tokenizer(cache_dir: Path) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 4,096 tokens, trained once on the embedded corpus and kept in `cache_dir`.

    Any number of processes may call at once: the first one trains, the others wait for its lock.
    """
    files = _embedded_files()
    cached = cache_dir / f"tokenizer-{_hash_files(files)[:16]}-{EMBEDDED_VOCABULARY}"
    cache_dir.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{cached}.lock"):
        if not (cached / "complete").exists():
            bpe = Tokenizer(models.BPE())
            bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
            bpe.decoder = decoders.ByteLevel()
            trainer = trainers.BpeTrainer(
                vocab_size=EMBEDDED_VOCABULARY,
                special_tokens=[END_OF_TEXT],
                initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                show_progress=False,
            )
            bpe.train_from_iterator((row["text"] for row in _read_pieces(files)), trainer)
            PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END_OF_TEXT).save_pretrained(cached)
            (cached / "complete").touch()
        return PreTrainedTokenizerFast.from_pretrained(cached)


def _find_file(option: str, name: str) -> Source:
    path = Path(name).expanduser()
    if path.suffix not in (".txt", ".jsonl", ".parquet"):
        raise OptionError(f"{option} {name}: give a .txt, .jsonl or .parquet file")
    try:
        size = path.stat().st_size
        key = _hash_files([path])
    except OSError as error:
        raise OptionError(f"{option} {name}: {error.strerror}; give a readable file") from error
    if size == 0:
        raise OptionError(f"{option} {name}: the file is empty; give one that holds text")
    return Source(f"{option} {name}", key, (path,))


def _find_dataset(options: Options) -> tuple[Source, Source | None]:
    """The splits of a data set; its `validation` split is used where there is one."""
    name = options.dataset_name
    assert name
    try:
        splits = datasets.load_dataset(name, options.dataset_config_name)
    except Exception as error:
        cause = str(error).strip().splitlines()[0][:200]
        raise OptionError(f"dataset_name {name}: cannot be loaded: {cause}\ngive a hub id or a directory") from error
    if "train" not in splits:
        raise OptionError(f"dataset_name {name}: has no split named train, only {', '.join(splits)}")
    train, validation = (
        Source(f"dataset_name {name} ({split})", str(splits[split]._fingerprint), dataset=splits[split])
        if split in splits
        else None
        for split in ("train", "validation")
    )
    assert train
    return train, validation


def _embedded_files() -> list[Path]:
    """The modules of the standard library without its tests, in an order that is random and always the same."""
    root = Path(sysconfig.get_paths()["stdlib"])
    left_out = {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3"}
    files = [path for path in root.rglob("*.py") if not left_out & set(path.relative_to(root).parts)]
    return sorted(files, key=lambda path: hashlib.sha256(str(path.relative_to(root)).encode()).digest())


def _read_pieces(files: list[Path]) -> Iterator[dict[str, object]]:
    """Each file is one document, in pieces of about PIECE characters that together are its exact text.

    A piece ends where a line ends and the next one starts with a character that is no white space: pre-tokenizers
    split there anyway, so that the tokens are those of the whole text.
    """
    for path in files:
        with open(path, encoding="utf-8", errors="replace", newline="") as file:
            piece: list[str] = []
            size, begins = 0, True
            for line in file:
                if size >= PIECE and not line[0].isspace():
                    yield {"text": "".join(piece), "begins": begins, "ends": False}
                    piece, size, begins = [], 0, False
                piece.append(line)
                size += len(line)
            yield {"text": "".join(piece), "begins": begins, "ends": True}


def _read_lines(files: list[Path]) -> Iterator[dict[str, str]]:
    for path in files:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield {"json": line, "place": f"{path}: line {number}"}


def _hash_files(files: list[Path]) -> str:
    """SHA-256 over the sizes and contents of files."""
    digest = hashlib.sha256()
    for path in files:
        with open(path, "rb") as file:
            digest.update(json.dumps([path.suffix, os.fstat(file.fileno()).st_size]).encode())
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()
