"""Export of a model to files that `from_pretrained` of transformers reads."""

import contextlib
import copy
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.core_model_loading import revert_weight_conversion
from transformers.dynamic_module_utils import custom_object_save
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from config.errors import first_line
from model.adapters import CONFIG, PREFIX, WEIGHTS, adapted_modules, adapter_parameters, merged_weight
from model.version_4 import add_config_keys, rename_tokenizer_keys

LARGEST_FILE = "5GB"
METADATA = {"format": "pt", "trainer": "train.py"}  # of a file of weights; the second says that this trainer wrote it

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
    rank: int = 0,
    together: RunOnAllRanks = lambda work: [work()],
) -> None:
    """Write the files that `PeftModel.from_pretrained` reads, with adapters in `dtype` and their `config`.

    Every rank must call: an all-gather over gloo collects sharded adapters, and rank 0 writes. `write_model` describes
    `together`.
    """
    full = {
        f"{PREFIX}{name}": _full_tensor(parameter.detach(), dtype, keep=rank == 0)
        for name, parameter in adapter_parameters(model).items()
    }

    def write() -> None:
        if rank == 0:
            _write_files(directory, {WEIGHTS: full})
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


def _write_files(directory: Path, files: dict[str, dict[str, Tensor]]) -> dict[str, str]:
    """Write files; return the file of each tensor. Raises OSError."""
    for name, tensors in files.items():
        (directory / name).touch()
        mode = (directory / name).stat().st_mode  # by the umask; safetensors lets only the owner read
        try:
            save_file(tensors, directory / name, metadata=METADATA)
            _sort_metadata(directory / name)
            with contextlib.suppress(OSError):  # of a file system without modes
                (directory / name).chmod(mode)
        except SafetensorError as error:  # of the operating system: a full disk
            raise OSError(first_line(error)) from error
    return {tensor: name for name, tensors in files.items() for tensor in tensors}


def _sort_metadata(path: Path) -> None:
    """Sort the metadata of a file: safetensors writes them in a random order, and equal models are to be equal files.

    The file begins with the size of its header in 8 bytes. The header is JSON, padded with spaces.
    """
    with open(path, "r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size)) | {"__metadata__": METADATA}
        content = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(size)
        assert len(content) == size, "the same entries have the same length"
        file.seek(8)
        file.write(content)
