"""Proves model/version_4.py: transformers 4 and 5 read the same model and tokenizer in an export."""

import copy
import json
import os
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3TextConfig,
    GemmaTokenizer,
    GPTNeoXConfig,
    GPTNeoXTokenizer,
    LlamaTokenizer,
    Phi3Config,
    PhiConfig,
    PretrainedConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Tokenizer,
    Qwen3Config,
)

from model.export import write_model
from tests import transformers_4, world
from tests.families import FAMILIES, SIZES

VERSION_4 = "4.57.6"

TEXTS = ["The license is , granted .", "  two  spaces\n\nand 12345 émoji 😀", "<|im_end|>x</s><eos>", " x"]

SMALL = {key: value for key, value in SIZES.items() if key not in ("head_dim", "num_key_value_heads")}
PARTIAL = {"rope_type": "default", "rope_theta": 2e4, "partial_rotary_factor": 0.5}
YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 64}
LONG = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
TWO_ROPES = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 5e3},
}

CONFIGS: dict[str, PretrainedConfig] = {
    **{name: config for name, (config, _, _) in FAMILIES.items()},
    "gemma3, two ropes": Gemma3TextConfig(
        **{**SIZES, "num_hidden_layers": 6}, sliding_window=16, rope_parameters=TWO_ROPES
    ),
    "gpt_neox": GPTNeoXConfig(**SMALL, rope_parameters=PARTIAL),
    "phi": PhiConfig(**SMALL, rope_parameters=PARTIAL),
    "phi3": Phi3Config(**SMALL, rope_parameters=LONG, original_max_position_embeddings=64),
    "qwen3, yarn": Qwen3Config(**SIZES, rope_parameters=YARN),
}


