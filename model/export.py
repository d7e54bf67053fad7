"""The finished model: written to files that `from_pretrained` of transformers reads, and loaded from them."""

import contextlib
import copy
import json
import math
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.core_model_loading import revert_weight_conversion
from transformers.dynamic_module_utils import custom_object_save
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from config.errors import OptionError, first_line
from model.adapters import CONFIG, PREFIX, WEIGHTS, adapted_modules, adapter_parameters, merged_weight
from model.version_4 import add_config_keys, rename_tokenizer_keys
from model.weights import find_files, fingerprint_files
from runtime.files import read_json

LARGEST_FILE = "5GB"
METADATA = {"format": "pt", "trainer": "train.py"}  # of a file of weights; the second says that this trainer wrote it

# Settings of PEFT that change what an adapter computes, or add other parameters. The files of this trainer lack them.
OTHER_KINDS = (
    *("use_dora", "modules_to_save", "rank_pattern", "alpha_pattern", "fan_in_fan_out", "lora_bias"),
    *("trainable_token_indices", "layer_replication", "target_parameters"),
)
ADDED_TO_THE_BASE = (True, False, None, "gaussian")  # values of init_lora_weights; with others, PEFT changes the base
BASE = "base_weights"  # in the metadata of adapters: the fingerprint of the files of the frozen model

RunOnAllRanks = Callable[[Callable[[], Any]], list[Any]]


def unique_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """The parameters and saved buffers by name. Tied tensors have only their first name, as safetensors requires."""
    unique = dict(model.named_parameters()).keys() | dict(model.named_buffers()).keys()
    return {name: tensor for name, tensor in model.state_dict().items() if name in unique}


def checkpoint_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """The tensors of a checkpoint by name: the adapters of a frozen model alone, otherwise all unique tensors."""
    return dict(adapter_parameters(model)) or unique_tensors(model)


def write_model(
    directory: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dtype: torch.dtype,
    rank: int = 0,
    world_size: int = 1,
    together: RunOnAllRanks = lambda work: [work()],
) -> None:
    """Write the files that `from_pretrained` reads, with floats in `dtype`, in weight files of at most 5 GB.

    Adapters are added to the weights of their modules.
    Every rank must call: an all-gather over gloo collects one sharded parameter at a time, and rank n modulo world size
    writes file n. Needs host memory for one file and one tensor. `together(work)` runs `work` on every rank and returns
    all results by rank; if it raises on one rank, `together` raises on all.
    """
    adapters = adapter_parameters(model)
    adapted = {f"{path}.weight": module for path, module in adapted_modules(model).items()}
    tensors = {name: tensor for name, tensor in unique_tensors(model).items() if name not in adapters}
    cast = {name: dtype if tensor.is_floating_point() else tensor.dtype for name, tensor in tensors.items()}
    sizes = {name: torch.empty(tensor.shape, dtype=cast[name], device="meta") for name, tensor in tensors.items()}
    split = split_torch_state_dict_into_shards(sizes, max_shard_size=LARGEST_FILE)
    files = list(split.filename_to_tensors.items())
    weight_map: dict[str, str] = {}
    for first in range(0, len(files), world_size):
        mine: dict[str, dict[str, Tensor]] = {}
        for writer, (file, names) in enumerate(files[first : first + world_size]):
            full = {}
            for name in names:
                tensor = merged_weight(adapted[name]) if name in adapted else tensors[name]
                full[name] = _full_tensor(tensor, cast[name], keep=writer == rank)
            if writer == rank:
                mine[file] = revert_weight_conversion(model, full)  # names and layout of published checkpoints
        for written in together(partial(_write_files, directory, mine)):
            weight_map |= written

    def write_rest() -> None:
        if rank > 0:
            return
        if split.is_sharded:
            index = {"metadata": split.metadata, "weight_map": weight_map}
            (directory / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True))
        config = copy.deepcopy(model.config)
        config.dtype, config.architectures = dtype, [type(model).__name__]
        if model.is_remote_code():
            custom_object_save(model, directory, config=config)
        config.save_pretrained(directory)
        add_config_keys(directory / "config.json", config)
        if model.can_generate():
            model.generation_config.to_json_file(directory / "generation_config.json")  # unchecked, as it was loaded
        _write_tokenizer(directory, tokenizer)

    together(write_rest)


