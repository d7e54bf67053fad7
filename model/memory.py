"""How much memory a rank needs, told before it is needed: from the model's modules, without values and without GPUs.

    python -m model.memory --model_name_or_path DIR --ranks 8 [--gpu_memory 80] [options of train.py]

A step has a few moments at which its memory may be highest: in the head's loss, when every layer's activations wait for
their backward; in the backward of the last layer, and of the first, when the gradients have come; and in the optimizer.
Each is a sum of the terms of `Memory`, and the highest is what a rank needs. What is predicted is what torch allocates
for tensors (`torch.cuda.max_memory_allocated`).

N is the number of parameters, W the number of ranks that share shards, V the vocabulary, D the width of the model.
"""

import argparse
import contextlib
import dataclasses
import functools
import io
import math
import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

import config
from config import OptionError, Options
from model.activations import BF16, FP32, Kept, count, of_piece, rows_of
from model.build import build_model, check_heads, load_config_and_tokenizer, part_of
from model.layers import layers_of, matrices_of
from model.linear import linear_modules
from model.loss import CHUNK_LOGITS
from model.objective import ends_with_head

GIB = 2**30
# What a GPU holds beside torch's tensors: the CUDA context, kernels, NCCL's buffers, and gaps between tensors.
BESIDE_TENSORS = 3 * GIB
MICRO_BATCHES = (1, 2, 4, 8, 16, 32)


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


# --- Stages ---------------------------------------------------------------------------------------------------------


def stage_name(options: Options) -> str:
    """What of the training state is divided among ranks, or not on the GPU, and how that is called.

    The names of the stages are those of Rajbhandari et al. 2020 and Ren et al. 2021 (ZeRO-Offload).
    """
    if options.strategy == "ddp":
        name = "DDP, optimizer sharded (ZeRO-1)" if options.shard_optimizer else "DDP"
    elif options.replicas > 1:
        name = f"hybrid FSDP, {options.replicas} replicas"
    else:
        name = "FSDP (ZeRO-3)" if options.reshard_after_forward else "FSDP, parameters kept after forward (ZeRO-2)"
    if options.tensor_parallel > 1:
        name = f"tensor parallel {options.tensor_parallel} x {name}"
    if options.context_parallel > 1:
        name = f"context parallel {options.context_parallel} x {name}"
    offloaded = ["its parts"] * options.cpu_offload + ["inputs of layers"] * options.offload_activations
    return f"{name}, {' and '.join(offloaded)} offloaded" if offloaded else name


def stages(options: Options, ranks: int) -> list[Options]:
    """The same options in every stage, from the least to the most that is sharded; hybrid where hosts of 8 make it.

    Then with the parts in host memory, and last with the inputs of layers there, too, which means checkpointing.
    """
    sharded = dataclasses.replace(
        options,
        strategy="fsdp",
        shard_optimizer=False,
        replicas=1,
        reshard_after_forward=True,
        cpu_offload=False,
        offload_activations=False,
    )
    whole = dataclasses.replace(sharded, strategy="ddp", tensor_parallel=1, sync_each_batch=False)
    offloaded = [dataclasses.replace(sharded, cpu_offload=True)] if options.optim != "muon" else []
    if offloaded and options.tensor_parallel == 1:
        inputs: dict[str, Any] = {"offload_activations": True, "gradient_checkpointing": True}
        inputs["activation_memory_budget"] = None  # it is one or the other
        offloaded.append(dataclasses.replace(offloaded[0], **inputs))
    replicas, readers = options.replicas if options.replicas > 1 else ranks // 8, ranks // options.tensor_parallel
    hybrid = [dataclasses.replace(sharded, replicas=replicas)] if replicas > 1 and readers % replicas == 0 else []
    kept = dataclasses.replace(sharded, reshard_after_forward=False)
    return [whole, dataclasses.replace(whole, shard_optimizer=True), *hybrid, kept, sharded, *offloaded]


# --- The prediction -------------------------------------------------------------------------------------------------


def predict(model: PreTrainedModel, options: Options, ranks: int, kept: Kept | None = None) -> Memory:
    """What a rank needs: its memory at the moment of a step at which it has most. For the arguments see `moments`."""
    return max(moments(model, options, ranks, kept), key=lambda memory: memory.total)