def export(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, directory: Path) -> Path:
    """An export of a random model, and the tokens for tests/transformers_4.py."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    directory.mkdir()
    write_model(directory, model, tokenizer, torch.float32)
    (directory / "ids.json").write_text(json.dumps(list(range(10, 130))))
    return directory


def unread(config: PretrainedConfig) -> dict[str, Any]:
    """The values of a configuration, without those that tell where it was read."""
    leave = ("transformers_version", "architectures", "_name_or_path", "dtype")
    return {key: value for key, value in config.to_dict().items() if key not in leave}


@pytest.mark.parametrize("name", CONFIGS)
def test_version_5_reads_what_it_wrote(name: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """The keys for version 4 change nothing for version 5, and hold the rope that the model was trained with."""
    directory = export(CONFIGS[name], tokenizer, tmp_path / "export")
    read = AutoConfig.from_pretrained(directory)
    if name == "phi3":  # where version 4 demands the older name of rope_type
        assert read.rope_parameters.pop("type") == "longrope"
        del read.partial_rotary_factor
    assert unread(read) == unread(CONFIGS[name])
    written = json.loads((directory / "config.json").read_text())
    rope = read.rope_parameters.get("full_attention", read.rope_parameters)
    assert written["torch_dtype"] == written["dtype"] == "float32"
    assert written["rotary_emb_base" if name == "gpt_neox" else "rope_theta"] == rope["rope_theta"]
    scaling = written.get("rope_scaling", {"rope_type": "default"})
    assert scaling.get("rope_type", scaling.get("type")) == rope["rope_type"]
    assert "rope_theta" not in scaling


def bpe(special: list[str], bytelevel: bool) -> Tokenizer:
    """A tokenizer like those of GPT-2 and Qwen, or like those of SentencePiece, with the special tokens first."""
    tokenizer = Tokenizer(models.BPE() if bytelevel else models.BPE(unk_token="<unk>", byte_fallback=True))
    alphabet = pre_tokenizers.ByteLevel.alphabet() if bytelevel else []
    if bytelevel:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
    else:
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
        special = [*special, *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(world.make_documents(), trainer)
    return tokenizer


def parts(tokenizer: Tokenizer) -> dict[str, Any]:
    model = json.loads(tokenizer.to_str())["model"]
    return {"vocab": model["vocab"], "merges": [tuple(merge) for merge in model["merges"]]}


def tokenizers() -> dict[str, PreTrainedTokenizerBase]:
    """A tokenizer of each kind that decoder models have, with and without BOS."""
    with_bos = bpe(["<s>", "</s>", "<|im_end|>"], bytelevel=True)
    with_bos.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    llama = parts(bpe(["<unk>", "<s>", "</s>"], bytelevel=False))
    gemma = parts(bpe(["<pad>", "<eos>", "<bos>", "<unk>"], bytelevel=False))
    qwen = parts(bpe(["<|endoftext|>", "<|im_start|>", "<|im_end|>"], bytelevel=True))
    extra: Any = [AddedToken("<|im_end|>", special=True)]
    return {
        "llama 3": PreTrainedTokenizerFast(
            tokenizer_object=with_bos, bos_token="<s>", eos_token="</s>", extra_special_tokens=extra
        ),
        "llama": LlamaTokenizer(**llama),
        "llama without bos": LlamaTokenizer(**llama, add_bos_token=False),
        "gemma": GemmaTokenizer(**gemma),
        "gemma without bos": GemmaTokenizer(**gemma, add_bos_token=False),
        "qwen2.5": Qwen2Tokenizer(**qwen, extra_special_tokens=extra),
        "gpt_neox": GPTNeoXTokenizer(**qwen),
    }


def export_tokenizers(directory: Path) -> dict[Path, list[Any]]:
    """Exported tokenizers, and what tests/transformers_4.py must say of each."""
    expected = {}
    for name, tokenizer in tokenizers().items():
        tokenizer.chat_template = world.without_markers(world.PLAIN)
        path = directory / name
        export(CONFIGS[name.split()[0]], tokenizer, path)  # version 5 chooses the class by the model, too
        (path / "ids.json").unlink()
        (path / "texts.json").write_text(json.dumps(TEXTS))
        expected[path] = transformers_4.readings(tokenizer, TEXTS)
    return expected


def test_version_5_reads_the_same_tokenizer(tmp_path: Path) -> None:
    for path, expected in export_tokenizers(tmp_path).items():
        tokenizer = AutoTokenizer.from_pretrained(path)
        assert transformers_4.readings(tokenizer, TEXTS) == expected, path.name
        special = json.loads((path / "tokenizer_config.json").read_text()).get("extra_special_tokens", {})
        assert isinstance(special, dict), path.name  # version 4 fails with a list


@pytest.fixture(scope="session")
def python_4(pytestconfig: pytest.Config) -> Path:
    """The Python of an environment with transformers 4, which is made once and kept in the cache of pytest."""
    assert pytestconfig.cache
    directory = pytestconfig.cache.mkdir(f"transformers-{VERSION_4}")
    python, done = directory / "bin" / "python", directory / "done"
    if not done.exists():
        venv.create(directory, with_pip=True, clear=True)
        wanted = [f"transformers=={VERSION_4}", f"torch=={torch.__version__.split('+')[0]}"]
        pip = subprocess.run([python, "-m", "pip", "install", "-q", *wanted], capture_output=True, text=True)
        if pip.returncode:
            pytest.fail(f"pip cannot install {' '.join(wanted)}:\n{pip.stderr[-2000:]}")
        done.touch()
    return python


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_version_4_reads_the_same(python_4: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """Logits and tokens are the same in both versions."""
    exported = [export(config, tokenizer, tmp_path / name) for name, config in CONFIGS.items()]
    expected: dict[str, Any] = {str(path): transformers_4.logits(path) for path in exported}
    (tmp_path / "tokenizers").mkdir()
    expected |= {str(path): found for path, found in export_tokenizers(tmp_path / "tokenizers").items()}
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    command = [str(python_4), transformers_4.__file__, *expected]
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr[-3000:]
    found = json.loads(run.stdout)
    assert found.pop("version") == VERSION_4 != sys.modules["transformers"].__version__
    assert found.keys() == expected.keys()
    for path in map(str, exported):
        torch.testing.assert_close(torch.tensor(found[path]), torch.tensor(expected[path]), msg=path)
        del found[path], expected[path]
    assert found == expected
