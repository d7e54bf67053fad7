"""A process group in values that compiled code can hold, and what tensor and context parallelism share."""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn import functional


class Group(NamedTuple):
    """The ranks that divide a layer, in values that a compiled layer can hold."""

    name: str
    size: int
    rank: int  # of this process in it


def map_hidden_states(change: Callable[[Tensor], Tensor], inputs: tuple[Any, ...], named: dict[str, Any]) -> Any:
    """The inputs of a module of transformers with other hidden states, which come first, or by their name."""
    if inputs:
        return (change(inputs[0]), *inputs[1:]), named
    return inputs, named | {"hidden_states": change(named["hidden_states"])}


def pad_sequences(group: Group, objective: nn.Module, inputs: tuple[()], named: dict[str, Any]) -> Any:
    """Rows as long as can be divided. What is added is no target, and nothing before it looks there."""
    tokens = named["input_ids"].shape[1]
    more = -tokens % group.size
    padded = {
        name: functional.pad(named[name], (0, more), value=value)
        for name, value in (("input_ids", 0), ("labels", -100), ("position_ids", 0))
        if named.get(name) is not None
    }
    ends = named.get("document_ends")  # as offsets into all rows in a line; it belongs to the last one of its row
    if ends is not None:
        padded["document_ends"] = ends + ends // tokens * more
    return inputs, named | padded
