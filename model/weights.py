"""Weights of a model: find them in files, check the headers, and load or initialize the parameters.

Only safetensors and JSON are read; nothing is unpickled. If a parameter is sharded (a DTensor), a rank reads its own
shard only. transformers defines how names in files map to parameters. In some models, several stored tensors are
joined to one parameter, such as the experts of a layer.
"""

import copy
import hashlib
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)
from transformers.modeling_utils import str_to_torch_dtype
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file
from transformers.utils.loading_report import LoadStateDictInfo

from config.errors import OptionError, first_line
from config.options import Options
from config.text import load_json
from model.adapters import adapted_modules, adapter_parameters

SAMPLES = 256  # pages of a file that identify it
COMPARED_ROWS = 4096  # rows of two tensors that are in memory at a time to compare them
# Stored buffers that follow from the configuration: rotary frequencies, positions, causal masks.
CONSTANTS = re.compile(r"inv_freq$|position_ids$|(attn|attention|crossattention)\.(masked_)?bias$")
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

Slices = tuple[slice, ...]  # which shard of a full tensor: a slice of each dimension; () is the full tensor


@dataclass(frozen=True)
class Stored:
    """A tensor in a safetensors file."""

    file: str
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype | None  # None: unknown to torch

    def read(self, slices: Slices = ()) -> Tensor:
        """A slice of the tensor. The file is mapped for one read only, so its pages do not stay in memory."""
        with safe_open(self.file, framework="pt") as file:
            tensor: Tensor = file.get_slice(self.name)[slices]
            return tensor


@dataclass(frozen=True)
class Source:
    """The source of a parameter: one stored tensor, or several and the converter of transformers that joins them."""

    converter: WeightConverter | None
    stored: dict[str, list[Stored]]  # by name pattern of the converter

    def join(
        self, target: str, model: PreTrainedModel, read: Callable[[Stored], Tensor], rows: slice = slice(None)
    ) -> dict[str, Tensor]:
        """The converted tensors by parameter name. `target` is the first of these names.

        `rows` selects from the stored tensors of each pattern.
        """
        if self.converter is None:
            ((stored,),) = self.stored.values()
            return {target: read(stored)}
        converter = copy.deepcopy(self.converter)  # it collects the added tensors
        for pattern, tensors in self.stored.items():
            for stored in tensors[rows]:
                converter.add_tensor(target, stored.name, pattern, read(stored))
        joined = converter.convert(target, model=model, config=model.config)
        return {name: tensor[0] if isinstance(tensor, list) else tensor for name, tensor in joined.items()}

    def is_stack(self) -> bool:
        """Whether index i of the first dimension needs only the i-th stored tensor of each pattern: one expert."""
        operations = self.converter.operations if self.converter else []
        stacks = [isinstance(operation, MergeModulelist) and operation.dim == 0 for operation in operations]
        return stacks == [True] or (stacks == [True, False] and getattr(operations[1], "dim", 0) > 0)


Weights = dict[str, Source]  # by the name of the parameter or saved buffer; empty for random weights


def find_weights(options: Options, model: PreTrainedModel) -> Weights:
    """The source of each tensor of `model` in the files of `model_name_or_path`; empty for random weights.

    Reads only headers. Raises OptionError unless the files are complete and contain each tensor of the model once, with
    the right shape, and no other tensor.
    """
    if not options.model_name_or_path:
        return {}
    try:
        return _match(list(_read_headers(options.model_name_or_path)), model)
    except (OSError, ValueError) as error:
        raise OptionError(
            f"model_name_or_path {options.model_name_or_path}: {first_line(error)}\n"
            f"pass a complete checkpoint of a {type(model).__name__} in safetensors, as `save_pretrained` writes it"
        ) from error


