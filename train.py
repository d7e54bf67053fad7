"""Train a causal language model, on one process or on many. Read this file first, from top to bottom.

    python train.py                                                              one process
    torchrun --nproc_per_node=8 train.py                                         one process per GPU
    torchrun --nproc_per_node=8 train.py --strategy fsdp --model_name_or_path DIR --train_file text.jsonl

Every process runs all of this file. Processes differ by their rank, which decides the rows that they read; rank 0 also
writes. They meet only in collectives (all_reduce, broadcast, barrier, and what the wrapped model does in its forward
and backward), which every rank must enter.
"""

import os
import sys
import time
import traceback
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from types import ModuleType

import torch
import torch.distributed as dist
import transformers
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.data import DistributedSampler

import ddp
import fsdp
from checkpoint.export import export_model
from checkpoint.identity import Progress, fingerprint_model, require_same_run
from checkpoint.load import choose_checkpoint, load_checkpoint
from checkpoint.output_dir import claim_output_dir, clean_output_dir
from checkpoint.rng import seed_rank
from checkpoint.save import Saver
from config.checks import check, check_skipped
from config.command_line import parse
from config.errors import OptionError
from config.options import Options
from config.plan import Plan, mesh_shape, plan_run
from data.batches import Batch, data_parallel_rank_and_size, make_loader, micro_batches, to_device
from data.ledger import Ledger
from data.prepare import prepare_data
from data.sequences import Mixture, PreparedDataset, show_examples
from data.stream import Cursor, StreamingDataset
from estimate.flops import flops_per_token
from estimate.stages import explain_out_of_memory, is_out_of_memory, memory_forecast
from estimate.start_block import start_block
from loss.dpo import Preference
from loss.dpo_reference import add_reference
from loss.evaluation import forward_no_grad
from loss.next_token import NextToken
from metrics.hardware import gpu_memory
from metrics.recorder import Recorder
from model.attention import attend_within_documents, expect_one_document_per_sequence
from model.build import build_model, generate_completion, load_config_and_tokenizer
from model.compile import compile_layers
from model.linear import multiply_with_copies
from model.weights import find_weights, fingerprint_files, load_weights
from optim.adamw import build_optimizer
from optim.schedule import learning_rate
from parallel.context import apply_context_parallel
from runtime import exit_process, listen_for_stop_signals, rank_from_environment


