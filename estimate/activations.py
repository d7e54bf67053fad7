"""The activations that a forward pass saves for its backward pass, counted without values and without a GPU."""

import copy
import dataclasses
import functools
import logging
import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy
from transformers import AttentionInterface, PreTrainedModel

from config.errors import OptionError, first_line
from config.options import Options
from loss.next_token import bypass_head
from model.compile import set_recomputation
from model.documents.kernels import torch_kernels
from model.layers import decoder_layers
from parallel.checks import attention_heads
from parallel.tensor import split_on_meta

FP32, BF16 = 4, 2  # bytes
GROUPED_PRODUCT = torch.ops.trainer.grouped_product.default


@dataclasses.dataclass(frozen=True)
class Activations:
    """Bytes that a forward pass saves for its backward pass. Each storage counts once; parameters do not count."""

    layers: int  # in all decoder layers
    largest_layer: int  # in the layer that saves most
    largest_tensor: int  # in a layer
    inputs: int  # the inputs of all layers: with gradient checkpointing, only these are saved
    outside: int  # outside the layers: token ids, the last norm
    largest_result: int = (
        0  # the largest tensor that an operation of a layer makes, saved or not, but a copy of experts
    )


def sequences_per_micro_batch(options: Options) -> int:
    """The sequences of a micro-batch that go through the model; a pair has two."""
    return options.per_device_train_batch_size * (2 if options.objective == "dpo" else 1)


def of_local_sequence(options: Options) -> Options:
    """The options of one rank under context parallelism: its local sequence as the sequence."""
    assert options.block_size
    tokens = math.ceil(options.block_size / options.context_parallel)
    return dataclasses.replace(options, block_size=tokens, context_parallel=1)


def count_activations(model: PreTrainedModel, options: Options) -> Activations:
    """The activations that the forward pass of a micro-batch saves, without gradient checkpointing.

    A copy of the model runs on tensors without values, and the tensors that autograd saves are added up. Costs a second
    or two, and no memory. FSDP passes parameters and inputs to layers in bf16; under DDP, torch.autocast casts. For a
    compiled layer, torch's partitioner chooses what is saved, so the count calls the partitioner. The count assumes
    fused attention where the model has it, and no padding. Experts run on tokens x experts per token rows, whatever
    the routing. With tensor parallelism, a rank saves a split of the layer's input and of the sum in
    its middle, and all gathered positions of both. With context parallelism, a layer saves its attention output twice,
    by heads and by positions, and a copy of keys and values for each rank that shares a head. Raises OptionError for a
    model that does not run this way.
    """
    assert options.block_size
    if (group := options.context_parallel) > 1:
        local_options = of_local_sequence(options)
        activations, heads = count_activations(model, local_options), attention_heads(model.config)
        extra_heads = heads.queries + 2 * (math.lcm(heads.key_values, group) - heads.key_values)
        bytes_per_layer = (
            sequences_per_micro_batch(local_options)
            * (local_options.block_size or 0)
            * extra_heads
            * heads.head_dim
            * (BF16 if options.bf16 else FP32)
        )
        return dataclasses.replace(
            activations,
            layers=activations.layers + bytes_per_layer * len(decoder_layers(model)),
            largest_layer=activations.largest_layer + bytes_per_layer,
        )
    if (ranks := options.tensor_parallel) > 1:
        if not options.torch_compile:
            raise OptionError(f"tensor_parallel {ranks}: no prediction without compilation; pass --torch_compile true")
        activations = count_activations(split_on_meta(model, ranks), dataclasses.replace(options, tensor_parallel=1))
        hidden = (
            sequences_per_micro_batch(options)
            * options.block_size
            * model.config.hidden_size
            * (BF16 if options.bf16 else FP32)
        )
        # Input and sum are counted at all positions, as gathered; their local splits are added here.
        bytes_per_layer = 2 * hidden // ranks
        return dataclasses.replace(
            activations,
            layers=activations.layers + bytes_per_layer * len(decoder_layers(model)),
            largest_layer=activations.largest_layer + bytes_per_layer,
            inputs=activations.inputs // ranks,
        )
    cast = options.bf16 and options.strategy == "fsdp"
    try:
        compiled, budget = options.torch_compile, options.activation_memory_budget
        return _count(
            model, sequences_per_micro_batch(options), options.block_size, options.bf16, cast, compiled, budget
        )
    except Exception as error:
        raise OptionError(
            f"{type(model).__name__}: no memory prediction, because it does not run on tensors without values: "
            f"{first_line(error)}"
        ) from error


