"""The memory that a rank needs, predicted from the model's modules, without values and without a GPU.

A step has a few phases in which its memory may be highest: the loss, when every layer's activations wait for their
backward; the start and the end of the backward; and the optimizer. The memory of a phase is a sum of the terms of
`Memory`, and a rank needs the highest sum. The prediction is for torch.cuda.max_memory_allocated.

N is the number of parameters, W the number of ranks that share shards, V the vocabulary size, D the hidden size.
"""

import dataclasses
import functools
import math
from collections.abc import Iterable

from torch import Tensor, nn
from transformers import PreTrainedModel

from config.options import Options
from ddp.optimizer import BUCKET
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
from optim.bf16_adamw import SLICE, TEMPORARY
from parallel.checks import expert_modules
from parallel.tensor import split_on_meta

GIB = 2**30

# A GPU holds more than torch's tensors: the CUDA context, kernels, NCCL's buffers, and gaps between tensors.
RESERVED = 3 * GIB

_ends_with_head = functools.lru_cache(maxsize=16)(ends_with_head)  # a trial run of the model, asked for often


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of the rank with the most memory, in one phase of a step."""

    phase: str
    parameters: int  # fp32, or bf16 where frozen: all of them under DDP, this rank's shards under FSDP
    gradients: int  # fp32: as many as exist in this phase
    optimizer: int  # fp32 or bf16: two moments of each parameter or shard; one moment where Muon updates
    activations: int  # saved for the backward pass, and temporary in the backward of one layer
    logits: int  # head and loss: a chunk of logits, the gradient of the head's weight, and the head's input
    communication: int  # gathered parameters, gradients before and after reduction, temporary tensors of the optimizer

    @property
    def total(self) -> int:
        """The sum of all terms."""
        return sum(self.terms().values())

    def terms(self) -> dict[str, int]:
        """The bytes of each term, by its name."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "phase"}

    def fits(self, capacity: float) -> bool:
        """Whether a GPU of `capacity` bytes has room for this and for what it holds besides tensors."""
        return self.total + RESERVED <= capacity

    def __str__(self) -> str:
        terms = ", ".join(f"{name} {readable(size)}" for name, size in self.terms().items() if size)
        return f"{readable(self.total)} {self.phase}: {terms}"


def predict(model: PreTrainedModel, options: Options, ranks: int, saved: Activations | None = None) -> Memory:
    """The memory of a rank in the phase in which it is highest. `memory_by_phase` describes the arguments."""
    return max(memory_by_phase(model, options, ranks, saved), key=lambda memory: memory.total)