def moments(model: PreTrainedModel, options: Options, ranks: int, kept: Kept | None = None) -> list[Memory]:
    """The memory of a rank at each moment of a step, for `model` on the meta device, before it is wrapped.

    Rows have `options.block_size` tokens; `kept` is what `count` gives for a micro-batch, where that is known already.

    Under DDP, gradients are 4 N bytes that live in the exchange buckets and are never freed; one rank alone has no
    buckets, and frees gradients after each step. FSDP keeps 4 N / W of them, or with accumulation 4 N, until the last
    micro-step. Where ranks divide each layer, all of this is said of a rank's part, and where they divide each row, of
    its piece. Raises OptionError for a model whose layers cannot be run without values.
    """
    assert options.block_size
    kept = kept or count(model, options)
    if options.tensor_parallel > 1:
        return _moments_of_part(model, options, ranks, kept)
    if options.context_parallel > 1:
        return moments(model, of_piece(options), ranks, kept)
    sharded = options.strategy == "fsdp"
    width = BF16 if options.bf16 else FP32
    reduced = FP32 if options.reduce_dtype == "float32" else BF16
    shards = ranks // options.replicas if sharded else 1

    # Parameters, by the units that FSDP gathers: each layer, and the root with all else.
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    whole = numel(model.parameters())
    layer = max((numel(layer.parameters()) for layer in layers_of(model)), default=0)
    root = whole - sum(numel(layer.parameters()) for layer in layers_of(model))
    of_rank = FP32 * numel(model.parameters(), shards)
    if options.copies_weights:
        of_rank += BF16 * numel(module.weight for module in linear_modules(model))
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
    inputs = kept.inputs // len(layers_of(model)) if options.offload_activations else kept.inputs
    waiting_activations = kept.outside + (inputs if options.gradient_checkpointing else kept.layers)
    one_layer = kept.largest_layer if options.gradient_checkpointing else 0
    working = (2 if options.torch_compile else 4) * kept.largest_tensor
    # A layer's gathered parameters and those of the next, unless all are kept; its gradients as the backward forms
    # them; and those of the layer before, as they are reduced.
    layer_exchange = (2 * width * layer * options.reshard_after_forward + (width + reduced) * layer) * sharded
    if offloaded:  # a shard that was reduced and is on its way to the host
        layer_exchange += FP32 * math.ceil(layer / shards)

    head = model.get_output_embeddings()
    logits, head_gradient = head_memory(model, options, rows_of(options) * options.block_size, head)
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


def _moments_of_part(model: PreTrainedModel, options: Options, ranks: int, kept: Kept) -> list[Memory]:
    """Where ranks divide each layer: those of a rank's part, in as many groups as there are."""
    part, groups = part_of(model, options.tensor_parallel), ranks // options.tensor_parallel
    loss, *others = moments(part, dataclasses.replace(options, tensor_parallel=1), groups, kept)
    if options.objective == "dpo" or not _ends_with_head(model):  # all ranks get all logits
        loss = dataclasses.replace(loss, logits=loss.logits * options.tensor_parallel)
    return [loss, *others]


