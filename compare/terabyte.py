"""What prepared data of a terabyte costs on one rank: a start, the shuffling of an epoch, and reading.

    python -m compare.terabyte [TERABYTES]

Writes prepared data with sequences of 4,096 tokens. Its tokens.bin is a sparse file, so it takes no room on the disk.
The lists of segments and sequences are real (24 bytes for each sequence), and so are the checksums of all blocks.
Prints for each step its seconds by the clock, the memory that the process holds after it, and the most that it held.
"""

import argparse
import os
import resource
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from itertools import islice
from pathlib import Path

import numpy as np
import xxhash
from torch.utils.data import DistributedSampler

from data.batches import draw, micro_batches
from data.files.checked import BLOCK, CheckedWriter, Content, write_checked
from data.sequences import PreparedDataset

TOKENS = 4096  # of a sequence


def write(folder: Path, sequences: int) -> None:
    """Prepared data with so many sequences, in which each token is 0."""
    blocks = sequences * TOKENS * 4 // BLOCK
    checksums = xxhash.xxh3_64_intdigest(bytes(BLOCK)).to_bytes(8, "little") * blocks
    (folder / "tokens.bin.xxh3").write_bytes(checksums)
    (folder / "tokens.bin").touch()
    os.truncate(folder / "tokens.bin", blocks * BLOCK)
    written = {"tokens.bin": Content(blocks * BLOCK, "", xxhash.xxh3_64_hexdigest(checksums))}
    (folder / "train").mkdir()
    starts = np.arange(0, (sequences + 1) * TOKENS, TOKENS)
    for name, content in (
        ("segments", np.stack([starts[:-1], starts[1:]], axis=1)),
        ("sequences", np.arange(sequences + 1)),
    ):
        writer = CheckedWriter(folder / "train" / f"{name}.bin")
        writer.write(content.tobytes())
        written[f"train/{name}.bin"] = writer.close()
    write_checked(folder / "about.json", {"files": {name: asdict(content) for name, content in written.items()}})


@contextmanager
def measured(step: str) -> Iterator[None]:
    """Print what the block costs."""
    started = time.perf_counter()
    yield
    seconds = time.perf_counter() - started
    held = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    print(f"{step:<30} {seconds:7.2f} s, {held:6.0f} MiB, at most {most:6.0f} MiB", flush=True)


def main(terabytes: float) -> None:
    """Write in a process of its own, so that its memory does not count, and measure."""
    sequences = int(terabytes * 10**12 / 4 / TOKENS) // (BLOCK // TOKENS // 4) * (BLOCK // TOKENS // 4)
    with tempfile.TemporaryDirectory() as name:
        if (writer := os.fork()) == 0:
            write(Path(name), sequences)
            os._exit(0)
        assert os.waitpid(writer, 0)[1] == 0
        print(f"{sequences:,} sequences of {TOKENS} tokens")
        with measured("imports"):
            pass
        with measured("open"):
            dataset = PreparedDataset(Path(name) / "train", None)
        for ranks in (1, 8):
            sampler: DistributedSampler[int] = DistributedSampler(
                dataset, num_replicas=ranks, rank=0, shuffle=True, seed=42, drop_last=True
            )
            with measured(f"shuffle an epoch, {ranks} ranks"):
                numbers = draw(sampler, dataset.epoch_indices(0, 42))
        with measured("read 100 micro-batches of 8"):
            for indices in islice(micro_batches(numbers, 8, 0, 100), 100):
                assert all(len(dataset[index].tokens) == TOKENS for index in indices)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="compare.terabyte", allow_abbrev=False)
    parser.add_argument("terabytes", type=float, nargs="?", default=1.0)
    main(parser.parse_args().terabytes)
