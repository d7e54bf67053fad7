"""LoRA here and by PEFT in HF Trainer: speed and memory, with the same model, blocks and options, on one GPU.

    python -m compare.adapters [--model 8B] [options of train.py]

The model has random weights in bf16. Options of train.py go to both: --gradient_checkpointing, --lora_r, --block_size,
--per_device_train_batch_size. Each runs in its own process. The columns are those of compare/bench.py; "to PEFT" is the
ratio of tokens/s. Without a GPU, it runs the model of `make train`, to try this program.
"""

import argparse
import importlib.util
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, Qwen3Config

from compare.bench import ON_GPU, SHAPES, ours, peer
from compare.peers.trainers import ADAPTERS
from config.command_line import parse
from config.demo import DEMO_MODEL, demo_tokenizer


def main() -> None:
    """Measure PEFT, then this trainer, and print each line of the table as it is known."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--model", choices=SHAPES, default="8B", help="The shape of this Qwen3; on a GPU only.")
    arguments, more = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as name:
        model = Path(name) / "model"
        argv = ["--model_name_or_path", str(model), "--use_peft", "--lora_dropout", "0", "--learning_rate", "2e-4"]
        argv += ["--per_device_train_batch_size", "1", "--block_size", "2048" if ON_GPU else "128"]
        text = Path(name) / "text.txt"
        text.write_text("\n".join(path.read_text() for path in Path(__file__).parent.parent.glob("*/*.py")))
        argv += ["--train_file", str(text), "--validation_split_percentage", "0", "--save_steps", "0", *more]
        options = parse(argv)
        tokenizer = demo_tokenizer(Path(options.data_cache_dir).expanduser())
        tokenizer.save_pretrained(model)
        shape = SHAPES[arguments.model] if ON_GPU else {**DEMO_MODEL, "vocab_size": len(tokenizer)}
        torch.manual_seed(0)
        with torch.device("cuda" if ON_GPU else "cpu"):  # a CPU would draw billions of numbers for minutes
            AutoModelForCausalLM.from_config(Qwen3Config(**shape), dtype=torch.bfloat16).save_pretrained(model)
        where = torch.cuda.get_device_name() if ON_GPU else "CPU"
        print(f"{where}, torch {torch.__version__}, {arguments.model if ON_GPU else 'demo'}: {' '.join(argv[2:])}")
        print("\n| | tokens/s | GiB | to PEFT |\n|---|---|---|---|", flush=True)
        reference = None
        for variant in [*(ADAPTERS if importlib.util.find_spec("peft") else ()), "ours"]:
            measured = (peer if variant in ADAPTERS else ours)(variant, 1, [*argv, "--output_dir", f"{name}/{variant}"])
            if not measured:
                print(f"{variant}: failed\n" + Path(f"{name}/{variant}.log").read_text()[-2000:], flush=True)
                continue
            reference = reference or (measured if variant in ADAPTERS else None)
            ratio = f"{measured.speed / reference.speed:.2f}" if reference else ""
            print(f"| {variant} | {measured.speed:,.0f} | {measured.gib:.1f} | {ratio} |", flush=True)
        if not reference:
            print("PEFT: it is not installed, or failed")


if __name__ == "__main__":
    main()