def optimizer_memory(model: PreTrainedModel, options: Options, divided_by: int) -> tuple[int, int]:
    """Bytes of the optimizer's state, `divided_by` as many ranks, and of what its step works with.

    Two moments of each parameter and the number of its steps; of the matrices that Muon updates one moment, and no
    number. A sharded optimizer passes on a copy of a rank's part. Muon has its longest matrix as it came, normalised,
    and as the next of the iteration; and what goes back.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = list(matrices_of(model).values()) if options.optim == "muon" else []
    state = 2 * FP32 * numel(parameters, divided_by) + FP32 * len(parameters)
    state -= FP32 * numel(matrices, divided_by) + FP32 * len(matrices)
    step = FP32 * numel(parameters, divided_by) if options.shard_optimizer else 0
    longest = max((matrix.numel() for matrix in matrices), default=0)
    return state, max(step, 5 * (BF16 if options.bf16 else FP32) * longest)


def host_memory(model: PreTrainedModel, options: Options, ranks: int) -> int:
    """Bytes of a rank in host memory with --cpu_offload: its part of parameters, gradients and two moments, in fp32."""
    if not options.cpu_offload:
        return 0
    model = part_of(model, options.tensor_parallel) if options.tensor_parallel > 1 else model
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


# --- What is printed ------------------------------------------------------------------------------------------------


def gib(size: float) -> str:
    """Bytes in GiB."""
    return f"{size / GIB:.1f}"


def readable(size: float) -> str:
    """Bytes with their unit."""
    return f"{gib(size)} GiB" if size >= GIB / 10 else f"{size / 2**20:.2f} MiB"


def outlook(model: PreTrainedModel, options: Options, ranks: int, capacity: int | None) -> str:
    """For the start block: what a rank will need in its stage, and, if its GPU has less, the stage that would fit."""
    try:
        memory, host = predict(model, options, ranks), host_memory(model, options, ranks)
        predicted = f"predicted {memory}{_beside(model, options)}" + (
            f"; in host memory {readable(host)}" if host else ""
        )
        if capacity is None or memory.fits(capacity):
            return predicted
        fitting = [stage_name(other) for other in stages(options, ranks) if predict(model, other, ranks).fits(capacity)]
        remedy = fitting[0] if fitting else "; ".join(["no stage", *advice(model, options, ranks)[:1]])
        return f"{predicted}\n{'':<13} more than this GPU's {gib(capacity)} GiB; what fits: {remedy}"
    except OptionError as error:
        return str(error)


def _beside(model: PreTrainedModel, options: Options) -> str:
    """What the prediction leaves out: a window that is shorter than a row comes as a mask, where one is made."""
    text_config = model.config.get_text_config()
    window, kinds = getattr(text_config, "sliding_window", None), getattr(text_config, "layer_types", None)
    tokens = options.block_size or 0
    if not window or window >= tokens or (kinds and "sliding_attention" not in kinds):
        return ""
    if options.packing == "documents" or options.context_parallel > 1:
        return ""
    return f", without masks of {tokens} x {tokens} in layers with a window"


def advice(model: PreTrainedModel, options: Options, ranks: int) -> list[str]:
    """What would need less memory, from the most to the least that it saves: options, and the GiB of a rank."""
    micro_batch, accumulation = options.per_device_train_batch_size, options.gradient_accumulation_steps
    changes: dict[str, dict[str, Any]] = {
        "--torch_compile true": {"torch_compile": True},
        "--bf16 true": {"bf16": True},
    }
    if options.activation_memory_budget is None:
        changes["--gradient_checkpointing"] = {"gradient_checkpointing": True}
    if micro_batch % 2 == 0:
        half = {"per_device_train_batch_size": micro_batch // 2, "gradient_accumulation_steps": 2 * accumulation}
        given = list(half)[: 1 if options.global_batch_size else 2]  # from which the accumulation would follow
        changes[" ".join(f"--{name} {half[name]}" for name in given)] = half
    elif micro_batch == 1 and _can_divide(model, options, ranks):
        parts = {"context_parallel": 2 * options.context_parallel, "gradient_accumulation_steps": 2 * accumulation}
        given = list(parts)[: 1 if options.global_batch_size else 2]
        changes[" ".join(f"--{name} {parts[name]}" for name in given)] = parts
    if options.strategy == "ddp" and ranks > 1:
        changes["--strategy fsdp"] = {"strategy": "fsdp", "shard_optimizer": False}
        changes["--shard_optimizer"] = {"shard_optimizer": True}
    if options.strategy == "fsdp":
        changes["--reshard_after_forward true"] = {"reshard_after_forward": True}
        changes["--replicas 1"] = {"replicas": 1}
    if options.strategy == "fsdp" and options.optim != "muon":
        changes["--cpu_offload true"] = {"cpu_offload": True}
    if options.strategy == "fsdp" and accumulation > 1:
        changes["--sync_each_batch true"] = {"sync_each_batch": True}
    if options.gradient_checkpointing and options.tensor_parallel == 1:
        changes["--offload_activations true"] = {"offload_activations": True}
    before = predict(model, options, ranks).total
    saved = {
        text: before - predict(model, dataclasses.replace(options, **change), ranks).total
        for text, change in changes.items()
    }
    ranking = sorted((-size, text) for text, size in saved.items() if size > 0)
    return [f"{text} saves {readable(-size)}" for size, text in ranking]


def _can_divide(model: PreTrainedModel, options: Options, ranks: int) -> bool:
    """Whether twice as many ranks could divide each row (model/context_parallel.py)."""
    group = 2 * options.context_parallel
    if ranks % group or options.tensor_parallel > 1 or options.objective == "dpo":
        return False
    try:
        check_heads(model.config.get_text_config(), group)
    except OptionError:
        return False
    return True


def is_out_of_memory(error: Exception) -> bool:
    """Whether that is why it was raised: of a GPU's, or of host memory, for which torch has no class of its own."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def out_of_memory(argv: list[str], ranks: int, error: Exception) -> str:
    """What to say of it, in a few lines: what was predicted for the options `argv`, what there is, what would help."""
    lines = [f"out of memory: {config.first_line(error)}"]
    if torch.cuda.is_available():
        now, most = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
        lines.append(f"allocated: {gib(now)} GiB, at most {gib(most)}, of {gib(torch.cuda.mem_get_info()[1])}")
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # what a DeepSpeed file becomes was printed at the start
            options = config.parse(argv, ranks)
        config.check(options, ranks)
        model = build_model(options, load_config_and_tokenizer(options)[0])
        lines.append(f"predicted for {stage_name(options)}: {predict(model, options, ranks)}")
        needed = [
            f"{stage_name(stage)} {readable(predict(model, stage, ranks).total)}" for stage in stages(options, ranks)
        ]
        lines.append(f"for each stage: {'; '.join(needed)}")
        if host := host_memory(model, options, ranks):
            lines.append(f"in host memory: {readable(host)} a rank, and in a save a copy unless --async_save false")
        lines += advice(model, options, ranks)[:3]
    except OptionError as unknown:
        lines.append(str(unknown))
    return "\n".join(lines)


