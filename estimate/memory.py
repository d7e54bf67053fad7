"""How much memory a rank needs, told before it is needed: from the model's modules, without values and without GPUs.

    python -m model.memory --model_name_or_path DIR --ranks 8 [--gpu_memory 80] [options of train.py]

A step has a few moments at which its memory may be highest: in the head's loss, when every layer's activations wait for
their backward; in the backward of the last layer, and of the first, when the gradients have come; and in the optimizer.
Each is a sum of the terms of `Memory`, and the highest is what a rank needs. What is predicted is what torch allocates
for tensors (`torch.cuda.max_memory_allocated`).

N is the number of parameters, W the number of ranks that share shards, V the vocabulary, D the width of the model.
"""

import dataclasses
import functools
import math
from collections.abc import Iterable

from torch import Tensor, nn
from transformers import PreTrainedModel

from config.options import Options
from estimate.activations import (
    BF16,
    FP32,
    Activations,
    count_activations,
    of_local_sequence,
    sequences_per_micro_batch,
)
from loss.cross_entropy import CHUNK_LOGITS
from loss.next_token import ends_with_head
from model.layers import decoder_layers, decoder_matrices
from parallel.tensor import split_on_meta

GIB = 2**30

# What a GPU holds beside torch's tensors: the CUDA context, kernels, NCCL's buffers, and gaps between tensors.
BESIDE_TENSORS = 3 * GIB


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one rank, the one with most, at the moment of a step at which it has most."""

    moment: str
    parameters: int  # fp32: all of them under DDP, and copies in bf16; the rows of this rank under FSDP
    gradients: int  # fp32, as parameters, as far as they are there at this moment
    optimizer: int  # two moments, fp32, of all parameters or of this rank's rows; one of what Muon updates
    activations: int  # what layers keep for their backward, and what the backward of one works with
    logits: int  # head and loss: a chunk of logits, the gradient of the head's weight, and what goes in
    exchange: int  # what FSDP has gathered, gradients on their way, a matrix of Muon's; ZeRO-1: a copy of a rank's part

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "moment")

    def fits(self, capacity: float) -> bool:
        """Whether a GPU of `capacity` bytes has room for it, beside what is not torch's tensors."""
        return self.total + BESIDE_TENSORS <= capacity

    def __str__(self) -> str:
        terms = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "moment"}
        parts = ", ".join(f"{name} {readable(size)}" for name, size in terms.items() if size)
        return f"{readable(self.total)} {self.moment}: {parts}"


def predict(model: PreTrainedModel, options: Options, ranks: int, kept: Activations | None = None) -> Memory:
    """What a rank needs: its memory at the moment of a step at which it has most. For the arguments see `moments`."""
    return max(moments(model, options, ranks, kept), key=lambda memory: memory.total)