def _read_headers(name: str) -> Iterator[Stored]:
    """All tensors of a directory or hub repository. Raises ValueError or OSError for damaged or inconsistent files."""
    for path, listed in find_files(name).items():
        try:
            with safe_open(path, framework="pt") as file:
                names = set(file.keys())
                if listed is not None and names != listed:
                    raise ValueError(f"{path.name} and the index do not agree about {min(names ^ listed)}")
                for key in names:
                    view = file.get_slice(key)
                    yield Stored(str(path), key, tuple(view.get_shape()), str_to_torch_dtype.get(view.get_dtype()))
        except SafetensorError as error:  # an invalid header, or one that disagrees with the file's size
            raise ValueError(f"{path.name} is damaged: {error}") from error


def find_files(name: str) -> dict[Path, set[str] | None]:
    """The safetensors files of a directory or hub repository, with the names that an index lists for them, if any.

    Raises ValueError without such files, or for an index that is none; OSError for a directory that is not there.
    """
    if single := cached_file(name, SAFE_WEIGHTS_NAME, _raise_exceptions_for_missing_entries=False):
        return {Path(single): None}
    index = cached_file(name, SAFE_WEIGHTS_INDEX_NAME, _raise_exceptions_for_missing_entries=False)
    if not index:
        raise ValueError(f"it has no {SAFE_WEIGHTS_NAME} and no index; pickled weights (.bin) are never read")
    try:
        listed: dict[str, set[str]] = {}
        for tensor, file in load_json(Path(index).read_text())["weight_map"].items():
            listed.setdefault(file, set()).add(tensor)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{SAFE_WEIGHTS_INDEX_NAME} is not an index: {first_line(error)}") from error
    for file in listed:
        if Path(str(file)).name != file:
            raise ValueError(f"{SAFE_WEIGHTS_INDEX_NAME} names {file}, which is not a file in its directory")
    return {Path(cached_file(name, file)): tensors for file, tensors in listed.items()}


def _match(stored: Iterable[Stored], model: PreTrainedModel) -> Weights:
    """The source of each tensor of the model. Raises ValueError for missing, unexpected or misshapen tensors."""
    adapters = adapter_parameters(model)
    expected = {name: tensor for name, tensor in model.state_dict(keep_vars=True).items() if name not in adapters}
    conversions = get_model_conversion_mapping(model)
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    weights: Weights = {}
    unexpected = set()
    for tensor in sorted(stored, key=lambda tensor: dot_natural_key(tensor.name)):  # expert 10 after expert 9
        target, pattern = rename_source_key(tensor.name, renamings, converters, model.base_model_prefix, expected)
        if target not in expected and tensor.name in expected:  # it needs no renaming
            target, pattern = tensor.name, None
        if target not in expected:
            unexpected.add(tensor.name)
            continue
        if expected[target].is_floating_point() and tensor.dtype not in FLOATS:
            raise ValueError(f"{tensor.name} is quantized, in {tensor.dtype}")
        source = weights.setdefault(target, Source(by_pattern[pattern] if pattern else None, {}))
        if source.stored and source.converter is None:
            raise ValueError(f"{target} is stored twice")
        source.stored.setdefault(pattern or tensor.name, []).append(tensor)

    shapes: dict[str, list[int]] = {}
    for target, source in weights.items():
        try:
            joined = source.join(target, model, lambda stored: torch.empty(stored.shape, device="meta"))
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"{target} cannot be joined: {first_line(error)}") from error
        shapes |= {name: list(tensor.shape) for name, tensor in joined.items()}

    # Tied tensors are one tensor, so one of its names is enough.
    found = {id(expected[name]) for name in shapes if name in expected}
    missing = {name for name, tensor in expected.items() if id(tensor) not in found}
    info = LoadStateDictInfo(missing, unexpected | (shapes.keys() - expected.keys()), set(), [], {}, set())
    model._adjust_missing_and_unexpected_keys(info)  # the model's class excuses some
    for kind, names in (("missing", info.missing_keys), ("unexpected", info.unexpected_keys)):
        if names:
            raise ValueError(f"{len(names)} {kind} tensors, for instance {min(names)}")
    _report_unused(model, unexpected)
    for name, shape in shapes.items():
        if shape != list(expected[name].shape):
            raise ValueError(f"mismatched shapes: {name} is {shape}, and {list(expected[name].shape)} in the model")
    return _merge_tied(weights, expected)


