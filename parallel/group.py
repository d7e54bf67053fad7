"""A process group as plain values, and the hooks that tensor and context parallelism share."""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn import functional


class Group(NamedTuple):
    """A tensor-parallel or context-parallel group in plain values, which compiled code can hold."""

    name: str
    size: int
    rank: int  # of this process within the group


def map_hidden_states(change: Callable[[Tensor], Tensor], inputs: tuple[Any, ...], named: dict[str, Any]) -> Any:
    """Apply `change` to the hidden states among the inputs of a transformers module: the first input, or by name."""
    if inputs:
        return (change(inputs[0]), *inputs[1:]), named
    return inputs, named | {"hidden_states": change(named["hidden_states"])}


def pad_sequences(group: Group, objective: nn.Module, inputs: tuple[()], named: dict[str, Any]) -> Any:
    """Pad sequences to a multiple of the group size. The padding is masked, and no earlier position looks at it."""
    tokens = named["input_ids"].shape[1]
    more = -tokens % group.size
    padded = {
        name: functional.pad(named[name], (0, more), value=value)
        for name, value in (("input_ids", 0), ("labels", -100), ("position_ids", 0))
        if named.get(name) is not None
    }
    ends = named.get("document_ends")  # offsets into all sequences, concatenated
    if ends is not None:
        # The padding belongs to the last document of its sequence.
        padded["document_ends"] = ends + ends // tokens * more
    return inputs, named | padded