def main(argv: list[str]) -> None:
    """Train as the command line `argv` says. Raises OptionError for what its author can get wrong."""
    # === What is asked for. Mistakes end here, before any process group exists; those of a checkpoint where it is read.
    transformers.utils.logging.disable_progress_bar()  # one bar is enough
    transformers.utils.logging.set_verbosity_error()  # what it would warn of is an error here, or intended
    rank, world_size, local_rank = rank_from_environment()
    options = parse(argv, world_size)
    check(options, world_size)
    if options.full_determinism:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it, cuBLAS may choose another algorithm
        torch.use_deterministic_algorithms(True)
    output_dir = Path(options.output_dir)
    lock = claim_output_dir(options) if rank == 0 else None
    model_config, tokenizer = load_config_and_tokenizer(options)
    data = prepare_data(options, tokenizer)  # the first rank to come prepares, the others wait for its file lock
    plan = plan_run(options, len(data.train), world_size)
    model = build_model(options, model_config)  # shapes without values, which cost no memory
    weights = find_weights(options, model)  # which file holds which of its tensors
    if options.objective == "dpo":
        objective: nn.Module = Preference(model, options.dpo_beta)
    else:
        objective = NextToken(model, options.torch_compile)

    # === The processes meet: from here on, all of them must do the same. ============================================
    # One GPU per rank; over gloo, several ranks may share one. NCCL moves GPU tensors, gloo those on the CPU.
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
    gloo_alone = device.type == "cpu" or options.ddp_backend == "gloo"
    timeout = timedelta(seconds=options.ddp_timeout)
    dist.init_process_group(backend="gloo" if gloo_alone else "cpu:gloo,cuda:nccl", timeout=timeout)
    model_fingerprint = fingerprint_model(model)
    # Each rank has read its own files and options: on several hosts, they might differ.
    require_same_run(
        options, plan=plan, data=data.fingerprint, model=model_fingerprint, weights=fingerprint_files(weights)
    )
    # The ranks as a grid, with a process group for each line of it: who holds the same, a part, a slice of a layer.
    mesh = init_device_mesh(
        device.type, mesh_shape(options, world_size), mesh_dim_names=("replicate", "shard", "tensor")
    )

    # === The model, replicated or sharded, and its optimizer. =======================================================
    model_flops = flops_per_token(model, plan.block_size)
    memory = memory_forecast(model, options, world_size, gpu_memory(device)) if rank == 0 else ""
    if data.packing == "documents":
        attend_within_documents(model, device, options.bf16)
    else:
        expect_one_document_per_sequence()
    if options.context_parallel > 1:  # rows are divided, too, among neighbours
        neighbours, _ = dist.new_subgroups(options.context_parallel, timeout=timeout)  # type: ignore[no-untyped-call]
        apply_context_parallel(objective, neighbours)
    if options.copies_weights:  # all weights of the layers are cast at once, before each forward
        multiply_with_copies(model)
    if options.torch_compile:
        compile_layers(model, options)
    # `wrapped` is what is called, model and loss in one forward; `model` is the same parameters by their own names.
    strategy: ModuleType = {"ddp": ddp, "fsdp": fsdp}[options.strategy]
    reduce_dtype = getattr(torch, options.reduce_dtype)
    wrapped: nn.Module = strategy.wrap(
        objective, mesh, device, options.bf16, options.reshard_after_forward, options.cpu_offload, reduce_dtype
    )
    resumed_from = choose_checkpoint(options)
    torch.manual_seed(options.seed)  # the same on all ranks: they must agree on random weights
    # A checkpoint brings its own, and a large model is then not read or drawn in vain; but dpo refers to how it began.
    load_weights(model, None if resumed_from and options.objective != "dpo" else weights)
    optimizer = build_optimizer(model, options)
    if options.shard_optimizer:
        strategy.shard_optimizer(optimizer, mesh)
    if options.objective == "dpo":  # the reference is the model as it is now, before a checkpoint is loaded
        data = add_reference(data, wrapped, model, options, device)
    seed_rank(options.seed, 0, rank)  # from here on different: dropout must not repeat on all ranks

    # === Where it starts: at the beginning, or where a checkpoint left off. =========================================
    progress = Progress(
        step=0,
        tokens_seen=0,
        skipped_steps=0,
        global_batch_size=plan.global_batch_size,
        seed=options.seed,
        data_fingerprint=data.fingerprint,
        model_fingerprint=model_fingerprint,
        optim=options.optim,
    )
    if resumed_from:
        progress = load_checkpoint(resumed_from, model, optimizer, expected=progress)
    if rank == 0:
        clean_output_dir(options, progress.step)
    recorder = Recorder(options, plan, rank, device, model_flops)
    recorder.say(start_block(options, plan, data, model, weights, optimizer, device, resumed_from, memory))
    if options.show_examples:
        recorder.say(show_examples(data.train, options.show_examples, tokenizer))
    recorder.start(progress.step, progress.tokens_seen)
    saver = Saver(options)
    ledger = None
    if options.ledger and rank % options.ranks_a_row == 0:
        ledger = Ledger(output_dir, rank, plan, data.train, progress.step)
    stop_requested = listen_for_stop_signals()
    if progress.step == 0 and data.validation:
        with recorder.pause("evaluate"):
            recorder.evaluation(0, *evaluate(wrapped, data.validation, options, device))

    # === The loop. ==================================================================================================
    skipped = torch.tensor(progress.skipped_steps, device=device)
    skipped_in_a_row = torch.zeros_like(skipped)
    batches = recorder.timed(training_batches(data.train, plan, options, progress.step, progress.cursor))
    for step in range(progress.step + 1, plan.total_steps + 1):
        step_batches = [next(batches) for _ in range(plan.accumulation)]

        # The whole global batch is counted before the first backward, so that its loss is one mean over all its
        # targets and not a mean of means. A signal or a full disk may have met one rank only: summed, all leave at the
        # same step. On CPU tensors, over gloo: the GPU is not waited for.
        happened = torch.tensor([stop_requested.is_set(), saver.failed()])
        counts = torch.cat([sum_of(step_batches, "targets"), sum_of(step_batches, "tokens"), happened])
        dist.all_reduce(counts)
        targets, tokens, stop, failed = counts.tolist()
        if failed:
            saver.wait()  # raises on every rank
        if ledger:
            ledger.write(step, step_batches)

        loss_sum = torch.zeros((), dtype=torch.float64, device=device)
        for index, batch in enumerate(step_batches):
            # Gradients add up on each rank; only the last backward exchanges them, while it still computes.
            strategy.set_gradient_sync(wrapped, options.sync_each_batch or index == plan.accumulation - 1)
            with torch.autocast(device.type, torch.bfloat16, enabled=options.bf16):
                loss = wrapped(**to_device(batch, device))  # the sum over the targets, in fp32: model/objective.py
            # DDP and FSDP average over ranks; what is meant is the sum over ranks divided by all targets. Both count a
            # row as often as ranks have read it (options.ranks_a_row), which cancels out.
            (loss * (world_size / max(1, targets))).backward()
            loss_sum += loss.detach()
        grad_norm = strategy.grad_norm(wrapped)

        # A gradient that is not finite, or comes from no target at all, must change nothing. Every rank sees the same
        # norm, so all decide alike.
        skip = ~torch.isfinite(grad_norm) | (targets == 0)
        skipped, skipped_in_a_row = skipped + skip, (skipped_in_a_row + skip) * skip
        # The fused optimizer reads two scalars where they lie, by the hooks of torch's GradScaler: nobody waits for the
        # GPU. Where found_inf is 1, it changes nothing. It divides gradients by grad_scale on its way, which clips them
        # without a pass of its own: by norm / max_grad_norm, where that is above 1 (1e-6 is torch's way).
        optimizer.found_inf = skip.float()  # type: ignore[attr-defined]
        if options.max_grad_norm:
            optimizer.grad_scale = ((grad_norm + 1e-6) / options.max_grad_norm).clamp(min=1)  # type: ignore[attr-defined]

        rate = learning_rate(step, plan.total_steps, options)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        strategy.gather_parameters(optimizer)  # the parts that other ranks have updated, with a sharded optimizer
        wrapped.zero_grad()
        recorder.step(tokens // options.ranks_a_row)  # as often, ranks have read and counted the same row

        if step % options.logging_steps == 0 or step == plan.total_steps:
            dist.all_reduce(loss_sum)
            # Here the GPU is waited for.
            recorder.log(step, loss_sum.item() / max(1, targets), grad_norm.item(), rate, int(skipped.item()))
            check_skipped(options, step, int(skipped_in_a_row.item()))
        if data.validation and (step == plan.total_steps or (options.eval_steps and step % options.eval_steps == 0)):
            with recorder.pause("evaluate"):
                recorder.evaluation(step, *evaluate(wrapped, data.validation, options, device))
        if stop or step == plan.total_steps or (options.save_steps and step % options.save_steps == 0):
            progress.step, progress.tokens_seen = step, recorder.tokens_seen
            progress.skipped_steps = int(skipped.item())
            progress.cursor = gather_cursor(step_batches, options)
            with recorder.pause("save"):
                saver.save(model, optimizer, progress)
        if stop:
            break
    batches.close()  # ends the loader's worker processes
    saver.wait()

    # === The finished model, for from_pretrained. ===================================================================
    if progress.step == plan.total_steps:
        # So that `generate` stops where the documents ended.
        model.generation_config.eos_token_id = data.stop_tokens or tokenizer.eos_token_id
        export_model(options, model, tokenizer)
        recorder.say(f"saved {output_dir}: the model, its tokenizer, metrics.jsonl and checkpoints")
        if options.prompt and rank == 0:
            completion = generate_completion(output_dir, options.prompt, options.trust_remote_code)
            recorder.say(f"--- completion of {options.prompt!r} ---\n{completion}\n---")
    else:
        recorder.say(f"stopped by a signal after step {progress.step}; continue with --resume_from_checkpoint auto")
    recorder.close()
    dist.barrier()  # without it, a rank that is still busy may find its peers gone
    if lock:
        lock.close()


def training_batches(
    rows: PreparedDataset | Mixture | StreamingDataset, plan: Plan, options: Options, steps_done: int, cursor: Cursor
) -> Iterator[Batch]:
    """This rank's micro-batches without end, from those of the step after `steps_done`.

    Steps take whole global batches from the sampler's permutation of an epoch: it holds every row once and depends on
    seed and epoch alone. Reader r of N takes rows r, r + N, r + 2N, ... of it, so that the global batch of a step is
    the same rows however many there are. What is left of an epoch after its last whole global batch is not used.
    Of a mixture, an epoch holds the share of each source instead of every row once: data/rows.py. A stream has no
    epochs, and goes on at `cursor`: data/stream.py.
    """
    if isinstance(rows, StreamingDataset):
        share = rows.share(*data_parallel_rank_and_size(options), plan.global_batch_size, cursor)
        workers = min(1, options.dataloader_num_workers)  # a second one would read all of the text again
        try:
            yield from make_loader(share, None, options, workers)
        except OptionError as error:  # a loader's process puts its traceback before what there is to say
            raise OptionError(str(error).rpartition("OptionError: ")[2].strip()) from error
        return
    reader, readers = data_parallel_rank_and_size(options)
    sampler: DistributedSampler[int] = DistributedSampler(
        rows, num_replicas=readers, rank=reader, shuffle=True, seed=options.seed, drop_last=True
    )

    def indices() -> Iterator[list[int]]:
        epoch, steps_into_epoch = divmod(steps_done, plan.steps_per_epoch)
        while True:
            sampler.set_epoch(epoch)  # without it, every epoch would have the order of the first
            first, end = steps_into_epoch * plan.accumulation, plan.steps_per_epoch * plan.accumulation
            numbers = rows.of_epoch(epoch, options.seed)[list(sampler)].tolist()
            yield from micro_batches(numbers, options.per_device_train_batch_size, first, end)
            epoch, steps_into_epoch = epoch + 1, 0

    # One loader for all epochs: its workers are forked once, before there is a thread that saves, whose locks they
    # would inherit.
    yield from make_loader(rows, indices(), options, options.dataloader_num_workers)


def evaluate(
    wrapped: nn.Module, rows: PreparedDataset | Mixture, options: Options, device: torch.device
) -> tuple[float, int]:
    """The mean loss of all targets of `rows`, and their number; each counts once. Every rank must call."""
    totals = torch.zeros(2, dtype=torch.float64, device=device)  # loss and targets
    for batch, loss in forward_no_grad(wrapped, rows, options, device):
        totals[0] += loss
        totals[1] += batch["targets"]
    dist.all_reduce(totals)
    loss, targets = totals.tolist()
    return loss / max(1, targets), int(targets) // options.ranks_a_row  # as many ranks have read the same row


def gather_cursor(batches: list[Batch], options: Options) -> Cursor:
    """How far the lanes of a stream have come on all ranks; empty for other rows. Every rank must call."""
    if "cursor" not in batches[0]:
        return []
    cursor = torch.cat([batch["cursor"] for batch in batches])
    shares = [torch.empty_like(cursor) for _ in range(dist.get_world_size())]
    dist.all_gather(shares, cursor)
    return torch.cat(shares[:: options.ranks_a_row]).tolist()


def sum_of(batches: list[Batch], name: str) -> Tensor:
    """The sum of a count over this rank's micro-batches: an int64 [1] on the CPU."""
    return torch.stack([batch[name].sum() for batch in batches]).sum(dim=0, keepdim=True)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except Exception as error:
        if not isinstance(error, OptionError) and not is_out_of_memory(error):
            traceback.print_exc()
            exit_process(1)
        if os.environ.get("RANK", "0") != "0":
            time.sleep(5)  # rank 0 speaks for all: torchrun ends this process as soon as rank 0 has ended
        if isinstance(error, OptionError):
            print(f"train.py: error: {error}", file=sys.stderr)
            exit_process(2)
        print(f"train.py: {explain_out_of_memory(sys.argv[1:], int(os.environ['WORLD_SIZE']), error)}", file=sys.stderr)
        exit_process(1)
    exit_process(0)
