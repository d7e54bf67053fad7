"""The inputs of the tests, of the proof and of the book: ragged documents, a tokenizer, a tiny tied Qwen3 model.

python -m tests.world DIRECTORY            writes what the runs of docs/book/ read
python -m tests.world DIRECTORY mixture    writes the mixture of experts of its last chapter, after that
"""

import json
import random
import shutil
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
)

from data.sequences import Sequence
from tests.launch import ROOT

VOCABULARY = 384

# A chat template. BEGIN and END are replaced by markers around the assistant's words, or by nothing.
PLAIN = r"""
{%- for message in messages %}
  {{- '<|im_start|>' + message.role + '\n' }}
  {%- if message.role == 'assistant' %}BEGIN{{ message.content + '<|im_end|>' }}END
  {%- else %}{{ message.content + '<|im_end|>' }}{% endif %}
  {{- '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""


def make_documents() -> list[str]:
    """200 documents of 1 to 400 words, drawn from the license with a fixed seed."""
    words = (ROOT / "LICENSE").read_text().split(" ")
    draw = random.Random(0)
    lengths = [int(400 ** draw.random()) for _ in range(200)]
    return [" ".join(draw.choice(words) for _ in range(length)) for length in lengths]


def make_train_file(path: Path) -> Path:
    """The documents as .jsonl."""
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in make_documents()))
    return path


def make_pairs(path: Path) -> Path:
    """146 ragged pairs as .jsonl. The chosen answer repeats one word, and the rejected answer another."""
    draw, words = random.Random(1), (ROOT / "LICENSE").read_text().split()
    with open(path, "w") as file:
        for _ in range(146):
            prompt = " ".join(draw.choice(words) for _ in range(draw.randint(1, 6)))
            chosen, rejected = (f" {word}" * draw.randint(1, 9) for word in ("copyright", "notice"))
            file.write(json.dumps({"prompt": prompt, "chosen": chosen, "rejected": rejected}) + "\n")
    return path


def make_model(path: Path) -> Path:
    """A model directory: config.json, model.safetensors and a tokenizer."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<eos>"], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(make_documents(), trainer)
    PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<eos>").save_pretrained(path)
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        attention_dropout=0.0,
        eos_token_id=0,
    )
    Qwen3ForCausalLM(config).save_pretrained(path)
    return path


def make_mixture(path: Path, tokenizer: Path) -> Path:
    """A model directory: a tiny tied Qwen3 mixture of four experts, and the files of `tokenizer`."""
    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        moe_intermediate_size=16,
        num_experts=4,
        num_experts_per_tok=2,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        eos_token_id=0,
    )
    return make_family(config, path, tokenizer)


def make_family(config: PretrainedConfig, path: Path, tokenizer: Path) -> Path:
    """A model directory with random fp32 values, and the files of `tokenizer`."""
    without_model = shutil.ignore_patterns("*.safetensors", "*config.json")
    shutil.copytree(tokenizer, path, ignore=without_model, dirs_exist_ok=True)
    shutil.copy(tokenizer / "tokenizer_config.json", path)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(path)
    return path


def row(tokens: Tensor, number: int = 0) -> Sequence:
    """A sequence of one document, all of it trained on."""
    return Sequence(number, tokens, torch.ones_like(tokens, dtype=torch.bool), [len(tokens)])


def options(model_dir: Path, train_file: Path, cache: Path) -> list[object]:
    """The options of most runs: 16 ragged sequences a step, so micro-batches differ in their number of targets."""
    values = {
        "model_name_or_path": model_dir,
        "train_file": train_file,
        "data_cache_dir": cache,
        "packing": "none",
        "block_size": 64,
        "validation_split_percentage": 10,
        "global_batch_size": 16,
        "per_device_train_batch_size": 4,
        "learning_rate": 3e-3,
        "weight_decay": 0.1,
        "warmup_steps": 2,
        "max_grad_norm": 0.4,
        "max_steps": 20,
        "logging_steps": 1,
        "save_steps": 1000000,  # a checkpoint at the end
        "save_dtype": "float32",
        "dataloader_num_workers": 0,
    }
    return [word for name, value in values.items() for word in (f"--{name}", value)]


def with_markers(template: str) -> str:
    return template.replace("BEGIN", "{% generation %}").replace("END", "{% endgeneration %}")


def without_markers(template: str) -> str:
    return template.replace("BEGIN", "{% if true %}").replace("END", "{% endif %}")


def main(argv: list[str]) -> None:
    """Write what the runs of docs/book/ read: a model, ragged documents, and two questions with answers.

    With "mixture", write a mixture of experts with the tokenizer of that model instead.
    """
    path = Path(argv[0])
    if argv[1:] == ["mixture"]:
        make_mixture(path / "mixture", path / "model")
        print(f"{path}: mixture")
        return
    path.mkdir(exist_ok=True)
    make_model(path / "model")
    make_train_file(path / "documents.jsonl")
    answers = {"May I copy the Software?": " Yes.", "Is there any warranty?": " No."}
    with open(path / "answers.jsonl", "w") as file:
        for question, answer in answers.items():
            file.write(json.dumps({"prompt": question, "completion": answer}) + "\n")
    print(f"{path}: model, documents.jsonl, answers.jsonl")


if __name__ == "__main__":
    main(sys.argv[1:])
