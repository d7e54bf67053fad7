"""What the tests share: the small world of tests/world.py, made once a session."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from tests import proof, world

LONG = ("test_kills.py", "test_atomic.py", "test_topology.py", "test_compiled.py")  # minutes on one core


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take long come first, so that both workers of `make test` end at about the same time."""
    items.sort(key=lambda item: item.path.name not in LONG)


@pytest.fixture(scope="session")
def documents() -> list[str]:
    return world.make_documents()


@pytest.fixture(scope="session")
def train_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return world.make_train_file(tmp_path_factory.mktemp("data") / "documents.jsonl")


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return world.make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def model_with_dropout(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model with dropout, so that the RNG of each rank matters."""
    path = tmp_path_factory.mktemp("dropout") / "model"
    shutil.copytree(model_dir, path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "attention_dropout": 0.2}))
    return path


@pytest.fixture(scope="session")
def tiny(model_dir: Path, train_file: Path, tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    return world.options(model_dir, train_file, tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def reference(tiny: list[object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process, the whole global batch at once: the first gradient, and a curve for each optimizer.

    A tree with a planted bug is given the reference of the right tree (tests/museum/plant.py).
    """
    if "RIGHT_REFERENCE" in os.environ:
        return Path(os.environ["RIGHT_REFERENCE"])
    directory = tmp_path_factory.mktemp("reference")
    torch.save(proof.first_gradient(proof.REFERENCE, tiny, directory / "gradient"), directory / "gradient.pt")
    proof.curve(proof.REFERENCE, [*tiny, *proof.ADAMW], directory / "AdamW")
    proof.curve(proof.REFERENCE, [*tiny, *proof.SGD], directory / "SGD")
    return directory


@pytest.fixture(scope="session")
def dpo(tiny: list[object], tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    """The same for preference tuning, on the pairs of tests/world.py."""
    packing = tiny.index("--packing")
    pairs = world.make_pairs(tmp_path_factory.mktemp("pairs") / "pairs.jsonl")
    cache = tmp_path_factory.mktemp("cache")
    options = [*tiny[:packing], *tiny[packing + 2 :], "--objective", "dpo"]
    return [*options, "--train_file", pairs, "--data_cache_dir", cache]


@pytest.fixture
def tokenizer(model_dir: Path) -> PreTrainedTokenizerBase:
    """The tiny model's, with a chat template without markers and two tokens more for it."""
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = world.without_markers(world.PLAIN)
    return tokenizer


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()
