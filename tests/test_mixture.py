"""Proves Mixture of data/sequences.py: exact fractions of the sources, evenly used, on any ranks and resumes."""

import json
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from config.errors import OptionError
from config.options import Options
from data.ledger import differences, problems
from data.prepare import prepare_data
from data.sequences import Mixture
from tests.launch import train_ok


@pytest.fixture(scope="module")
def files(documents: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two sources, one of 160 documents and one of 40."""
    folder = tmp_path_factory.mktemp("sources")
    parts = {"large.jsonl": documents[:160], "small.jsonl": documents[160:]}
    for name, texts in parts.items():
        (folder / name).write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return [folder / name for name in parts]


@pytest.fixture(scope="module")
def tokenizer(model_dir: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(model_dir)


@pytest.fixture
def mixture(files: list[Path], tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> Mixture:
    """The options of a mixture: 60% of the sequences of an epoch are from the small source."""
    weights = f"{files[0]}=0.4,{files[1]}=0.6"
    data = prepare_data(Options(train_mixture=weights, data_cache_dir=str(tmp_path), block_size=32), tokenizer)
    assert isinstance(data.train, Mixture)
    assert isinstance(data.validation["eval"], Mixture)
    assert (data.counts["train"].sequences, data.counts["validation"].sequences) == (
        len(data.train),
        len(data.validation["eval"]),
    )
    return data.train


def test_shares_and_passes(mixture: Mixture) -> None:
    """Each epoch has the fractions of the weights. A sequence comes again only after all others of its source."""
    epochs = [mixture.epoch_indices(epoch, 42) for epoch in range(7)]
    large, small = (sequences for sequences, _ in mixture.sources)
    for numbers in epochs:
        assert len(numbers) == len(mixture) == large + small
        assert abs((numbers >= large).mean() - 0.6) < 1 / len(mixture)
    for drawn, sequences in (
        (np.concatenate([numbers[numbers < large] for numbers in epochs]), range(large)),
        (np.concatenate([numbers[numbers >= large] for numbers in epochs]), range(large, large + small)),
    ):
        passes = [drawn[start : start + len(sequences)].tolist() for start in range(0, len(drawn), len(sequences))]
        assert len(passes) > 2
        assert all(sorted(order) == list(sequences) for order in passes[:-1])
        assert len(set(passes[-1])) == len(passes[-1])
        assert passes[0] != passes[1]


def test_an_epoch_is_arithmetic(mixture: Mixture) -> None:
    """An epoch is a function of (seed, epoch) alone, so a resume has no state to restore."""
    again = Mixture(mixture.parts, [4, 6])
    assert np.array_equal(again.epoch_indices(5, 42), mixture.epoch_indices(5, 42))
    assert not np.array_equal(mixture.epoch_indices(5, 43), mixture.epoch_indices(5, 42))
    number = len(mixture) - 1
    assert mixture[number].number == number
    assert mixture[number].tokens.equal(mixture.parts[1][len(mixture.parts[1]) - 1].tokens)


@pytest.mark.slow
def test_the_same_global_batches(tiny: list[object], files: list[Path], tmp_path: Path) -> None:
    """Global batches are the same on one rank, and on two, four and three with resumes, also in the second epoch."""
    options = [*tiny, "--train_file", "", "--train_mixture", f"{files[0]}=0.4,{files[1]}=0.6", "--ledger"]
    options += ["--global_batch_size", 48, "--per_device_train_batch_size", 4]
    options += ["--lr_scheduler_type", "constant_with_warmup"]
    printed = train_ok(1, *options, "--max_steps", 15, "--output_dir", tmp_path / "one")
    assert "mixture       an epoch draws " in printed
    for world_size, steps in ((2, 3), (4, 10), (3, 15)):
        resume = ["--resume_from_checkpoint", "auto", "--max_steps", steps]
        train_ok(world_size, *options, *resume, "--output_dir", tmp_path / "many")
    assert problems(tmp_path / "one") == problems(tmp_path / "many") == []
    assert differences(tmp_path / "one", tmp_path / "many") == []
    path = tmp_path / "many" / "ledger" / "about.json"
    about = json.loads(path.read_text())
    path.write_text(json.dumps(about | {"sources": [[sequences, sequences] for sequences, _ in about["sources"]]}))
    assert "of the same epoch" in problems(tmp_path / "many")[0], "the small source comes more than once"


def test_packed_alike(files: list[Path], tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """Texts and conversations in one mixture need one --packing."""
    chat = tmp_path / "chat.jsonl"
    chat.write_text(json.dumps({"prompt": "one two", "completion": " three"}) + "\n")
    options = Options(
        train_mixture=f"{files[0]}=1,{chat}=1",
        data_cache_dir=str(tmp_path),
        block_size=32,
        validation_split_percentage=0,
    )
    with pytest.raises(OptionError, match="pass --packing"):
        prepare_data(options, tokenizer)
    options.packing = "documents"
    train = prepare_data(options, tokenizer).train
    assert [drawn for _, drawn in train.sources] == [len(train) // 2, len(train) - len(train) // 2]
