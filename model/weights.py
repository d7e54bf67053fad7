"""Weights for a model without values: found on the disk and checked by their headers, read in slices; or drawn.

Only safetensors and JSON are read; nothing is ever unpickled. A parameter may be sharded (a DTensor): a rank then reads
and keeps its own part alone. Which names on the disk are which parameters, transformers knows: names are changed, and
in some models several stored tensors are joined, such as the experts of a layer.
"""

import copy
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
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

ROWS = 4096  # of a tensor, that are read at once to compare two

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

Place = tuple[slice, ...]

"""Where a part lies in a whole tensor: a slice of each dimension; () is the whole."""


@dataclass(frozen=True)
class Stored:
    """A tensor in a safetensors file."""

    file: str
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype | None  # None: one that torch has not

    def read(self, place: Place = ()) -> Tensor:
        """A part of it. The file is mapped for this one read, so that its pages do not stay in this rank's memory."""
        with safe_open(self.file, framework="pt") as file:
            part: Tensor = file.get_slice(self.name)[place]
            return part


@dataclass(frozen=True)
class Source:
    """What a parameter is made of: one stored tensor, or several and the converter of transformers that joins them."""

    converter: WeightConverter | None
    stored: dict[str, list[Stored]]  # by the converter's patterns for their names

    def join(
        self, target: str, model: PreTrainedModel, read: Callable[[Stored], Tensor], rows: slice = slice(None)
    ) -> dict[str, Tensor]:
        """What becomes of the stored tensors, by the names of parameters: `target`, or the first one of several.

        `rows` selects among the stored tensors of each pattern.
        """
        if self.converter is None:
            ((stored,),) = self.stored.values()
            return {target: read(stored)}
        converter = copy.deepcopy(self.converter)  # it collects what it is given
        for pattern, tensors in self.stored.items():
            for stored in tensors[rows]:
                converter.add_tensor(target, stored.name, pattern, read(stored))
        joined = converter.convert(target, model=model, config=model.config)
        return {name: tensor[0] if isinstance(tensor, list) else tensor for name, tensor in joined.items()}

    def is_stack(self) -> bool:
        """Whether each row of the parameter is made of one stored tensor a pattern: of one expert, in a mixture."""
        operations = self.converter.operations if self.converter else []
        stacks = [isinstance(operation, MergeModulelist) and operation.dim == 0 for operation in operations]
        return stacks == [True] or (stacks == [True, False] and getattr(operations[1], "dim", 0) > 0)


Weights = dict[str, Source]

"""The source of each parameter and saved buffer; none of random weights."""