def moments(model: PreTrainedModel, options: Options, ranks: int, kept: Activations | None = None) -> list[Memory]:
    """The memory of a rank at each moment of a step, for `model` on the meta device, before it is wrapped.

    Rows have `options.block_size` tokens; `kept` is what `count` gives for a micro-batch, where that is known already.

    Under DDP, gradients are 4 N bytes that live in the exchange buckets and are never freed; one rank alone has no
    buckets, and frees gradients after each step. FSDP keeps 4 N / W of them, or with accumulation 4 N, until the last
    micro-step. Where ranks divide each layer, all of this is said of a rank's part, and where they divide each row, of
    its piece. Raises OptionError for a model whose layers cannot be run without values.
    """
    assert options.block_size
    kept = kept or count_activations(model, options)
    if options.tensor_parallel > 1:
        return _moments_of_part(model, options, ranks, kept)
    if options.context_parallel > 1:
        return moments(model, of_local_sequence(options), ranks, kept)
    sharded = options.strategy == "fsdp"
    width = BF16 if options.bf16 else FP32
    reduced = FP32 if options.reduce_dtype == "float32" else BF16
    shards = ranks // options.replicas if sharded else 1

    # Parameters, by the units that FSDP gathers: each layer, and the root with all else.
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    whole = numel(model.parameters())
    layer = max((numel(layer.parameters()) for layer in decoder_layers(model)), default=0)
    root = whole - sum(numel(layer.parameters()) for layer in decoder_layers(model))
    of_rank = FP32 * numel(model.parameters(), shards)
    offloaded = sharded and options.cpu_offload  # then shards pass through the GPU, and no more
    state, after = optimizer_memory(model, options, ranks if options.shard_optimizer else shards)
    gradients = FP32 * numel(parameters, shards)
    if offloaded:
        of_rank = state = gradients = 0
    waiting = waiting_gradients(options, ranks, numel(parameters), gradients)
    # Of FSDP's whole gradients, the root's are the last to go.
    in_the_end = gradients + (FP32 * root if sharded and waiting > gradients else 0)
    gathered = width * (root + (0 if options.reshard_after_forward else whole - root)) if sharded else 0

    # Activations. The backward of a layer works with several tensors of its widest kind: gradients into and out of the
    # activation function, and what is computed again. Compiled, they take the place of what was kept.
    inputs = kept.inputs // max(1, len(decoder_layers(model))) if options.offload_activations else kept.inputs
    waiting_activations = kept.outside + (inputs if options.gradient_checkpointing else kept.layers)
    one_layer = kept.largest_layer if options.gradient_checkpointing else 0
    working = (2 if options.torch_compile else 4) * kept.largest_tensor
    # A layer's gathered parameters and those of the next, unless all are kept; its gradients as the backward forms
    # them; and those of the layer before, as they are reduced.
    layer_exchange = (2 * width * layer * options.reshard_after_forward + (width + reduced) * layer) * sharded
    if offloaded:  # a shard that was reduced and is on its way to the host
        layer_exchange += FP32 * math.ceil(layer / shards)

    head = model.get_output_embeddings()
    logits, head_gradient = head_memory(model, options, sequences_per_micro_batch(options) * options.block_size, head)
    tied = head is not None and head.weight is model.get_input_embeddings().weight
    # In the end, the root's gradients as the backward has formed them and as they are reduced; under DDP, the
    # embedding's beside the bucket that it goes into.
    last = (width + reduced) * root if sharded else FP32 * numel([model.get_input_embeddings().weight]) * (ranks > 1)
    if offloaded:  # or these and this rank's shard of them, which is on its way to the host
        last = max(last, reduced * root + FP32 * math.ceil(root / shards))

    def moment(name: str, gradients: int, activations: int, logits: int, exchange: int) -> Memory:
        return Memory(name, of_rank, gradients, state, activations, logits, exchange)

    return [
        moment("in the loss", waiting, waiting_activations, logits, gathered),
        moment(
            "as the backward begins",
            waiting or (0 if sharded else FP32 * layer),
            waiting_activations + one_layer + working,
            head_gradient,
            gathered + layer_exchange,
        ),
        moment(
            "as the backward ends",
            in_the_end,
            kept.outside + kept.largest_layer + working,
            head_gradient if tied or sharded else 0,
            width * root * sharded + layer_exchange,
        ),
        moment("in the embedding's gradient", in_the_end, 0, head_gradient * tied * (not sharded), last),
        moment("in the optimizer", gradients, 0, 0, after),
    ]


def waiting_gradients(options: Options, ranks: int, learned: int, shard: int) -> int:
    """Bytes of gradients that are there before the last backward of a step: of `learned` elements, or of a `shard`.

    DDP's buckets always are. From earlier micro-steps, FSDP has them in what they will be reduced in, or has shards.
    """
    if options.strategy == "ddp":
        return FP32 * learned if ranks > 1 or options.gradient_accumulation_steps > 1 else 0
    if options.gradient_accumulation_steps == 1:
        return 0
    return shard if options.sync_each_batch else (FP32 if options.reduce_dtype == "float32" else BF16) * learned


