"""Buckets of gradients that stay the same from the first step of a process to its last."""

from collections.abc import Iterable
from itertools import groupby
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel


class FixedBuckets(DistributedDataParallel):
    """DistributedDataParallel that knows the order of its gradients before the first step. Every rank must call.

    DDP begins with one bucket. After its first backward pass, it builds others, in the order in which gradients came. A
    sum over three or more ranks is rounded according to a gradient's place in its bucket. So the first step after a
    resume would differ in the last bits from this step of a run that was not interrupted. Here DDP builds the final
    buckets at once, which costs no step, and they end where those of DDP would.
    """

    def __init__(self, module: nn.Module, decoder_layers: Iterable[nn.Module], **settings: Any) -> None:
        self.order = backward_order(module, decoder_layers)
        super().__init__(module, **settings)
        self.reducer._push_all_rebuilt_params()
        self.reducer._rebuild_buckets()  # broadcasts the buckets of rank 0

    def _build_params_for_reducer(self) -> tuple[list[nn.Parameter], list[bool]]:
        parameters, sparse = super()._build_params_for_reducer()  # type: ignore[no-untyped-call]
        is_sparse = dict(zip(parameters, sparse, strict=True))
        ordered = [parameter for parameter in self.order if parameter in is_sparse]  # without those that are frozen
        return ordered, [is_sparse[parameter] for parameter in ordered]


def backward_order(module: nn.Module, decoder_layers: Iterable[nn.Module]) -> list[nn.Parameter]:
    """The parameters in the order in which the backward pass completes their gradients, but for norms and biases.

    From the last parameter to the first. Within a decoder layer, vectors come after matrices: they fill no bucket, but
    a bucket waits for all of its gradients, and the last one of a layer is that of the norm before its attention.
    """
    layer_of = {parameter: layer for layer in decoder_layers for parameter in layer.parameters()}
    order: list[nn.Parameter] = []
    for _, group in groupby(reversed(list(module.parameters())), key=layer_of.get):
        order += sorted(group, key=lambda parameter: parameter.ndim < 2)
    return order
