"""Layers that carry a state from token to token, such as linear attention, convolutions and state-space models.

In a packed sequence, the state at the end of a document must not reach the next document. Attention has a mask that
keeps it within documents. A recurrence has none, so it is computed for each document alone.

Shapes: B sequences of a micro-batch, T tokens of a sequence, N documents of a group, L tokens of the longest of them.
"""

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from model.layers import decoder_layers

# Scans in chunks pad a document to a chunk, so documents that are shorter than this are never worth a group more.
SHORT = 64


class Boundaries:
    """Where the documents of a micro-batch begin and end, for all modules of a model that restart there.

    They stay until the next forward pass, because gradient checkpointing computes layers again in the backward pass.
    """

    def __init__(self) -> None:
        self.shape = (0, 0)  # B and T
        self.groups: list[Tensor] = []  # int64 [N, L] each: positions among B x T. Empty: a document is a sequence
        self.order = torch.empty(0)  # int64 [B x T]: which entry of the flattened groups holds a position
        # For kernels that know documents (model/documents/kernels.py):
        self.ends = self.ends_on_cpu = torch.empty(0)  # int64 [documents + 1]
        self.documents = torch.empty(0)  # int32 [1, B x T]: the document of a position

    def read(self, model: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        """Take the boundaries from `document_ends` (data/batches.py) among the arguments: a forward pre-hook."""
        self.groups = []
        if (document_ends := named.get("document_ends")) is None:
            return
        self.shape = tuple(named["input_ids"].shape)
        # `to_device` leaves a copy in CPU memory. Without it, the CPU synchronizes with the GPU.
        ends = getattr(document_ends, "on_cpu", document_ends).tolist()
        if all(end % self.shape[1] == 0 for end in ends):
            return
        device = named["input_ids"].device
        positions, used = [], []
        for documents in group_documents(ends):
            spans = torch.tensor(documents)
            offset_L = torch.arange(int(spans.diff().max()))
            positions.append(spans[:, :1] + offset_L)
            used.append(offset_L < spans.diff())
        entries = torch.cat([each.flatten() for each in used]).nonzero().squeeze(1)
        order = torch.empty(ends[-1], dtype=torch.int64)
        order[torch.cat([each.flatten() for each in positions])[entries]] = entries
        # A shorter document is followed by tokens of others. They come after it, so they do not change it.
        self.groups = [_to(each.clamp(max=ends[-1] - 1), device) for each in positions]
        self.order = _to(order, device)
        self.ends_on_cpu = torch.tensor(ends)
        self.ends = _to(self.ends_on_cpu, device)
        numbers = torch.arange(len(ends) - 1, dtype=torch.int32)
        self.documents = _to(numbers.repeat_interleave(self.ends_on_cpu.diff())[None], device)
        self.documents.number = len(numbers)  # type: ignore[attr-defined]  # without a synchronization


def restart_at_documents(model: PreTrainedModel, kinds: set[type[nn.Module]]) -> None:
    """Make each module of `kinds` (see `stateful_kinds`) restart at the boundaries of documents, in place.

    Such a module then computes each document of `document_ends`, an argument of the forward pass, alone: groups of
    documents of similar length are padded to the longest, and are a batch each. Forward and gradient are exact. The
    module must be called as f([B, T, ...], ...), and its results must be [B, T, ...]. Its computation is not compiled.
    Must be called before the model is compiled or wrapped. No kinds change nothing.
    """
    modules = [module for module in model.modules() if type(module) in kinds]
    if not modules:
        return
    if not restarts_at_documents(model):
        model.document_boundaries = Boundaries()
        model.register_forward_pre_hook(model.document_boundaries.read, with_kwargs=True)
    for module in modules:
        if "forward" not in vars(module):
            alone = partial(_each_alone, module.forward, model.document_boundaries)
            module.forward = torch.compiler.disable(alone)  # type: ignore[no-untyped-call]


def restarts_at_documents(model: nn.Module) -> bool:
    """Whether `restart_at_documents` has changed `model`."""
    return hasattr(model, "document_boundaries")


def group_documents(ends: list[int]) -> list[list[tuple[int, int]]]:
    """Group documents of similar length. A document is (start, end), and starts at the end of the one before.

    Each group is padded to its longest document. No document is shorter than half of that, except in the group of the
    short documents. So padding at most doubles the tokens, and the number of groups is logarithmic in the length.
    """
    groups: list[list[tuple[int, int]]] = []
    longest = 0
    for start, end in sorted(pairwise(ends), key=lambda document: document[0] - document[1]):
        if not groups or (longest > SHORT and 2 * (end - start) < longest):
            groups.append([])
            longest = end - start
        groups[-1].append((start, end))
    return groups


def stateful_kinds(model: PreTrainedModel) -> set[type[nn.Module]]:
    """The classes of the modules of `model` that carry a state over the boundary between packed documents.

    They are found by experiment, so `model` must be small and have values. Each module inside the decoder layers that
    maps [B, T, ...] to [B, T, ...] is called again with another first document. If its result changes in the second
    document, it leaks. The innermost modules that leak are returned. A module that does more, such as a layer
    that leaks outside of its modules, is found again after its inner modules restart. A decoder layer is never
    returned, because FSDP must run it once per micro-batch. `model` is changed: it restarts at documents.
    """
    kinds: set[type[nn.Module]] = set()
    while found := _leaking(model) - kinds:
        kinds |= found
        restart_at_documents(model, found)
    return kinds


SEQUENCES, FIRST, TOKENS = 2, 16, 29  # two sequences of documents of 16 and 13 tokens; no size of a model is 29


def _leaking(model: PreTrainedModel) -> set[type[nn.Module]]:
    """The classes of the innermost modules that leak in one forward pass."""
    layers, training = decoder_layers(model), model.training
    device = next(model.parameters()).device
    leaking: list[nn.Module] = []
    replaying = False
    generator = torch.Generator().manual_seed(0)

    def replaced(value: Any) -> Any:
        if not (_is_sequence(value) and value.is_floating_point()):
            return value
        noise = torch.randn(value[:, :FIRST].shape, generator=generator).to(value)
        return torch.cat([noise, value[:, FIRST:]], dim=1)

    def replay(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], outputs: Any) -> None:
        nonlocal replaying
        if replaying or not _is_divisible((inputs, named)):
            return
        before = [each[:, FIRST:].clone() for each in tensors_of(outputs) if _is_sequence(each)]
        if not before:
            return
        replaying = True
        again = module.forward(*map_leaves(replaced, inputs), **map_leaves(replaced, named))
        replaying = False
        after = [each[:, FIRST:] for each in tensors_of(again) if _is_sequence(each)]
        if any((a - b).abs().max() > 1e-5 * b.abs().max() for a, b in zip(after, before, strict=True)):
            leaking.append(module)

    inside = {id(module): module for layer in layers for module in layer.modules() if module is not layer}
    for restarting in [module for module in inside.values() if "forward" in vars(module)]:
        for module in restarting.modules():
            inside.pop(id(module), None)
    hooks = [module.register_forward_hook(replay, with_kwargs=True) for module in inside.values()]
    ids_BT = torch.randint(model.config.get_text_config().vocab_size, (SEQUENCES, TOKENS), generator=generator).to(
        device
    )
    positions_T = torch.cat([torch.arange(FIRST), torch.arange(TOKENS - FIRST)])
    positions_BT = positions_T.repeat(SEQUENCES, 1).to(device)
    ends = torch.tensor([0, FIRST, TOKENS, TOKENS + FIRST, 2 * TOKENS], dtype=torch.int32, device=device)
    try:
        with torch.no_grad():
            model.eval()(input_ids=ids_BT, position_ids=positions_BT, document_ends=ends, use_cache=False)
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    outer = {id(module) for module in leaking if any(inner in leaking for inner in list(module.modules())[1:])}
    return {type(module) for module in leaking if id(module) not in outer}


