"""Train a causal language model, on one process or on many. Read this file first, from top to bottom.

    python train.py                                                              one process, the demo
    torchrun --nproc_per_node=8 train.py                                         one process per GPU
    torchrun --nproc_per_node=8 train.py --strategy fsdp --model_name_or_path DIR --train_file text.jsonl

Every process runs this whole file. Processes differ by their rank: it decides which sequences a process reads. Rank 0
also prints and writes metrics.jsonl. All ranks write checkpoints. They meet only in collectives (all_reduce,
all_gather, broadcast, barrier, and the communication inside the forward and backward of the wrapped model). Every rank
must enter every collective.
"""

import runtime  # isort: skip  # first: signals are answered, and too low limits refused, during the other imports
from collections.abc import Iterator
from datetime import timedelta
from types import ModuleType

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.data import DistributedSampler

import checkpoint
import config
import ddp
import estimate
import fsdp
import metrics
import optim
from config import Options, Plan
from data.batches import Batch, draw, micro_batches, to_device
from data.ledger import Ledger
from data.loader import ReadableBatches, make_loader, stream_batches
from data.prepare import prepare_data
from data.sequences import Mixture, PreparedDataset
from data.stream import Cursor, StreamingDataset
from loss.cuda_graphs import with_cuda_graphs
from loss.evaluation import evaluate
from loss.objective import build_objective, prepare_objective
from loss.router import begin_step, router_metrics, update_router_bias
from model.adapt import adapt_model
from model.build import build_model, generate_completion, load_config_and_tokenizer
from model.layers import decoder_layers
from model.weights import find_weights, load_weights