def memory_by_phase(
    model: PreTrainedModel, options: Options, ranks: int, saved: Activations | None = None
) -> list[Memory]:
    """The memory of a rank in each phase of a step, for `model` on the meta device, before it is wrapped.

    `saved` is the result of `count_activations` for a micro-batch, if the caller has it; sequences have
    `options.block_size` tokens. DDP's gradients are 4 N bytes in buckets that are never freed; a single rank has no
    buckets, and frees its gradients after each step. FSDP has gradients of 4 N / W bytes, or with accumulation 4 N
    until the last micro-step. With tensor parallelism, N is the number of parameters after the split; with context
    parallelism, a sequence is the local sequence. Raises OptionError for layers that cannot run without values.
    """
    assert options.block_size
    saved = saved or count_activations(model, options)
    if options.tensor_parallel > 1:
        return _memory_after_split(model, options, ranks, saved)
    if options.context_parallel > 1:
        return memory_by_phase(model, of_local_sequence(options), ranks, saved)
    fsdp = options.strategy == "fsdp"
    compute = BF16 if options.bf16 else FP32
    reduced = FP32 if options.reduce_dtype == "float32" else BF16
    shards = ranks // options.replicas if fsdp else 1
    layers = decoder_layers(model)

    # Parameters, by the units that FSDP gathers: each layer, and the root with all others.
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    full = numel(model.parameters())
    layer = max((numel(layer.parameters()) for layer in layers), default=0)
    root = full - sum(numel(layer.parameters()) for layer in layers)
    trained_layer = max((numel(filter(requires_grad, layer.parameters())) for layer in layers), default=0)
    trained_root = numel(trained) - sum(numel(filter(requires_grad, layer.parameters())) for layer in layers)
    if options.expert_parallel > 1:  # FSDP gathers only the experts of this rank's group
        layer = max(numel(layer.parameters()) - experts_elsewhere(layer, options) for layer in layers)
        trained_layer = layer
        full -= experts_elsewhere(model, options)
    parameters = stored(model.parameters(), options, shards)
    gradients = FP32 * numel(trained, shards)
    moments, in_optimizer = optimizer_memory(model, options, ranks if options.shard_optimizer else shards)
    if options.cpu_offload:  # shards only pass through the GPU
        parameters = moments = gradients = in_optimizer = 0
    accumulated = accumulated_gradients(options, ranks, numel(trained) - experts_elsewhere(model, options), gradients)
    # FSDP reduces the root's gradients last, and before them those of the first layer. In the backward of that layer,
    # their shards do not exist yet, unless an earlier micro-step made them; full gradients of the root may.
    at_end = gradients + (FP32 * trained_root if fsdp and accumulated > gradients else 0)
    not_yet = FP32 * math.ceil((trained_root + trained_layer) / shards) if fsdp and gradients and not accumulated else 0

    # Activations. The backward of a layer works with several tensors of its largest kind: gradients into and out of the
    # activation function, and recomputed tensors. In a compiled layer, some of these reuse the memory of saved ones.
    inputs = saved.inputs // max(1, len(layers)) if options.offload_activations else saved.inputs
    waiting = saved.outside + (inputs if options.gradient_checkpointing else saved.layers)
    recomputed = saved.largest_layer if options.gradient_checkpointing else 0
    temporary = (2 if options.torch_compile else 4) * saved.largest_tensor
    if options.use_peft and options.gradient_checkpointing:
        # A module with an adapter has two outputs and two gradients, so the backward of an MLP holds 11 tensors.
        temporary += 8 * saved.largest_tensor
    if experts := max((numel([weight]) for weight in model.parameters() if weight.dim() == 3), default=0):
        # The backward of experts works with sorted rows, their gradient, and the first product or its gradient. Under
        # DDP also with a stack of weights in bf16, and with its gradient, which autograd then converts.
        temporary = max(temporary, 3 * saved.largest_result)
        temporary += 2 * BF16 * experts * (options.bf16 and not fsdp and not options.use_peft)

    # Communication. FSDP gathers the parameters of a layer and of the next one, unless it has not freed them; it holds
    # the layer's gradients as the backward computes them, and the gradients of the layer before as it reduces them.
    gathered = compute * (root + (0 if options.reshard_after_forward else full - root)) * fsdp
    of_layer = (2 * compute * layer * options.reshard_after_forward + (compute + reduced) * trained_layer) * fsdp
    # At the end: the root's gradients, computed and reduced; under DDP, the embedding's and the bucket it goes into.
    embedding = filter(requires_grad, [model.get_input_embeddings().weight])
    last = (compute + reduced) * trained_root if fsdp else FP32 * numel(embedding) * (ranks > 1)
    if options.cpu_offload:  # a reduced shard while it is copied to host memory
        of_layer += FP32 * math.ceil(trained_layer / shards)
        last = max(last, reduced * trained_root + FP32 * math.ceil(trained_root / shards))

    head = model.get_output_embeddings()
    logits, head_gradient = head_memory(model, options, sequences_per_micro_batch(options) * options.block_size, head)
    tied = head is not None and head.weight is model.get_input_embeddings().weight

    def phase(name: str, gradients: int, activations: int, logits: int, communication: int) -> Memory:
        return Memory(name, parameters, gradients, moments, activations, logits, communication)

    first = accumulated or (0 if fsdp else FP32 * trained_layer)
    head_at_end = head_gradient if tied or fsdp else 0
    return [
        phase("in the loss", accumulated, waiting, logits, gathered),
        phase("as the backward begins", first, waiting + recomputed + temporary, head_gradient, gathered + of_layer),
        phase(
            "as the backward ends",
            at_end - not_yet,
            saved.outside + saved.largest_layer + temporary,
            head_at_end,
            compute * root * fsdp + of_layer,
        ),
        phase("in the embedding's gradient", at_end, 0, head_gradient * tied * (not fsdp), last),
        phase("in the optimizer", gradients, 0, 0, in_optimizer),
    ]


def experts_elsewhere(module: nn.Module, options: Options) -> int:
    """Elements of the experts in `module` that the other ranks of an expert-parallel group compute with."""
    experts = [parameter for each in expert_modules(module) for parameter in each.parameters()]
    return numel(experts) - numel(experts, options.expert_parallel)


def accumulated_gradients(options: Options, ranks: int, trained: int, shard: int) -> int:
    """Bytes of gradients that exist before the last backward of a step.

    `trained` is the number of trained parameters, `shard` the bytes of this rank's shards of their gradients. DDP's
    buckets always exist. From earlier micro-steps, FSDP holds full gradients in the dtype in which it will reduce them,
    or shards.
    """
    if options.strategy == "ddp":
        return FP32 * trained if ranks > 1 or options.gradient_accumulation_steps > 1 else 0
    if options.gradient_accumulation_steps == 1:
        return 0
    return shard if options.sync_each_batch else (FP32 if options.reduce_dtype == "float32" else BF16) * trained


def _memory_after_split(model: PreTrainedModel, options: Options, ranks: int, saved: Activations) -> list[Memory]:
    """The phases of a step under tensor parallelism: one rank's split of each layer, over the groups of ranks."""
    split, groups = split_on_meta(model, options.tensor_parallel), ranks // options.tensor_parallel
    loss, *others = memory_by_phase(split, dataclasses.replace(options, tensor_parallel=1), groups, saved)
    if options.objective == "dpo" or not _ends_with_head(model):  # every rank gathers all logits
        loss = dataclasses.replace(loss, logits=loss.logits * options.tensor_parallel)
    return [loss, *others]


