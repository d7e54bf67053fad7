"""A model in the files that `from_pretrained` reads: its own, of transformers and of other tools."""

import copy
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.core_model_loading import revert_weight_conversion
from transformers.dynamic_module_utils import custom_object_save
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

LARGEST_FILE = "5GB"

Together = Callable[[Callable[[], Any]], list[Any]]


def unique_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """The parameters and saved buffers by name; of tied ones only the first name, as safetensors demands."""
    unique = dict(model.named_parameters()).keys() | dict(model.named_buffers()).keys()
    return {name: tensor for name, tensor in model.state_dict().items() if name in unique}


def write_model(
    directory: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dtype: torch.dtype,
    rank: int = 0,
    world_size: int = 1,
    together: Together = lambda work: [work()],
) -> None:
    """Write what `from_pretrained` reads, its floats in `dtype`, in files of at most 5 GB, several with an index.

    Every rank must call: sharded parameters are gathered, over gloo, one after the other, and file n is written by rank
    n modulo world size. Costs a rank the host memory of one file and one tensor. `together` does its work on every
    rank, and gives the results of all by rank, or raises on all what one has raised.
    """
    tensors = unique_tensors(model)
    cast = {name: dtype if tensor.is_floating_point() else tensor.dtype for name, tensor in tensors.items()}
    sizes = {name: torch.empty(tensor.shape, dtype=cast[name], device="meta") for name, tensor in tensors.items()}
    split = split_torch_state_dict_into_shards(sizes, max_shard_size=LARGEST_FILE)
    files = list(split.filename_to_tensors.items())
    weight_map: dict[str, str] = {}
    for first in range(0, len(files), world_size):
        mine: dict[str, dict[str, Tensor]] = {}
        for writer, (file, names) in enumerate(files[first : first + world_size]):
            whole = {name: _whole(tensors[name], cast[name], keep=writer == rank) for name in names}
            if writer == rank:
                mine[file] = revert_weight_conversion(model, whole)  # the names and layout that are published
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
        if model.can_generate():
            model.generation_config.to_json_file(directory / "generation_config.json")  # as it was: it is not checked
        tokenizer.save_pretrained(directory)

    together(write_rest)


def _whole(tensor: Tensor, dtype: torch.dtype, keep: bool) -> Tensor:
    """All of a tensor on the CPU, for the rank that keeps it. Every rank must call: a sharded one is gathered."""
    if isinstance(tensor, DTensor):
        part: Any = tensor.to(dtype).cpu()
        tensor = part.full_tensor()  # the collective
    return tensor.to(dtype).cpu().contiguous() if keep else torch.empty(0)


def _write_files(directory: Path, files: dict[str, dict[str, Tensor]]) -> dict[str, str]:
    """Write files; gives the one that each tensor is in."""
    for name, tensors in files.items():
        save_file(tensors, directory / name, metadata={"format": "pt"})
    return {tensor: name for name, tensors in files.items() for tensor in tensors}
