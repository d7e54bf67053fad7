"""The demo, which runs if no model is named: its recipe of options, its text, tokenizer and model."""

import hashlib
import os
import sysconfig
from pathlib import Path
from typing import Any

from filelock import FileLock
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

# The defaults of options in the demo. Two CPU cores train the small model in a few minutes.
DEMO_RECIPE: dict[str, Any] = {
    "block_size": 128,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 16,
    "dataloader_num_workers": 0,
    "learning_rate": 6e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 100,
    "adam_beta2": 0.99,
    "max_steps": 2000,
    "eval_steps": 1000,
    "save_steps": 1000,
    "save_total_limit": 2,
    "validation_split_percentage": 4,
    "prompt": "def ",
}

DEMO_VOCABULARY = 4096

END_OF_TEXT = "<|endoftext|>"


def demo_tokenizer(cache_dir: Path) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of 4,096 tokens, trained once on the text of the demo and stored in `cache_dir`.

    Any number of processes may call it at the same time. The first one trains, and the others wait for its lock. A
    stored tokenizer whose files have changed is trained again.
    """
    files = demo_files()
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.read_bytes())
    cached = cache_dir / f"tokenizer-{digest.hexdigest()[:16]}-{DEMO_VOCABULARY}"
    cache_dir.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{cached}.lock"):
        complete = cached / "complete"  # has the hash of the other files, and is written last
        if not complete.exists() or complete.read_bytes() != _hash_files(cached):
            bpe = Tokenizer(models.BPE())
            bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
            bpe.decoder = decoders.ByteLevel()
            trainer = trainers.BpeTrainer(
                vocab_size=DEMO_VOCABULARY,
                special_tokens=[END_OF_TEXT],
                initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                show_progress=False,
            )
            texts = (path.read_bytes().decode(errors="replace") for path in files)
            bpe.train_from_iterator(texts, trainer)
            PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END_OF_TEXT).save_pretrained(cached)
            complete.write_bytes(_hash_files(cached))
        return PreTrainedTokenizerFast.from_pretrained(cached)


def _hash_files(folder: Path) -> bytes:
    """SHA-256 over the contents of the .json files of `folder`, in hexadecimal."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.json")):
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest().encode()


def demo_files() -> list[Path]:
    """The modules of Python's standard library without its tests, in a fixed pseudorandom order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    left_out = {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3"}
    files = list[Path]()
    for folder, folders, names in os.walk(root):
        folders[:] = set(folders) - left_out  # it does not enter them: installed packages have thousands of files
        files += [Path(folder) / name for name in names if name.endswith(".py")]
    return sorted(files, key=lambda path: hashlib.sha256(str(path.relative_to(root)).encode()).digest())


# The model of the demo. Its initial weights have a large standard deviation, because the run is too short to grow them.
DEMO_MODEL: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
    "initializer_range": 0.08,
    "bos_token_id": None,
}