def _moments_of_part(model: PreTrainedModel, options: Options, ranks: int, kept: Activations) -> list[Memory]:
    """Where ranks divide each layer: those of a rank's part, in as many groups as there are."""
    part, groups = split_on_meta(model, options.tensor_parallel), ranks // options.tensor_parallel
    loss, *others = moments(part, dataclasses.replace(options, tensor_parallel=1), groups, kept)
    if options.objective == "dpo" or not _ends_with_head(model):  # all ranks get all logits
        loss = dataclasses.replace(loss, logits=loss.logits * options.tensor_parallel)
    return [loss, *others]


def optimizer_memory(model: PreTrainedModel, options: Options, divided_by: int) -> tuple[int, int]:
    """Bytes of the optimizer's state, `divided_by` as many ranks, and of what its step works with.

    Two moments of each parameter and the number of its steps; of the matrices that Muon updates one moment, and no
    number. A sharded optimizer passes on a copy of a rank's part. Muon has its longest matrix as it came, normalized,
    and as the next of the iteration; and what goes back.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = list(decoder_matrices(model).values()) if options.optim == "muon" else []
    state = 2 * FP32 * numel(parameters, divided_by) + FP32 * len(parameters)
    state -= FP32 * numel(matrices, divided_by) + FP32 * len(matrices)
    step = FP32 * numel(parameters, divided_by) if options.shard_optimizer else 0
    longest = max((matrix.numel() for matrix in matrices), default=0)
    return state, max(step, 5 * (BF16 if options.bf16 else FP32) * longest)


def host_memory(model: PreTrainedModel, options: Options, ranks: int) -> int:
    """Bytes of a rank in host memory with --cpu_offload: its part of parameters, gradients and two moments, in fp32."""
    if not options.cpu_offload:
        return 0
    model = split_on_meta(model, options.tensor_parallel) if options.tensor_parallel > 1 else model
    return 4 * FP32 * numel(model.parameters(), ranks // options.tensor_parallel // options.replicas)


def head_memory(model: PreTrainedModel, options: Options, tokens: int, head: nn.Module | None) -> tuple[int, int]:
    """Bytes of head and loss when they are highest, and those of the head's gradient that wait for the backward's end.

    Computed as one (model/loss.py): a chunk of logits, which softmax raises to fp32 and keeps beside the result unless
    it is compiled; the head's weight once more in bf16, unless FSDP has it so; its gradient in fp32, 4 V D; and what
    goes in, masked, and its gradient. Elsewhere, and for preferences: all logits, 12 bytes each in the backward of the
    cross entropy: log-probabilities and two gradients.
    """
    if head is None:
        return 0, 0
    sharded = options.strategy == "fsdp"
    assert isinstance(head.weight, Tensor)
    vocabulary, width = head.weight.shape
    weight, logits = vocabulary * width, tokens * vocabulary
    if options.objective == "dpo" or not _ends_with_head(model):
        return 3 * FP32 * logits, (BF16 if options.bf16 else FP32) * weight
    chunks = math.ceil(logits / CHUNK_LOGITS["cuda"])
    each = (BF16 if options.bf16 else FP32) + (0 if options.torch_compile else FP32 + (FP32 if options.bf16 else 0))
    copy_of_weight = BF16 * weight if options.bf16 and not sharded else 0
    narrow = options.bf16 and sharded  # FSDP gives layers bf16, so that this is what they pass on
    hidden = 3 * tokens * width * (BF16 if narrow else FP32)
    gradient = (BF16 if narrow else FP32) * weight
    return logits // chunks * each + copy_of_weight + FP32 * weight + hidden, gradient


def numel(tensors: Iterable[Tensor], shards: int = 1) -> int:
    """Elements of the rank that has most, where the rows of each tensor are divided among `shards`."""
    total = 0
    for tensor in tensors:
        rows = len(tensor) if tensor.dim() else 1
        total += math.ceil(rows / shards) * (tensor.numel() // rows if rows else 0)
    return total


_ends_with_head = functools.lru_cache(maxsize=16)(ends_with_head)


def gib(size: float) -> str:
    """Bytes in GiB."""
    return f"{size / GIB:.1f}"


def readable(size: float) -> str:
    """Bytes with their unit."""
    return f"{gib(size)} GiB" if size >= GIB / 10 else f"{size / 2**20:.2f} MiB"