def _each_alone(forward: Callable[..., Any], boundaries: Boundaries, *inputs: Any, **named: Any) -> Any:
    """The results of a module, for each document alone."""
    groups, (sequences, tokens) = boundaries.groups, boundaries.shape
    if not groups:
        return forward(*inputs, **named)

    def gathered(group_NL: Tensor, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if value.shape[:2] in ((sequences, tokens), (1, tokens)):
            flat = value.expand(sequences, *value.shape[1:]).flatten(0, 1)
            return flat.index_select(0, group_NL.flatten()).view(*group_NL.shape, *value.shape[2:])
        if value.dim() == 4 and value.shape[2:] == (tokens, tokens):
            return _gathered_mask(value.expand(sequences, *value.shape[1:]), group_NL)
        return value

    results = []
    boundaries.groups = []  # for modules inside that restart, too: they see documents alone
    try:
        for group_NL in groups:
            documents, length = group_NL.shape
            arguments = map_leaves(partial(gathered, group_NL), named)
            if "document_ends" in named:
                arguments["document_ends"] = torch.arange(
                    0, documents * length + 1, length, dtype=torch.int32, device=group_NL.device
                )
            results.append(forward(*map_leaves(partial(gathered, group_NL), inputs), **arguments))
    finally:
        boundaries.groups = groups

    def restored(*values: Any) -> Any:
        if not isinstance(values[0], Tensor):
            return values[0]
        if any(value.shape[:2] != group_NL.shape for value, group_NL in zip(values, groups, strict=True)):
            return None  # a final state, say: packed documents have none in common
        flat = torch.cat([value.flatten(0, 1) for value in values])
        return flat.index_select(0, boundaries.order).view(sequences, tokens, *values[0].shape[2:])

    return map_leaves(restored, *results)


def _gathered_mask(mask_BHTT: Tensor, group_NL: Tensor) -> Tensor:
    """An attention mask of sequences, bool or added to the scores, as the mask [N, H, L, L] of a group of documents."""
    heads, tokens, length = mask_BHTT.shape[1], mask_BHTT.shape[2], group_NL.shape[1]
    sequence_N, position_NL = group_NL[:, 0] // tokens, group_NL % tokens
    rows_NHLT = mask_BHTT[sequence_N[:, None], :, position_NL].transpose(1, 2)
    mask_NHLL = rows_NHLT.gather(3, position_NL[:, None, None].expand(-1, heads, length, -1))
    # Padding after the last document of a sequence has positions of the next one, which may look like early ones.
    later_LL = torch.ones(length, length, dtype=torch.bool, device=mask_BHTT.device).triu(1)
    return mask_NHLL.masked_fill(later_LL, False if mask_BHTT.dtype == torch.bool else torch.finfo(mask_BHTT.dtype).min)


def map_leaves(function: Callable[..., Any], *values: Any) -> Any:
    """`function` of each leaf of nested tuples, lists and dictionaries of equal structure."""
    first = values[0]
    if isinstance(first, dict):
        return {key: map_leaves(function, *(value[key] for value in values)) for key in first}
    if isinstance(first, (tuple, list)):
        return type(first)(map_leaves(function, *each) for each in zip(*values, strict=True))
    return function(*values)


def tensors_of(value: Any) -> list[Tensor]:
    """The tensors in nested tuples, lists and dictionaries."""
    found: list[Tensor] = []
    map_leaves(lambda leaf: found.append(leaf) if isinstance(leaf, Tensor) else None, value)
    return found


def _is_sequence(value: Any) -> bool:
    """Whether a value of the experiment has an entry for each token: [B, T, ...], or [1, T, ...] for all sequences."""
    return isinstance(value, Tensor) and value.shape[:2] in ((SEQUENCES, TOKENS), (1, TOKENS))


def _is_divisible(arguments: Any) -> bool:
    """Whether `_each_alone` can split all arguments: T is nowhere but in [B, T, ...] and masks [B, 1, T, T]."""
    for tensor in tensors_of(arguments):
        sizes = list(tensor.shape[2 if _is_sequence(tensor) else 0 :])
        if tensor.dim() == 4 and tensor.shape[0] in (1, SEQUENCES) and sizes[2:] == [TOKENS, TOKENS]:
            sizes = sizes[:2]
        if TOKENS in sizes or SEQUENCES * TOKENS in sizes:
            return False
    return True


def _to(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy on `device`. The CPU does not wait for it."""
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)
