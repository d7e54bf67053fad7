"""What packing is worth: tokens that count per second, padding left out, on ragged documents and one process.

    python -m compare.packing [--config_name DIR] [other options of train.py]

Trains on the same documents three times: padded to the longest of a micro-batch (--packing none, eight documents a
micro-batch), and packed (--packing documents, four sequences), with a dense mask for torch's
scaled_dot_product_attention, and with attention within documents alone. Prints the median tokens per second of each
after the first 10 steps, the peak memory, and the ratio to padding. Without --config_name, the model has the shape of
Qwen3-0.6B.
"""

import argparse
import json
import random
import runpy
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import model.documents.attention
from metrics.records import read_records

TRAIN = Path(__file__).resolve().parent.parent / "train.py"
QWEN3_600M = {
    "model_type": "qwen3",
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 151_936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40_960,
    "tie_word_embeddings": True,
}
VARIANTS = {
    "padded to the longest": ["--packing", "none", "--per_device_train_batch_size", "8"],
    "packed, dense mask": ["--packing", "documents", "--per_device_train_batch_size", "4"],
    "packed, within documents": ["--packing", "documents", "--per_device_train_batch_size", "4"],
}


def write_documents(path: Path) -> None:
    """6,000 documents of 1 to 2,000 words, log-normal like those of conversations: a median of 300."""
    draw = random.Random(0)
    with open(path, "w") as file:
        for _ in range(6000):
            words = min(2000, int(draw.lognormvariate(5.7, 1.1)) + 1)
            file.write(
                json.dumps({"text": " ".join(draw.choice(("self", "return", "name")) for _ in range(words))}) + "\n"
            )


def run(variant: str, options: list[str]) -> None:
    """In a process of its own: train.py, with the mask that transformers makes if the variant wants it."""
    if "dense" in variant:
        model.documents.attention.attend_within_documents = lambda *_: None
    sys.argv = ["train.py", *options, *VARIANTS[variant]]
    runpy.run_path(str(TRAIN), run_name="__main__")


def main(options: list[str]) -> None:
    """Measure and print."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        write_documents(directory / "documents.jsonl")
        (directory / "config.json").write_text(json.dumps(QWEN3_600M))
        steps = [
            "--max_steps",
            "50",
            "--logging_steps",
            "10",
            "--save_steps",
            "0",
            "--validation_split_percentage",
            "0",
        ]
        data = ["--train_file", str(directory / "documents.jsonl"), "--block_size", "4096"]
        results = {}
        for variant in VARIANTS:
            output = ["--output_dir", str(directory / variant.replace(" ", "-"))]
            arguments = [*("--config_name", name), *data, *steps, *options, *output]
            subprocess.run([sys.executable, "-m", "compare.packing", "--variant", variant, *arguments], check=True)
            records = [record for record in read_records(Path(output[1]) / "metrics.jsonl") if "loss" in record][1:]
            results[variant] = (
                statistics.median(record["tokens_per_second"] for record in records),
                records[-1]["peak_memory_gib"],
            )
    reference = results["padded to the longest"][0]
    for variant, (speed, memory) in results.items():
        print(f"{variant:<25} {speed:9,.0f} tokens/s  {memory:6.1f} GiB  {speed / reference:.2f}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--variant"]:
        run(sys.argv[2], sys.argv[3:])
    else:
        parser = argparse.ArgumentParser(prog="python -m compare.packing", description=__doc__, allow_abbrev=False)
        main(parser.parse_known_args()[1])
