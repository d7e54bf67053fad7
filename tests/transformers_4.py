"""Print as JSON what the installed transformers reads in directories. tests/test_version_4.py runs it with version 4.

python transformers_4.py DIRECTORY ...    with the texts of DIRECTORY/texts.json and the tokens of DIRECTORY/ids.json
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase


def logits(directory: Path) -> list[list[float]]:
    """The logits of the tokens in ids.json: [T, V] in fp32."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        return model(torch.tensor([json.loads((directory / "ids.json").read_text())])).logits[0].tolist()


def readings(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[Any]:
    """Everything that a serving program asks of a tokenizer: ids, their text, the special tokens and a conversation."""
    all_ids = [tokenizer(text)["input_ids"] for text in texts]
    decoded = [[tokenizer.decode(ids, skip_special_tokens=skip) for skip in (False, True)] for ids in all_ids]
    conversation = tokenizer.apply_chat_template(
        [{"role": "user", "content": texts[0]}], tokenize=False, add_generation_prompt=True
    )
    return [all_ids, decoded, tokenizer.bos_token_id, tokenizer.eos_token_id, conversation]


if __name__ == "__main__":
    found: dict[str, Any] = {"version": transformers.__version__}
    for name in sys.argv[1:]:
        directory = Path(name)
        if (directory / "ids.json").exists():
            found[name] = logits(directory)
        else:
            texts = json.loads((directory / "texts.json").read_text())
            found[name] = readings(AutoTokenizer.from_pretrained(directory), texts)
    print(json.dumps(found))