def write_adapters(
    directory: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dtype: torch.dtype,
    config: dict[str, Any],
    base: str,
    rank: int = 0,
    together: RunOnAllRanks = lambda work: [work()],
) -> None:
    """Write the files that `PeftModel.from_pretrained` reads, with adapters in `dtype` and their `config`.

    The metadata of the adapters identify the files of their `base` model (a directory or hub id), for load_finished.
    Every rank must call: an all-gather over gloo collects sharded adapters, and rank 0 writes. `write_model` describes
    `together`.
    """
    full = {
        f"{PREFIX}{name}": _full_tensor(parameter.detach(), dtype, keep=rank == 0)
        for name, parameter in adapter_parameters(model).items()
    }

    metadata = dict(METADATA)

    def write() -> None:
        if rank == 0:
            with contextlib.suppress(OSError, ValueError):  # the base has gone, but the adapters are still worth much
                metadata[BASE] = fingerprint_files(find_files(base))
            _write_files(directory, {WEIGHTS: full}, metadata)
            (directory / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
            if model.can_generate():
                model.generation_config.to_json_file(directory / "generation_config.json")
            _write_tokenizer(directory, tokenizer)

    together(write)


def _write_tokenizer(directory: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write the files of a tokenizer. Raises OSError."""
    try:
        tokenizer.save_pretrained(directory)
    except Exception as error:
        if "os error" in str(error):  # of the operating system, but tokenizers raises a plain Exception
            raise OSError(first_line(error)) from error
        raise
    rename_tokenizer_keys(directory / "tokenizer_config.json", tokenizer)


def _full_tensor(tensor: Tensor, dtype: torch.dtype, keep: bool) -> Tensor:
    """The full tensor on the CPU if `keep`, otherwise an empty one. Every rank must call: shards are gathered."""
    if isinstance(tensor, DTensor):
        shard: Any = tensor.to(dtype).cpu()
        tensor = shard.full_tensor()  # all-gather
    return tensor.to(dtype).cpu().contiguous() if keep else torch.empty(0)


def _write_files(
    directory: Path, files: dict[str, dict[str, Tensor]], metadata: dict[str, str] = METADATA
) -> dict[str, str]:
    """Write files; return the file of each tensor. Raises OSError."""
    for name, tensors in files.items():
        (directory / name).touch()
        mode = (directory / name).stat().st_mode  # by the umask; safetensors lets only the owner read
        try:
            save_file(tensors, directory / name, metadata=metadata)
            _sort_metadata(directory / name, metadata)
            with contextlib.suppress(OSError):  # of a file system without modes
                (directory / name).chmod(mode)
        except SafetensorError as error:  # of the operating system: a full disk
            raise OSError(first_line(error)) from error
    return {tensor: name for name, tensors in files.items() for tensor in tensors}


def _sort_metadata(path: Path, metadata: dict[str, str]) -> None:
    """Sort the metadata of a file: safetensors writes them in a random order, and equal models are to be equal files.

    The file begins with the size of its header in 8 bytes. The header is JSON, padded with spaces.
    """
    with open(path, "r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size)) | {"__metadata__": metadata}
        content = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(size)
        assert len(content) == size, "the same entries have the same length"
        file.seek(8)
        file.write(content)


def load_finished(directory: str, trust_remote_code: bool = False, **settings: Any) -> PreTrainedModel:
    """The finished model of a run, on the CPU; adapters are added to the weights of their base model. Needs no PEFT.

    `directory` is the output directory of a run, with a model or with adapters. `settings` are those of
    `from_pretrained`. Warns if the base model has other weights than those that the adapters were trained on. Raises
    OSError for missing files, and OptionError for adapters of another kind.
    """
    folder = Path(directory)
    adapted = (folder / CONFIG).exists()
    config: dict[str, Any] = read_json(folder / CONFIG, 2**20) if adapted else {"base_model_name_or_path": directory}
    others = [name for name in OTHER_KINDS if config.get(name)]
    if config.get("init_lora_weights") not in ADDED_TO_THE_BASE:
        others.append("init_lora_weights")
    if others or (adapted and config.get("peft_type") != "LORA"):
        problem = ", ".join(f"{name} {config[name]}" for name in others) or f"peft_type {config.get('peft_type')}"
        raise _other_adapters(folder / CONFIG, problem)
    base = config.get("base_model_name_or_path")
    if adapted and not (
        isinstance(base, str) and base and (Path(base).exists() or not Path(base).is_absolute())
    ):  # else a name on the hub
        raise OptionError(
            f"{folder / CONFIG}: base_model_name_or_path {base}: no such directory\n"
            "write the path of the base model there"
        )
    model = AutoModelForCausalLM.from_pretrained(base, trust_remote_code=trust_remote_code, **settings)
    if not adapted:
        return model
    root = math.sqrt(config["r"]) if config.get("use_rslora") else config["r"]
    if (folder / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(directory)
    _warn_of_another_base(folder, str(base))
    tensors, modules = load_file(folder / WEIGHTS), dict(model.named_modules())
    for name in tensors:
        path, _, kind = name.removeprefix(PREFIX).removesuffix(".weight").rpartition(".")
        module = modules.get(path)
        shared = module is model.get_output_embeddings() and getattr(model.config, "tie_word_embeddings", False)
        if kind not in ("lora_A", "lora_B") or not isinstance(module, nn.Linear) or shared:
            raise _other_adapters(folder / WEIGHTS, name)
        if kind == "lora_A":
            product = tensors[f"{PREFIX}{path}.lora_B.weight"].float() @ tensors[name].float()
            weight = model.get_parameter(f"{path}.weight")
            weight.data = (weight.data.float() + config["lora_alpha"] / root * product).to(weight.dtype)
    return model


def _warn_of_another_base(adapters: Path, base: str) -> None:
    """Say that the files of the `base` model are not those beside which the adapters were trained, if that is known.

    A warning only: the same weights may be stored in other files.
    """
    with safe_open(adapters / WEIGHTS, framework="pt") as file:
        expected = (file.metadata() or {}).get(BASE)
    try:
        found = fingerprint_files(find_files(base))
    except (OSError, ValueError):  # no safetensors
        found = ""
    if expected and found != expected:
        print(
            f"base_model_name_or_path {base}: not the files of weights that the adapters were trained on\n"
            f"if answers are gibberish, write the path of their base model into {adapters / CONFIG}",
            file=sys.stderr,
        )


def _other_adapters(file: Path, problem: str) -> OptionError:
    return OptionError(f"{file}: {problem}: no adapters of this trainer\nmerge them with the package peft")
