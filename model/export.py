"""A model in the files that `from_pretrained` reads: its own, of transformers and of other tools."""

import copy
import json
from pathlib import Path

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


def unique_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """The parameters and saved buffers by name; of tied ones only the first name, as safetensors demands."""
    unique = dict(model.named_parameters()).keys() | dict(model.named_buffers()).keys()
    return {name: tensor for name, tensor in model.state_dict().items() if name in unique}


def write_model(
    directory: Path | None, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype
) -> None:
    """Write what `from_pretrained` reads, its floats in `dtype`, in files of at most 5 GB, several with an index.

    Every rank must call, because sharded parameters are gathered, over gloo; only the one that gives a directory
    writes. Costs that one the host memory of one file, and the others of one tensor.
    """
    tensors = unique_tensors(model)
    cast = {name: dtype if tensor.is_floating_point() else tensor.dtype for name, tensor in tensors.items()}
    sizes = {name: torch.empty(tensor.shape, dtype=cast[name], device="meta") for name, tensor in tensors.items()}
    split = split_torch_state_dict_into_shards(sizes, max_shard_size=LARGEST_FILE)
    weight_map: dict[str, str] = {}
    for file, names in split.filename_to_tensors.items():
        whole: dict[str, Tensor] = {}
        for name in names:
            tensor = tensors[name].to(cast[name]).cpu()
            if isinstance(tensor, DTensor):
                tensor = tensor.full_tensor()  # the collective
            if directory:
                whole[name] = tensor.contiguous()
        if directory:
            on_disk = revert_weight_conversion(model, whole)  # the names and layout that are published
            save_file(on_disk, directory / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(on_disk, file)
    if not directory:
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