@functools.lru_cache(maxsize=32)
def _count(
    model: PreTrainedModel,
    sequences: int,
    tokens: int,
    bf16: bool,
    cast: bool,
    compiled: bool,
    budget: float | None,
) -> Activations:
    AttentionInterface.register("fused", _fused_attention)
    # Without this, it would print the errors that are caught.
    logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)
    model = copy.deepcopy(model)
    model.gradient_checkpointing_disable()
    if model.config._attn_implementation != "eager":  # transformers has no fused attention for GPT-OSS and some others
        model.set_attn_implementation("fused")
    # By storage. Each storage must stay alive, because a new one could reuse its id.
    saved: dict[int, tuple[object, int, nn.Module | None]] = {}
    inputs: dict[int, tuple[object, int]] = {}
    running: list[nn.Module] = []
    ran: dict[str, list[tuple[nn.Module, Any]]] = defaultdict(list)  # by kind: layers with their outputs
    repeats: dict[nn.Module, nn.Module] = {}  # by layer: the layer that saves as much
    layers = decoder_layers(model)
    for parameter in model.parameters() if cast else ():
        parameter.data = parameter.data.bfloat16()
    twins = {repr(layer): copy.deepcopy(layer) for layer in layers} if compiled else {}
    with torch_kernels(), FakeTensorMode(allow_non_fake_inputs=True):
        for module in (model, *twins.values()):
            module.to_empty(device="cpu")
        model.tie_weights()
        if compiled:
            set_recomputation(budget)
            kinds = {kind: _partitioned(twin, bf16) for kind, twin in twins.items()}

            def run_or_repeat(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
                """The first layer of a kind saves what all share, such as positions. The third repeats the second."""
                kind = repr(layer)
                if len(ran[kind]) == 2:
                    repeats[layer], outputs = ran[kind][1]
                    return pytree.tree_map_only(Tensor, _another, outputs)
                outputs = kinds[kind](layer, *args, **kwargs)
                ran[kind].append((layer, outputs))
                return outputs

            for layer in layers:
                layer.forward = functools.partial(run_or_repeat, layer)

        def enter(layer: nn.Module, args: Any, kwargs: Any) -> Any:
            if cast:
                args, kwargs = pytree.tree_map_only(Tensor, _to_bf16, (args, kwargs))
            running.append(layer)
            for tensor in pytree.tree_leaves((args, kwargs)):
                if isinstance(tensor, Tensor):
                    inputs[_id(tensor)] = (tensor.untyped_storage(), tensor.untyped_storage().nbytes())
            return args, kwargs

        def leave(layer: nn.Module, args: Any, output: Any) -> None:
            running.pop()

        def save(tensor: Tensor) -> Tensor:
            where = running[-1] if running else None
            saved.setdefault(_id(tensor), (tensor.untyped_storage(), tensor.untyped_storage().nbytes(), where))
            return tensor

        for layer in layers:
            layer.register_forward_pre_hook(enter, with_kwargs=True)
            layer.register_forward_hook(leave)
        ids_BT = torch.zeros(sequences, tokens, dtype=torch.int64)
        with (
            bypass_head(model.get_output_embeddings()),
            torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor),
            torch.autocast("cpu", torch.bfloat16, enabled=bf16),
            GroupedProducts(model, running) as results,
        ):
            model(input_ids=ids_BT, use_cache=False)
        own = {_id(tensor) for tensor in [*model.parameters(), *model.buffers()]}
    sizes = [(size, where) for key, (_, size, where) in saved.items() if key not in own]
    by_layer = [sum(size for size, where in sizes if where is repeats.get(layer, layer)) for layer in layers]
    return Activations(
        layers=sum(by_layer),
        largest_layer=max(by_layer, default=0),
        largest_tensor=max((size for size, where in sizes if where is not None), default=0),
        inputs=sum(size for _, size in inputs.values()),
        outside=sum(size for size, where in sizes if where is None),
        largest_result=results.largest,
    )