def find_weights(options: Options, model: PreTrainedModel) -> Weights:
    """Where the files of `model_name_or_path` have the tensors of `model`; an empty dictionary for random weights.

    Reads headers, and no tensor. Raises OptionError unless the files are whole and hold every tensor of the model once,
    in its shape, and no other.
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
    """All tensors of a directory or hub repository. Raises ValueError or OSError for files that are not as they say."""
    for path, listed in _find_files(name).items():
        try:
            with safe_open(path, framework="pt") as file:
                names = set(file.keys())
                if listed is not None and names != listed:
                    raise ValueError(f"{path.name} and the index do not agree about {min(names ^ listed)}")
                for key in names:
                    view = file.get_slice(key)
                    yield Stored(str(path), key, tuple(view.get_shape()), str_to_torch_dtype.get(view.get_dtype()))
        except SafetensorError as error:  # a header that is none, or more or less data than it tells of
            raise ValueError(f"{path.name} is damaged: {error}") from error


def _find_files(name: str) -> dict[Path, set[str] | None]:
    """The safetensors files of a directory or hub repository; where there is an index, with the names it lists."""
    if whole := cached_file(name, SAFE_WEIGHTS_NAME, _raise_exceptions_for_missing_entries=False):
        return {Path(whole): None}
    index = cached_file(name, SAFE_WEIGHTS_INDEX_NAME, _raise_exceptions_for_missing_entries=False)
    if not index:
        raise ValueError(
            f"it has no {SAFE_WEIGHTS_NAME}, whole or with an index; pickled weights (.bin) are never read"
        )
    try:
        listed: dict[str, set[str]] = {}
        for tensor, file in json.loads(Path(index).read_text())["weight_map"].items():
            listed.setdefault(file, set()).add(tensor)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{SAFE_WEIGHTS_INDEX_NAME} is no index: {first_line(error)}") from error
    for file in listed:
        if Path(str(file)).name != file:
            raise ValueError(f"{SAFE_WEIGHTS_INDEX_NAME} names {file}, which is not a file beside it")
    return {Path(cached_file(name, file)): tensors for file, tensors in listed.items()}


def _match(stored: Iterable[Stored], model: PreTrainedModel) -> Weights:
    """The source of each tensor of the model. Raises ValueError for what is missing, unexpected or misshapen."""
    expected = model.state_dict(keep_vars=True)
    conversions = get_model_conversion_mapping(model)
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    weights: Weights = {}
    unexpected = set()
    for tensor in sorted(stored, key=lambda tensor: dot_natural_key(tensor.name)):  # expert 10 after expert 9
        target, pattern = rename_source_key(tensor.name, renamings, converters, model.base_model_prefix, expected)
        if target not in expected and tensor.name in expected:  # it has that name already
            target, pattern = tensor.name, None
        if target not in expected:
            unexpected.add(tensor.name)
            continue
        if expected[target].is_floating_point() and tensor.dtype not in FLOATS:
            raise ValueError(f"{tensor.name} is quantized, in {tensor.dtype}")
        source = weights.setdefault(target, Source(by_pattern[pattern] if pattern else None, {}))
        if source.stored and source.converter is None:
            raise ValueError(f"{target} is there twice")
        source.stored.setdefault(pattern or tensor.name, []).append(tensor)

    shapes: dict[str, list[int]] = {}
    for target, source in weights.items():
        try:
            joined = source.join(target, model, lambda stored: torch.empty(stored.shape, device="meta"))
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"{target} cannot be made of its parts: {first_line(error)}") from error
        shapes |= {name: list(tensor.shape) for name, tensor in joined.items()}

    # Tied tensors are one tensor: any of its names will do.
    given = {id(expected[name]) for name in shapes if name in expected}
    missing = {name for name, tensor in expected.items() if id(tensor) not in given}
    info = LoadStateDictInfo(missing, unexpected | (shapes.keys() - expected.keys()), set(), [], {}, set())
    model._adjust_missing_and_unexpected_keys(info)  # some need not be there, or may be: the model's class says which
    for kind, names in (("missing", info.missing_keys), ("unexpected", info.unexpected_keys)):
        if names:
            raise ValueError(f"{len(names)} {kind} tensors, for instance {min(names)}")
    for name, shape in shapes.items():
        if shape != list(expected[name].shape):
            raise ValueError(f"mismatched shapes: {name} is {shape}, and {list(expected[name].shape)} in the model")
    return _once(weights, expected)


def _once(weights: Weights, expected: dict[str, Tensor]) -> Weights:
    """Without the second source of a tied tensor. Raises ValueError if it is another one than the first."""
    names: dict[int, str] = {}
    for name in weights:
        first = names.setdefault(id(expected[name]), name)
        if first != name:
            ((one,),), ((other,),) = weights[first].stored.values(), weights[name].stored.values()
            for row in range(0, one.shape[0], ROWS):
                rows = (slice(row, row + ROWS),)
                if not one.read(rows).equal(other.read(rows)):
                    raise ValueError(f"{one.name} and {other.name} differ, and tie_word_embeddings says they do not")
    return {name: weights[name] for name in names.values()}


def fingerprint_files(weights: Weights) -> str:
    """SHA-256 over the beginning of each file: its header, and values enough to tell one training from another."""
    digest = hashlib.sha256()
    stored = (tensor for source in weights.values() for part in source.stored.values() for tensor in part)
    for path in sorted({tensor.file for tensor in stored}):
        with open(path, "rb") as file:
            digest.update(file.read(2**20))
    return digest.hexdigest()


@torch.no_grad()
def load_weights(model: PreTrainedModel, weights: Weights | None) -> None:
    """Give each parameter and buffer of a model its values, in place: those of the files, or initial ones.

    Without `weights`, only what no checkpoint holds, buffers that are not saved: the rest is to come from one.

    Each rank reads its part of a sharded parameter alone. What the files do not have is drawn on the CPU from torch's
    RNG, as transformers draws it, and whole: with one seed, it is the same on all ranks and under either strategy.
    Costs host memory for one tensor, or for a layer's experts on this rank.
    """
    tensors = model.state_dict(keep_vars=True)
    filled = set() if weights is not None else {id(tensor) for tensor in tensors.values()}
    for first, source in (weights or {}).items():
        joined = {first: tensors[first]}
        local, place = _of_rank(tensors[first])
        if source.converter is None:
            ((stored,),) = source.stored.values()
            local.copy_(stored.read(place))  # and cast
        elif source.is_stack():
            if local.numel():
                local.copy_(source.join(first, model, Stored.read, rows=place[0])[first][:, *place[1:]])
        else:  # the conversion may do anything with the whole
            joined = source.join(first, model, Stored.read)
            for name, whole in joined.items():
                local, place = _of_rank(tensors[name])
                local.copy_(whole[place])
        filled |= {id(tensors[name]) for name in joined}
    _draw(model, filled)


def _draw(model: PreTrainedModel, filled: set[int]) -> None:
    """Initialize, as transformers does, the tensors that are not `filled`: drawn weights, and buffers nobody saves.

    Raises OptionError for one that the model's class does not initialize.
    """
    for module, owner in _bottom_up(model, model):
        own = {name: tensor for name, tensor in (module._parameters | module._buffers).items() if tensor is not None}
        wanting = {name: tensor for name, tensor in own.items() if id(tensor) not in filled}
        if not wanting:
            continue
        # Instead of the module, one with whole tensors on the CPU; what is filled has no values there.
        whole = {name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") for name, tensor in own.items()}
        for name, tensor in wanting.items():
            whole[name] = torch.full(tensor.shape, torch.nan if tensor.is_floating_point() else 0, dtype=tensor.dtype)
        stand_in = copy.copy(module)
        stand_in._parameters = module._parameters | {
            name: nn.Parameter(whole[name]) for name, parameter in module._parameters.items() if parameter is not None
        }
        stand_in._buffers = module._buffers | {name: whole[name] for name in whole.keys() & module._buffers.keys()}
        owner._init_weights(stand_in)
        for name, tensor in wanting.items():
            if whole[name].isnan().any():
                raise OptionError(
                    f"{type(owner).__name__}: {name} of its {type(module).__name__} is in no file, and _init_weights "
                    "of its class does not initialize it\npass a model whose code is that of transformers"
                )
            local, place = _of_rank(tensor)
            local.copy_(whole[name][place])
        filled |= {id(tensor) for tensor in wanting.values()}


def _bottom_up(module: nn.Module, owner: PreTrainedModel) -> Iterator[tuple[nn.Module, PreTrainedModel]]:
    """Each module after its children, beside the model that knows how to initialize it: the innermost it is part of."""
    for child in module.children():
        yield from _bottom_up(child, child if isinstance(child, PreTrainedModel) else owner)
    yield module, owner


def _of_rank(tensor: Tensor) -> tuple[Tensor, Place]:
    """What this rank keeps of a parameter or buffer, and where that lies in the whole: a slice of each dimension."""
    if not isinstance(tensor, DTensor):
        return tensor, tuple(slice(0, size) for size in tensor.shape)
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tensor.to_local(), tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))