def _report_unused(model: PreTrainedModel, names: set[str]) -> None:
    """Say which stored tensors the export will not hold. Raises ValueError unless the model is complete without them.

    `names` are the tensors that the class of the model ignores when it loads a checkpoint.
    """
    kind, layers = type(model).__name__, model.config.get_text_config().num_hidden_layers
    names = {name for name in names if not CONSTANTS.search(name)}
    predictors = {name for name in names if "mtp" in name or _layer_number(name) >= layers}
    if others := names - predictors:
        raise ValueError(
            f"{len(others)} tensors, for instance {min(others)}, are not in {kind}, and the export would lose them"
        )
    if predictors and os.environ.get("RANK", "0") == "0":
        print(
            f"model_name_or_path: {len(predictors)} tensors of multi-token prediction, for instance "
            f"{min(predictors)}, are neither trained nor exported",
            file=sys.stderr,
        )


def _layer_number(name: str) -> int:
    """The number of the layer that a stored tensor belongs to; -1 outside of layers."""
    found = re.search(r"(?:^|\.)layers\.(\d+)\.", name)
    return int(found[1]) if found else -1


def _merge_tied(weights: Weights, expected: dict[str, Tensor]) -> Weights:
    """Remove the second source of each tied tensor. Raises ValueError if its values differ from the first."""
    names: dict[int, str] = {}
    for name in weights:
        first = names.setdefault(id(expected[name]), name)
        if first != name:
            ((one,),), ((other,),) = weights[first].stored.values(), weights[name].stored.values()
            for row in range(0, one.shape[0], COMPARED_ROWS):
                rows = (slice(row, row + COMPARED_ROWS),)
                if not one.read(rows).equal(other.read(rows)):
                    raise ValueError(f"{one.name} and {other.name} differ, but tie_word_embeddings is true")
    return {name: weights[name] for name in names.values()}


def files_of(weights: Weights) -> set[str]:
    """The paths of the files that hold `weights`; empty for random weights."""
    stored = (tensor for source in weights.values() for tensors in source.stored.values() for tensor in tensors)
    return {tensor.file for tensor in stored}