def main(argv: list[str]) -> int:
    """Train with the options in `argv`, and return the exit code. Raises OptionError for a mistake of the user."""
    # === 1. What to train. A user's mistake ends the run here, before any process group exists. =====================
    rank, world_size, local_rank = runtime.rank_from_environment()
    options = config.parse(argv, world_size)
    config.check(options, world_size)
    runtime.configure_libraries(options.full_determinism, options.output_dir if options.flight_recorder else None)
    _lock = checkpoint.claim_output_dir(options, rank)  # an open file: rank 0 has it until main returns
    model_config, tokenizer = load_config_and_tokenizer(options)
    data = prepare_data(options, tokenizer, model_config)  # one rank prepares, the others wait for its file lock
    plan = config.plan_run(options, len(data.train), world_size)
    model = build_model(options, model_config)  # on the meta device: parameters have shapes, and no memory yet
    weights = find_weights(options, model)  # which file holds which tensor
    objective = build_objective(model, options)  # model and loss as one module: fsdp gathers the head only inside it

    # === 2. Create the process group: from here on, all ranks must do the same. =====================================
    # One GPU per rank; over gloo, several ranks may share one. NCCL moves GPU tensors, gloo moves CPU tensors.
    device = runtime.choose_device(local_rank, options.memory_snapshot)
    backend = "gloo" if device.type == "cpu" or options.ddp_backend == "gloo" else "cpu:gloo,cuda:nccl"
    timeout = timedelta(seconds=options.ddp_timeout)
    dist.init_process_group(backend, store=runtime.meet(timeout), rank=rank, world_size=world_size, timeout=timeout)
    runtime.require_own_gpu(device, shared=backend == "gloo")
    runtime.watch_ranks(options.output_dir, options.ddp_timeout, options.flight_recorder)  # explains a hang
    identity = checkpoint.identify_run(options, plan, data.fingerprint, model, weights)
    checkpoint.require_same_run(options, identity, weights, model_config)
    # The ranks as a grid. replicate: ranks with equal parameters. shard: ranks that each hold a shard of them. tensor:
    # ranks that split each layer. (Context parallelism has a process group of its own: model/adapt.py.)
    mesh_names = ("replicate", "shard", "tensor")
    mesh = init_device_mesh(device.type, config.mesh_shape(options, world_size), mesh_dim_names=mesh_names)

    # === 3. Replicate or shard the model, load its weights, build the optimizer. ====================================
    resumed_from = checkpoint.choose_checkpoint(options)
    description = estimate.describe_run(options, plan, data, tokenizer, objective, weights, device, resumed_from)
    adapt_model(objective, options, data.packing, mesh)  # attention, tensor and context parallelism, compilation
    strategy: ModuleType = {"ddp": ddp, "fsdp": fsdp}[options.strategy]
    layers, reduce_dtype = decoder_layers(model), getattr(torch, options.reduce_dtype)
    # `wrapped` is the module to call. `model` stays a view of the same parameters, by their own names.
    wrapped: nn.Module = strategy.wrap(
        objective, layers, mesh, device, options.bf16, options.reshard_after_forward, options.cpu_offload, reduce_dtype
    )
    torch.manual_seed(options.seed)  # the same on all ranks: they must agree on random initial weights
    load_weights(model, weights if not resumed_from or objective.needs_initial_model else None)  # dpo reads them
    optimizer = optim.build_optimizer(model, options)
    if options.shard_optimizer:
        strategy.shard_optimizer(optimizer, mesh)
    data = prepare_objective(objective, data, wrapped, options, device)
    checkpoint.seed_rank(options.seed, step=0, rank=rank)  # from here on each rank its own: dropout must differ
    identity = checkpoint.identify_run(options, plan, data.fingerprint, model, weights)  # again: dpo added to the data
    progress = checkpoint.Progress(evaluation_due=options.eval_on_start)
    if resumed_from:
        progress = checkpoint.load_checkpoint(resumed_from, model, optimizer, identity)

    # === 4. Batches, logging, saving. ===============================================================================
    checkpoint.clean_output_dir(options, progress.step, progress.best.step)
    recorder = metrics.Recorder(options, plan, rank, device, estimate.flops_per_token(model, plan.block_size))
    recorder.start(description, progress.step, progress.tokens_seen, progress.evaluation_due, wrapped, layers)
    selection = checkpoint.Selection(options, progress)
    ledger = Ledger(options, rank, plan, data.train, progress.step)
    saver = checkpoint.Saver(options, recorder.failures, ledger.failures)
    batches = ReadableBatches(recorder.timed(training_batches(data.train, plan, options, progress)))
    if data.evaluated and (progress.evaluation_due or options.evaluates_only):
        recorder.evaluation(progress.step, evaluation := evaluate(wrapped, data, tokenizer, options, recorder))
        selection.evaluated(progress.step, evaluation)
    signals, stop, evaluation_due = runtime.defer_signals(), False, False

    # === 5. The loop: one optimizer step per iteration. =============================================================
    def forward_backward(batch: Batch, scale: float) -> Tensor:  # a micro-step: adds the gradients of scale x loss
        with torch.autocast(device.type, torch.bfloat16, enabled=options.bf16):
            loss = wrapped(**batch)  # a sum over targets, in fp32
        (loss * scale).backward()
        return loss.detach()

    micro_step = with_cuda_graphs(forward_backward, wrapped, objective, options, data.packing, plan.accumulation)
    skipped, skipped_in_a_row = torch.tensor([progress.skipped_steps, 0], device=device)
    for step in range(progress.step + 1, plan.total_steps + 1):
        if selection.over:
            recorder.print(selection.reason())
            break
        step_batches = [next(batches) for _ in range(plan.accumulation)]

        # Count the targets of the whole global batch before the first backward: the loss is one mean over all of them,
        # not a mean of means. A signal, a full disk or damaged data may affect one rank. The sum tells all ranks, so
        # all stop at the same step. CPU tensors are reduced over gloo: the CPU does not synchronize with the GPU.
        events = torch.tensor([signals.stop, signals.save, saver.failed() or bool(batches.error)])
        counts = torch.cat([total(step_batches, "targets"), total(step_batches, "tokens"), events])
        dist.all_reduce(counts)  # over gloo: a sum over all ranks
        targets, tokens, stop, save, failed = counts.tolist()
        if failed:
            saver.fail(batches.error)  # raises on every rank
        ledger.write(step, step_batches)
        begin_step(objective, wrapped, step_batches, tokens, targets, device)  # for mixtures of experts

        loss_sum = torch.zeros((), dtype=torch.float64, device=device)
        for index, batch in enumerate(step_batches):
            # Gradients accumulate on each rank. Only the last backward communicates them, overlapped with its work.
            strategy.set_gradient_sync(wrapped, options.sync_each_batch or index == plan.accumulation - 1)
            # DDP and FSDP average gradients over ranks. We want their sum divided by all targets: world_size / targets.
            # (N ranks that split a layer or a sequence count targets N times; their gradients are N times too large.)
            loss_sum += micro_step(to_device(batch, device), world_size / max(1, targets))
        grad_norm = strategy.grad_norm(wrapped)

        # The optimizer reads two attributes on the GPU, as GradScaler sets them for torch's fused optimizers, so the
        # CPU does not synchronize: found_inf (1: change nothing) and grad_scale (each gradient is divided by it).
        # Skip the update if the gradient is not finite or has no target. All ranks have the same norm: they agree.
        skip = ~torch.isfinite(grad_norm) | (targets == 0)
        skipped, skipped_in_a_row = skipped + skip, (skipped_in_a_row + skip) * skip  # in a row: 0 after a good step
        optimizer.found_inf = skip.float()  # type: ignore[attr-defined]
        # Clip as clip_grad_norm_ does, without its pass over all gradients: divide by norm / max_grad_norm if above 1.
        if options.max_grad_norm:
            optimizer.grad_scale = ((grad_norm + 1e-6) / options.max_grad_norm).clamp(min=1)  # type: ignore[attr-defined]
        rate = optim.learning_rate(step, plan.total_steps, options)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        update_router_bias(objective, skip)
        strategy.gather_parameters(optimizer)  # with a sharded optimizer: the shards that other ranks have updated
        wrapped.zero_grad()
        recorder.step(tokens // options.model_parallel_size)  # as many ranks have counted the same sequence

        ended = step == plan.total_steps
        if ended or is_due(step, options.logging_steps) or (step == 1 and options.logging_first_step):
            dist.all_reduce(loss_sum)
            mean_loss = loss_sum.item() / max(1, targets)  # item() waits for the GPU
            recorder.log(step, mean_loss, grad_norm.item(), rate, int(skipped.item()), router_metrics(objective))
            config.check_skipped(options, step, int(skipped_in_a_row.item()))
        if data.evaluated and (ended or is_due(step, options.eval_steps)):
            recorder.evaluation(step, evaluation := evaluate(wrapped, data, tokenizer, options, recorder))
            selection.evaluated(step, evaluation)
            stop = evaluation_due = evaluation is None  # a signal on any rank has ended the evaluation
        if ended or stop or save or selection.over or is_due(step, options.save_steps):
            skips, cursor, best = int(skipped.item()), gather_cursor(step_batches, options), selection.saved(step)
            progress = checkpoint.Progress(step, recorder.tokens_seen, skips, cursor, rate, best, evaluation_due)
            if options.save_steps or stop or save:  # with save_steps 0, only a signal asks for a checkpoint
                with recorder.pause("save"):
                    saver.save(model, optimizer, progress, identity)
            signals.save = False
        if stop:
            break
    batches.close()  # ends the loader's worker processes
    saver.wait()

    # === 6. The finished model, for from_pretrained. ================================================================
    finished = signals.finishing = not stop and (progress.step >= plan.total_steps or selection.over)
    if finished and plan.total_steps:
        exported = checkpoint.load_best_model(options, model, selection.best)
        checkpoint.export_model(options, model, tokenizer, data.stop_tokens)
        recorder.print(f"saved {options.output_dir}: {exported}, the tokenizer and metrics.jsonl")
        if data.last_prompt and rank == 0 and not signals.stop:
            recorder.print(generate_completion(options, data.last_prompt.tokens))
    elif not finished:
        recorder.print(f"stopped by a signal after step {progress.step}; continue with --resume_from_checkpoint auto")
    recorder.close(finished)
    saver.wait()  # without a last collective, a rank that is still busy may find that its peers have exited
    return 0 if finished else signals.exit_code()


def training_batches(
    dataset: PreparedDataset | Mixture | StreamingDataset, plan: Plan, options: Options, done: checkpoint.Progress
) -> Iterator[Batch]:
    """This rank's micro-batches without end, from the first that comes after the steps that are `done`.

    A step takes one whole global batch from the sampler's permutation of an epoch, which depends on seed and epoch
    alone. Data-parallel rank r of N takes sequences r, r + N, r + 2N, ... of it, so the global batch of a step is the
    same set of sequences for any N. The sequences after the last whole global batch of an epoch are not used in it.
    An epoch holds every sequence once; with a mixture, each source contributes its share (data/sequences.py). A stream
    has no epochs: it resumes at its cursor (data/stream.py).
    """
    rank, size = config.data_parallel_rank_and_size(options, dist.get_rank(), dist.get_world_size())
    if isinstance(dataset, StreamingDataset):
        yield from stream_batches(dataset.shard(rank, size, plan.global_batch_size, done.cursor), options)
        return
    sampler: DistributedSampler[int] = DistributedSampler(
        dataset, num_replicas=size, rank=rank, shuffle=True, seed=options.seed, drop_last=True
    )

    def indices() -> Iterator[list[int]]:
        epoch, steps_into_epoch = divmod(done.step, plan.steps_per_epoch)
        while True:
            sampler.set_epoch(epoch)  # without it, every epoch would have the order of the first
            first, end = steps_into_epoch * plan.accumulation, plan.steps_per_epoch * plan.accumulation
            numbers = draw(sampler, dataset.epoch_indices(epoch, options.seed))  # numbers[list(sampler)], as an array
            yield from micro_batches(numbers, options.per_device_train_batch_size, first, end)
            epoch, steps_into_epoch = epoch + 1, 0

    # One loader for all epochs. Its workers are forked once, at the first batch. Later there is a thread that saves,
    # and a fork would inherit its locks.
    yield from make_loader(dataset, indices(), options, options.dataloader_num_workers)


def gather_cursor(batches: list[Batch], options: Options) -> Cursor:
    """How far a stream has been read, over all ranks; empty for prepared data. Every rank must call."""
    if "cursor" not in batches[0]:
        return []
    cursor = torch.cat([batch["cursor"] for batch in batches])
    cursors = [torch.empty_like(cursor) for _ in range(dist.get_world_size())]
    dist.all_gather(cursors, cursor)
    return torch.cat(cursors[:: options.model_parallel_size]).tolist()


def is_due(step: int, interval: float) -> bool:
    """Whether `step` is a multiple of `interval` steps; 0 means never."""
    return interval > 0 and step % interval == 0


def total(batches: list[Batch], name: str) -> Tensor:
    """The sum of a count over this rank's micro-batches: int64 [1], on the CPU."""
    return torch.stack([batch[name].sum() for batch in batches]).sum(dim=0, keepdim=True)


if __name__ == "__main__":
    runtime.run(main, estimate.explain_out_of_memory)