def optimizer_memory(model: PreTrainedModel, options: Options, shards: int) -> tuple[int, int]:
    """Bytes of the optimizer's state over `shards` ranks, and the temporary bytes of its step.

    The state has two moments of each parameter, fp32 or bf16, and its step count; for a matrix that Muon updates, one
    moment and no count. bf16 moments need temporary tensors unless their update is compiled (optim/bf16_adamw.py). A
    sharded optimizer gathers its shards in a bucket. Muon's iteration works with five copies of its
    longest matrix: gathered, normalized, two of the iteration, and the result that is sent back; or of a rank's
    experts, which are not gathered.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = list(decoder_matrices(model).values()) if options.optim == "muon" else []
    state = 2 * moment_bytes(options) * numel(parameters, shards) + FP32 * len(parameters)
    state -= FP32 * numel(matrices, shards) + FP32 * len(matrices)
    step = min(FP32 * shards * numel(parameters, shards), BUCKET) if options.shard_optimizer and shards > 1 else 0
    if options.optim_state_dtype == "bfloat16" and not options.torch_compile:
        largest = max((numel([parameter], shards) for parameter in parameters), default=0)
        step = max(step, TEMPORARY * FP32 * min(SLICE, largest))
    longest = max((numel([matrix], shards if matrix.dim() == 3 else 1) for matrix in matrices), default=0)
    return state, max(step, 5 * (BF16 if options.bf16 else FP32) * longest)


def moment_bytes(options: Options) -> int:
    """Bytes of a number in AdamW's moments."""
    return BF16 if options.optim_state_dtype == "bfloat16" else FP32


def host_memory(model: PreTrainedModel, options: Options, ranks: int) -> int:
    """Bytes in a rank's host memory with --cpu_offload: shards of parameters, of gradients and of two moments."""
    if not options.cpu_offload:
        return 0
    model = split_on_meta(model, options.tensor_parallel) if options.tensor_parallel > 1 else model
    shards = ranks // options.tensor_parallel // options.replicas
    trained = numel(filter(requires_grad, model.parameters()), shards)
    return stored(model.parameters(), options, shards) + (FP32 + 2 * moment_bytes(options)) * trained


def head_memory(model: PreTrainedModel, options: Options, tokens: int, head: nn.Module | None) -> tuple[int, int]:
    """Bytes of head and loss at their highest, and of the head's gradient that stay until the backward ends.

    Head and loss in chunks (loss/cross_entropy.py): a chunk of logits, which softmax converts to fp32 and holds in
    addition to its result unless it is compiled; the head's weight once more in bf16, unless FSDP gathers it in bf16;
    its gradient in fp32, 4 V D; and the masked input with its gradient. For other models, and for preferences: all
    logits, with 12 bytes each in the backward of the cross entropy (log-probabilities and two gradients). A frozen head
    has no gradient, and is stored in bf16.
    """
    if head is None:
        return 0, 0
    assert isinstance(head.weight, Tensor)
    vocabulary, hidden_size = head.weight.shape
    weight, logits = vocabulary * hidden_size, tokens * vocabulary
    if options.objective == "dpo" or not _ends_with_head(model):
        return 3 * FP32 * logits, (BF16 if options.bf16 else FP32) * weight * head.weight.requires_grad
    fsdp = options.strategy == "fsdp"
    chunks = math.ceil(logits / CHUNK_LOGITS["cuda"])
    each = (BF16 if options.bf16 else FP32) + (0 if options.torch_compile else FP32 + (FP32 if options.bf16 else 0))
    copy_of_weight = BF16 * weight if options.bf16 and not fsdp and not options.use_peft else 0
    # Under FSDP and behind a frozen embedding, layers get and return bf16.
    compute = BF16 if options.bf16 and (fsdp or options.use_peft) else FP32
    hidden = 3 * tokens * hidden_size * compute
    gradient = weight * head.weight.requires_grad
    return logits // chunks * each + copy_of_weight + FP32 * gradient + hidden, compute * gradient


def requires_grad(parameter: Tensor) -> bool:
    """Whether a parameter is trained."""
    return parameter.requires_grad


def stored(parameters: Iterable[Tensor], options: Options, shards: int) -> int:
    """Bytes of parameters over `shards` ranks: fp32, and bf16 for those that adapters freeze (model/adapters.py)."""
    frozen = BF16 if options.use_peft and options.bf16 else FP32
    return sum((FP32 if requires_grad(each) else frozen) * numel([each], shards) for each in parameters)


def numel(tensors: Iterable[Tensor], shards: int = 1) -> int:
    """Elements of the rank with the most, where each tensor is sharded by its rows over `shards` ranks."""
    total = 0
    for tensor in tensors:
        rows = len(tensor) if tensor.dim() else 1
        total += math.ceil(rows / shards) * (tensor.numel() // rows if rows else 0)
    return total


def gib(size: float) -> str:
    """Bytes in GiB, with three decimals where one would say little."""
    return f"{size / GIB:.1f}" if size >= GIB / 10 else f"{size / GIB:.3f}"


def readable(size: float) -> str:
    """Bytes with their unit."""
    return f"{gib(size)} GiB" if size >= GIB / 10 else f"{size / 2**20:.2f} MiB"