def fingerprint_files(files: Iterable[str | Path]) -> str:
    """SHA-256 over samples of each file: the first MiB with its header, and SAMPLES pages at equal distances.

    A model that was trained on has other values in most layers, so it differs in samples. Reads no more than 2 MiB of a
    file, because every rank calls.
    """
    digest = hashlib.sha256()
    for path in sorted(map(str, files)):
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            digest.update(f"{size} ".encode() + file.read(2**20))
            for number in range(SAMPLES):
                digest.update(os.pread(file.fileno(), 4096, size * number // SAMPLES))
    return digest.hexdigest()


@torch.no_grad()
def load_weights(model: PreTrainedModel, weights: Weights | None) -> None:
    """Set each parameter and buffer of a model in place: from the files of `weights`, or to initial values.

    If `weights` is None, sets only the buffers that are not saved, because a checkpoint will hold the other tensors.

    A rank reads only its shard of a parameter. Tensors that are not in the files are initialized in full, one at a time
    from torch's RNG, as transformers does. So with one seed, they are equal on all ranks and under both strategies.
    Parameters are drawn on the GPU if there is one: the CPU draws 50 million values a second. A GPU draws other values
    than the CPU. Needs memory for one tensor, or for this rank's experts of a layer.
    """
    tensors = model.state_dict(keep_vars=True)
    filled = set() if weights is not None else {id(tensor) for tensor in tensors.values()}
    for first, source in (weights or {}).items():
        joined = {first: tensors[first]}
        local, slices = _local_shard(tensors[first])
        if source.converter is None:
            ((stored,),) = source.stored.values()
            local.copy_(stored.read(slices))  # also casts
        elif source.is_stack():
            if local.numel():
                local.copy_(source.join(first, model, Stored.read, rows=slices[0])[first][:, *slices[1:]])
        else:  # the conversion may need the full tensors
            joined = source.join(first, model, Stored.read)
            for name, full in joined.items():
                local, slices = _local_shard(tensors[name])
                local.copy_(full[slices])
        filled |= {id(tensors[name]) for name in joined}
    _initialize(model, filled | _initialize_adapters(model))


def _initialize_adapters(model: PreTrainedModel) -> set[int]:
    """Initialize adapters as PEFT does: A uniform, as a linear module by default, and B zero. Returns their ids.

    Draws full matrices on the CPU from torch's RNG, so with one seed, they are equal on all ranks and topologies.
    """
    for module in adapted_modules(model).values():
        local, slices = _local_shard(module.lora_A.weight)
        local.copy_(nn.init.kaiming_uniform_(torch.empty(module.lora_A.weight.shape), a=math.sqrt(5))[slices])
        _local_shard(module.lora_B.weight)[0].zero_()
    return {id(parameter) for parameter in adapter_parameters(model).values()}


def _initialize(model: PreTrainedModel, filled: set[int]) -> None:
    """Initialize, as transformers does, the tensors that are not `filled`. Raises OptionError if its class cannot.

    A module may also set tensors of the modules within it, which replaces their earlier values. These modules may be
    sharded, so transformers always gets a copy with full tensors, which have no memory unless it sets them.
    """
    drawn: set[int] = set()
    owners: dict[int, str] = {}  # of the tensors that are not initialized yet: a description
    for module, owner in _bottom_up(model, model, set()):
        own = {id(tensor) for tensor in (module._parameters | module._buffers).values() if tensor is not None}
        within = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
        tied = own & drawn  # initialized with its first use
        missing = {key: tensor for key, tensor in within.items() if key not in filled | tied}
        if not missing:
            continue
        for name, tensor in (module._parameters | module._buffers).items():
            if id(tensor) in missing:
                owners[id(tensor)] = f"{name} of its {type(module).__name__}"
        has_children = next(module.children(), None) is not None
        chosen = (_changed_by_init(module, owner, within) if has_children else own) & missing.keys()
        full = {key: _unset(tensor) for key, tensor in missing.items() if key in chosen | own}
        owner._init_weights(_stand_in(module, {key: _on_meta(tensor) for key, tensor in within.items()} | full, {}))
        for key, values in full.items():
            is_set = not values.isnan().any() if values.is_floating_point() else values._version > 0
            if is_set:
                local, slices = _local_shard(missing[key])
                local.copy_(values[slices])
                drawn.add(key)
    if lacking := owners.keys() - drawn:
        drawn |= _set_as_constructed(model, lacking)
    if lacking := owners.keys() - drawn:
        raise OptionError(
            f"{type(model).__name__}: {min(owners[key] for key in lacking)} is in no file, and _init_weights of its "
            "class does not initialize it\npass a model whose code is in transformers"
        )
    filled |= drawn


def _set_as_constructed(model: PreTrainedModel, lacking: set[int]) -> set[int]:
    """Set tensors to the values that the constructor of their module gives them; returns the ids of those that it can.

    Only these modules are constructed, one at a time on the CPU, with the arguments that the model gave to each.
    """
    modules = {
        name: module
        for name, module in model.named_modules()
        if not isinstance(module, PreTrainedModel)
        and any(id(tensor) in lacking for tensor in (module._parameters | module._buffers).values())
    }
    kinds = {_class_before_sharding(module) for module in modules.values()}
    arguments: dict[nn.Module, tuple[Any, Any]] = {}

    def note(kind: type[nn.Module], construct: Callable[..., None]) -> Callable[..., None]:
        def constructor(self: nn.Module, *given: Any, **named: Any) -> None:
            construct(self, *given, **named)
            if type(self) is kind:
                arguments[self] = given, named

        return constructor

    found = set()
    originals = {kind: kind.__init__ for kind in kinds}
    for kind, construct in originals.items():
        kind.__init__ = note(kind, construct)  # type: ignore[method-assign]
    try:
        with torch.device("meta"):
            again = dict(type(model)(copy.deepcopy(model.config)).named_modules())
    finally:
        for kind, construct in originals.items():
            kind.__init__ = construct  # type: ignore[method-assign]
    for name, module in modules.items():
        if (twin := again.get(name)) not in arguments:
            continue
        given, named = arguments[twin]
        values = type(twin)(*given, **named)
        for key, tensor in (module._parameters | module._buffers).items():
            full = (values._parameters | values._buffers).get(key)
            if full is not None and id(tensor) in lacking:
                local, slices = _local_shard(tensor)
                local.copy_(full[slices])
                found.add(id(tensor))
    return found


def _class_before_sharding(module: nn.Module) -> type[nn.Module]:
    """The class of a module. fully_shard replaces it by a subclass, which cannot be constructed."""
    kind = next(base for base in type(module).__mro__ if not issubclass(base, FSDPModule))
    assert issubclass(kind, nn.Module)
    return kind


def _bottom_up(
    module: nn.Module, owner: PreTrainedModel, seen: set[nn.Module]
) -> Iterator[tuple[nn.Module, PreTrainedModel]]:
    """Each module once, after its children, with the innermost model that contains it, which can initialize it."""
    if module in seen:
        return
    seen.add(module)
    for child in module.children():
        yield from _bottom_up(child, child if isinstance(child, PreTrainedModel) else owner, seen)
    yield module, owner


def _changed_by_init(module: nn.Module, owner: PreTrainedModel, within: dict[int, Tensor]) -> set[int]:
    """The ids of the tensors in `module` and its children that `_init_weights(module)` sets."""
    empty = {key: _on_meta(tensor) for key, tensor in within.items()}
    before = torch.get_rng_state()
    try:
        owner._init_weights(_stand_in(module, empty, {}))
    except (RuntimeError, NotImplementedError):  # it reads values, and tensors without memory have none
        return set(within)
    finally:
        torch.set_rng_state(before)
    return {key for key, tensor in empty.items() if tensor._version > 0}


def _stand_in(module: nn.Module, tensors: dict[int, Tensor], copies: dict[int, nn.Module]) -> nn.Module:
    """A copy of a module and its children with other parameters and buffers: `tensors`, by the id of the original."""
    if id(module) in copies:
        return copies[id(module)]
    kind = _class_before_sharding(module)
    copied: nn.Module = kind.__new__(kind)
    copies[id(module)] = copied
    copied.__dict__ = dict(module.__dict__)
    copied._parameters = {
        name: None if old is None else nn.Parameter(tensors[id(old)], requires_grad=False)
        for name, old in module._parameters.items()
    }
    copied._buffers = {name: None if old is None else tensors[id(old)] for name, old in module._buffers.items()}
    copied._modules = {
        name: None if child is None else _stand_in(child, tensors, copies) for name, child in module._modules.items()
    }
    return copied


def _on_meta(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")


def _unset(tensor: Tensor) -> Tensor:
    """A full tensor that shows which of its values nobody set: of a parameter on the GPU, of a buffer on the CPU.

    Buffers are computed, not drawn, and a GPU would round rotary frequencies in another way.
    """
    device = "cuda" if isinstance(tensor, nn.Parameter) and torch.cuda.is_available() else "cpu"
    return torch.full(tensor.shape, torch.nan if tensor.is_floating_point() else 0, dtype=tensor.dtype, device=device)


def _local_shard(tensor: Tensor) -> tuple[Tensor, Slices]:
    """This rank's shard of a parameter or buffer, and its position in the full tensor."""
    if not isinstance(tensor, DTensor):
        return tensor, tuple(slice(0, size) for size in tensor.shape)
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tensor.to_local(), tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))