def _partitioned(twin: nn.Module, bf16: bool) -> Callable[..., Any]:
    """A forward for all layers of the kind of `twin`, traced once, that saves the tensors of the compiled layer."""
    from torch._functorch.aot_autograd import aot_function  # slow imports, rarely needed
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    from torch._inductor.decomposition import select_decomp_table

    traced: Callable[..., Any] | None = None

    def forward(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
        nonlocal traced
        leaves, structure = pytree.tree_flatten((args, kwargs))

        def run(own: dict[str, Tensor], tensors: list[Tensor]) -> Any:
            rest = iter(tensors)
            filled = [next(rest) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            args, kwargs = pytree.tree_unflatten(filled, structure)
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                return torch.func.functional_call(twin, own, args, kwargs)

        def partition(joint: torch.fx.GraphModule, *args: Any, **kwargs: Any) -> Any:
            parameters_and_buffers = list(range(len(own)))  # so that casts of parameters are not saved
            kwargs["static_lifetime_input_indices"] = parameters_and_buffers
            for node in joint.graph.find_nodes(op="call_function", target=GROUPED_PRODUCT):
                # torch.compile marks the factors of these products so, because model/experts.py recomputes them.
                node.args[0].meta |= {"recompute": CheckpointPolicy.MUST_RECOMPUTE, "ac_graph_id": 0}
            return min_cut_rematerialization_partition(joint, *args, **kwargs)

        own = dict(layer.named_parameters()) | dict(layer.named_buffers())
        traced = traced or aot_function(
            run,
            fw_compiler=lambda graph, _: graph,
            partition_fn=partition,
            decompositions=select_decomp_table(),
        )
        return traced(own, [leaf for leaf in leaves if isinstance(leaf, Tensor)])

    return forward


def _fused_attention(
    module: nn.Module,
    query_BHTE: Tensor,
    key_BKTE: Tensor,
    value_BKTE: Tensor,
    attention_mask: None,
    scaling: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """A fused attention: saves queries, keys, values, the result, and a sum of exponentials for each query."""
    query, key = query_BHTE.to(value_BKTE.dtype), key_BKTE.to(value_BKTE.dtype)
    if value_BKTE.shape[-1] != query.shape[-1]:  # latent attention: kernels that also take another head_dim of values
        efficient = torch.ops.aten._scaled_dot_product_efficient_attention
        attended = efficient(query, key, value_BKTE, None, True, 0.0, True, scale=scaling)[0]
        return attended.transpose(1, 2), None
    attended = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value_BKTE, 0.0, True, scale=scaling)[0]
    return attended.transpose(1, 2), None


class GroupedProducts(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Finds the largest result within layers, and the shapes of products of experts.

    torch's own rule for these shapes refuses fp32, and sizes that a GPU's kernel refuses. `running` are the layers that
    run at the moment.
    """

    def __init__(self, model: nn.Module, running: list[nn.Module]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.running = running
        self.experts = {parameter.numel() for parameter in model.parameters() if parameter.dim() == 3}
        self.largest = 0

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if get_proxy_mode():  # a layer is traced for the partitioner, which must see each operation as it is
            return operator(*args, **(kwargs or {}))
        if operator is torch.ops.aten._grouped_mm.default and (args[0].dim(), args[1].dim()) == (2, 3):
            result = args[0].new_empty(len(args[0]), args[1].shape[2])
        else:
            result = operator(*args, **(kwargs or {}))
        if self.running and isinstance(result, Tensor) and result.numel() not in self.experts:
            self.largest = max(self.largest, result.numel() * result.element_size())
        return result


def _another(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, requires_grad=tensor.requires_grad)


def _to_bf16(tensor: Tensor) -> Tensor:
    return tensor.bfloat16() if tensor.is_floating_point() else tensor


def _id(tensor: Tensor) -> int:
    identity: int = tensor.untyped_storage()._cdata
    return identity