def table(model: PreTrainedModel, options: Options, ranks: int, capacity: float) -> str:
    """GiB of a rank for each stage and micro-batch; in brackets, what a GPU of `capacity` bytes has no room for."""

    def counts(options: Options) -> Callable[[int], Kept]:
        """What is kept of any number of rows, from the counts for two and for four: a part is the same for all."""
        two, four = (
            dataclasses.astuple(count(model, dataclasses.replace(options, per_device_train_batch_size=rows)))
            for rows in (2, 4)
        )
        return lambda rows: Kept(*(round(a + (b - a) * (rows - 2) / 2) for a, b in zip(two, four, strict=True)))

    lines = ["| micro-batch | " + " | ".join(map(str, MICRO_BATCHES)) + " |", "|---" * (len(MICRO_BATCHES) + 1) + "|"]
    unknown: dict[str, None] = {}
    for stage in stages(options, ranks):
        cells = []
        try:
            kept = counts(stage)
            for rows in MICRO_BATCHES:
                batch = dataclasses.replace(stage, per_device_train_batch_size=rows)
                memory = predict(model, batch, ranks, kept(rows))
                cells.append(gib(memory.total) if memory.fits(capacity) else f"({gib(memory.total)})")
        except OptionError as error:
            unknown[str(error)] = None  # a reason once
            cells = ["?"] * len(MICRO_BATCHES)
        lines.append(f"| {stage_name(stage)} | {' | '.join(cells)} |")
    return "\n".join([*lines, *(f"? {reason}" for reason in unknown)])


def main(argv: list[str]) -> None:
    """Print the table for the model and options that `argv` names. Raises OptionError."""
    parser = argparse.ArgumentParser(prog="model.memory", add_help=False, allow_abbrev=False)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--gpu_memory", type=float, default=80.0)
    arguments, rest = parser.parse_known_args(argv)
    for name in ("ranks", "gpu_memory"):
        if getattr(arguments, name) <= 0:
            raise OptionError(f"{name} {getattr(arguments, name)}: must be more than 0")
    transformers.utils.logging.set_verbosity_error()
    there = config.parse(rest, arguments.ranks, bf16=True, torch_compile=True)  # as on a GPU; here, there may be none
    # Whether it can be compiled here does not matter.
    options = dataclasses.replace(there, torch_compile=False, activation_memory_budget=None)
    config.check(options, arguments.ranks)
    options.torch_compile, options.activation_memory_budget = there.torch_compile, there.activation_memory_budget
    model = build_model(options, load_config_and_tokenizer(options)[0])
    compiled = ", layers compiled" if options.torch_compile else ""
    checkpointing = ", gradient checkpointing" if options.gradient_checkpointing else ""
    print(
        f"{type(model).__name__}, {numel(model.parameters()):,} parameters, {arguments.ranks} ranks, rows of "
        f"{options.block_size} tokens, compute {'bfloat16' if options.bf16 else 'float32'}{compiled}{checkpointing}\n"
        f"GiB of a rank; (in brackets: beyond a GPU of {arguments.gpu_memory:g} GiB, of which "
        f"{gib(BESIDE_TENSORS)} are not for tensors)\n"
    )
    print(table(model, options, arguments.ranks, arguments.gpu_memory * GIB))
    asked_for = f"{stage_name(options)}, micro-batch {options.per_device_train_batch_size}"
    print(f"\n{asked_for}: {outlook(model, options, arguments.ranks, None)}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except OptionError as error:
        print(f"model.memory: error: {error}", file=sys.stderr)
        sys.exit(2)
