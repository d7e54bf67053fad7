"""Whether packed documents stay apart in a model: a trial with a small model of the same kind, on the CPU.

Shapes: B sequences of the trial, T tokens of a sequence, V vocabulary, D hidden size.
"""

import contextlib
import copy
import math
import re
from collections.abc import Iterator
from functools import partial
from itertools import accumulate, chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from config.errors import first_line
from model.documents.kernels import compute_in_one_call, kinds_in_one_call, torch_kernels
from model.documents.masks import mask_documents
from model.documents.recurrent import restart_at_documents, stateful_kinds
from model.experts import use_grouped_products
from model.layers import decoder_layers
from parallel.context import visible_mask

SHUFFLED = "shuffled"

# The lengths of the documents of each sequence of the trial. The first sequence has padding at its end.
LENGTHS = [[7, 12, 9], [15, 17]]
TOKENS = 32
VOCABULARY = 64
# Windows and chunks become shorter than every document, so that a window or a chunk that crosses documents shows.
SPAN = 4
# Relative to the largest value. Rounding in fp32 stays below 1e-5, and a leak of these weights is above 1e-2.
TOLERANCE = 1e-3

HIDDEN = re.compile(r"^(hidden_size|n_embd|n_embed|d_model)$")
HEADS = re.compile(r"^(num_attention_heads|num_heads|n_heads?)$")
WIDTHS = re.compile(r"hidden_size|n_embd|n_embed|d_model|lru_width|conv_dim|d_ssm|_heads$|n_head$|n_groups$")
INNER = re.compile(r"intermediate|ffn|n_inner")
EXPERTS = re.compile(r"experts$")
CHOSEN_EXPERTS = re.compile(r"experts_per_tok|top_?k")
SPANS = re.compile(r"window|chunk|^block_size$|index_topk")
LAYERS = re.compile(r"num_hidden_layers|n_layers?$|num_layers")
POSITION = re.compile(r"idx|index|layer_id|layer_number")  # settings that number the layers


class Trace:
    """What one forward and backward pass computes at each position: [B, T, ...] each."""

    def __init__(self, logits_BTV: Tensor, gradient_BTD: Tensor, layers: list[tuple[str, Tensor]]) -> None:
        self.logits_BTV, self.gradient_BTD = logits_BTV, gradient_BTD
        self.layers = layers  # the class of each decoder layer and its output [B, T, D]


class Trial(NamedTuple):
    """What a trial of packed documents found."""

    obstacle: str
    kinds: set[type[nn.Module]]  # the classes of modules that must restart at documents
    model: PreTrainedModel | None = None  # the small model, which restarts, if some must


def keep_documents_apart(
    model: PreTrainedModel, device: torch.device, bf16: bool, trust_remote_code: bool = False
) -> None:
    """Change `model` in place so that packed documents stay apart, as far as is known how. Before it is wrapped.

    Masks know the documents (masks.py), and layers that carry a state restart (recurrent.py), or have kernels that know
    documents on `device`, where the model will train with or without `bf16` autocast (kernels.py).
    """
    mask_documents(model)
    trial = _try_out(model.config, trust_remote_code)
    restart_at_documents(model, trial.kinds)
    if trial.model is not None:
        compute_in_one_call(model, kinds_in_one_call(trial.model, trial.kinds, device, bf16))


def document_obstacle(config: PretrainedConfig, trust_remote_code: bool = False) -> str:
    """Why documents that are packed into one sequence would not stay apart in a model of `config`; "" if they do.

    Runs a small model of this kind, with random weights in fp32, on packed documents and on each document alone. Its
    logits must be equal, and the gradients of its embeddings, too. The packed run has what training has: position ids
    from 0 on in each document, `document_ends`, padding, and the changes of `keep_documents_apart`. The run alone has
    nothing but tokens. Takes a second or two, and leaves torch's random numbers as they were. The result does not
    depend on the rank.
    """
    return _try_out(config, trust_remote_code).obstacle


_results: dict[str, Trial] = {}  # of the trials in this process, by configuration


def _try_out(config: PretrainedConfig, trust_remote_code: bool) -> Trial:
    key = f"{config.to_json_string(use_diff=False)} {trust_remote_code}"
    if key not in _results:
        with torch.random.fork_rng(devices=[]), torch_kernels():
            _results[key] = _try_out_once(config, trust_remote_code)
    return _results[key]


def _try_out_once(config: PretrainedConfig, trust_remote_code: bool) -> Trial:
    try:
        model, alone = _small_model(config, trust_remote_code)
    except Exception as error:
        return Trial(f"a small model of this kind does not run: {first_line(error)}", set())
    kinds: set[type[nn.Module]] = set()
    try:
        mask_documents(model)
        if obstacle := _difference(_run(model, *_packed()), alone):
            kinds = stateful_kinds(model)  # which restart at documents from here on
            obstacle = _difference(_run(model, *_packed()), alone) if kinds else obstacle
        return Trial(obstacle, kinds, model if kinds else None)
    except Exception as error:
        return Trial(f"it does not take packed documents: {first_line(error)}", set())


def position_obstacle(config: PretrainedConfig, trust_remote_code: bool = False) -> str:
    """Why layers of a model of `config` look at other positions outside of causal softmax attention; "" if none does.

    Runs the small model of `document_obstacle` on packed documents in random order: tokens and position ids move
    together, and the attention function sees what `attend` of model/documents/attention.py would show it, in the order
    before. A layer that treats each position alone cannot notice that. A state, a convolution, a mask of its own, or
    another kind of attention makes another result than each document alone.
    """
    with torch.random.fork_rng(devices=[]), torch_kernels():
        try:
            model, alone = _small_model(config, trust_remote_code)
        except Exception as error:
            return f"a small model of this kind does not run: {first_line(error)}"
        order_T = torch.randperm(TOKENS, generator=torch.Generator().manual_seed(3))
        ids_BT, positions_BT, ends = _packed()
        AttentionInterface.register(SHUFFLED, partial(_attend_shuffled, order_T))
        try:
            model.set_attn_implementation(SHUFFLED)
            shuffled = _run(model, ids_BT[:, order_T], positions_BT[:, order_T], ends)
        except Exception as error:
            return f"it does not run with another attention function: {first_line(error)}"
    back_T = order_T.argsort()
    if _difference(Trace(shuffled.logits_BTV[:, back_T], shuffled.gradient_BTD[:, back_T], []), alone):
        return "a position depends on others by more than causal attention with a window"
    return ""


def _attend_shuffled(
    order_T: Tensor,
    module: nn.Module,
    query_BHTE: Tensor,
    key_BKTE: Tensor,
    value_BKTE: Tensor,
    attention_mask: Tensor | None,
    document_ends: Tensor,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention within documents of positions that are in the order `order_T`: [B, T, H, E] and no weights."""
    sequences, _, tokens, _ = query_BHTE.shape
    seen = visible_mask(sequences, tokens, query_BHTE.device, document_ends, sliding_window)[..., order_T, :][
        ..., order_T
    ]
    attended_BHTE = nn.functional.scaled_dot_product_attention(
        query_BHTE, key_BKTE, value_BKTE, seen, scale=scaling, enable_gqa=True
    )
    return attended_BHTE.transpose(1, 2), None


def _small_model(config: PretrainedConfig, trust_remote_code: bool) -> tuple[PreTrainedModel, list[Trace]]:
    """The smallest model of the kind of `config` that runs, and what it computes for each document alone.

    Raises what the first attempt raises if none runs.
    """
    cause: Exception | None = None
    for small in _smaller(config, trust_remote_code):
        try:
            model = _model_with_values(small, trust_remote_code)
            return model, [_run(model, tokens) for tokens in _documents()]
        except Exception as error:
            cause = cause or error
    raise cause or ValueError("it has no configuration")


def _difference(packed: Trace, alone: list[Trace]) -> str:
    """Where packed documents differ from the documents alone, as text; "" if they are equal."""
    if unequal := _error(packed.logits_BTV, [trace.logits_BTV for trace in alone]):
        for index, (name, output_BTD) in enumerate(packed.layers):
            outputs = [trace.layers[index][1] for trace in alone if len(trace.layers) == len(packed.layers)]
            if len(outputs) == len(alone) and _error(output_BTD, outputs):
                return f"its {name} lets a document see another one of the sequence (logits differ by {unequal:.1g})"
        return f"a document sees another one of the sequence (logits differ by {unequal:.1g})"
    if unequal := _error(packed.gradient_BTD, [trace.gradient_BTD for trace in alone]):
        return f"a document has a gradient from another one of the sequence (it differs by {unequal:.1g})"
    return ""


def _error(packed: Tensor, alone: list[Tensor]) -> float:
    """The largest difference in relation to the largest value, or 0 if it is within TOLERANCE. Infinite for NaN."""
    tensors = iter(alone)
    worst = 0.0
    for row, lengths in zip(packed, LENGTHS, strict=True):
        for part in row[: sum(lengths)].split(lengths):
            expected = next(tensors)[0]
            error = ((part - expected).abs().max() / expected.abs().max()).item()
            worst = max(worst, error if error == error else float("inf"))
    return worst if worst > TOLERANCE else 0.0


def _documents() -> list[Tensor]:
    """The tokens of each document: int64 [1, length] each."""
    generator = torch.Generator().manual_seed(0)
    count = sum(map(len, LENGTHS))
    tokens = torch.randint(8, VOCABULARY, (count, TOKENS), generator=generator)
    return [row[None, :length] for row, length in zip(tokens, chain(*LENGTHS), strict=True)]


def _packed() -> tuple[Tensor, Tensor, Tensor]:
    """Input ids, position ids [B, T] and document ends of the packed documents, as data/batches.py makes them."""
    documents = iter(_documents())
    ids_BT, positions_BT = torch.zeros(2, len(LENGTHS), TOKENS, dtype=torch.int64)
    ends = [0]
    for row, lengths in enumerate(LENGTHS):
        used = sum(lengths)
        ids_BT[row, :used] = torch.cat([next(documents)[0] for _ in lengths])
        segments = [*lengths, TOKENS - used] if used < TOKENS else lengths
        positions_BT[row] = torch.cat([torch.arange(length) for length in segments])
        ends += [row * TOKENS + end for end in accumulate(segments)]
    return ids_BT, positions_BT, torch.tensor(ends, dtype=torch.int32)


def _run(
    model: PreTrainedModel, ids_BT: Tensor, positions_BT: Tensor | None = None, ends: Tensor | None = None
) -> Trace:
    """One forward pass, and the gradient of its embeddings from a fixed random direction per token and position."""
    embeddings: list[Tensor] = []
    layers: list[tuple[str, Tensor]] = []

    def cut(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        embeddings.append(output.detach().requires_grad_())
        return embeddings[-1] * 1  # not a leaf: a model may change it in place

    def record(module: nn.Module, inputs: Any, output: Any) -> None:
        hidden = output if isinstance(output, Tensor) else output[0]
        layers.append((type(module).__name__, hidden.detach()))

    handles = [model.get_input_embeddings().register_forward_hook(cut)]
    handles += [layer.register_forward_hook(record) for layer in decoder_layers(model)]
    named: dict[str, Any] = {}
    if positions_BT is not None:
        named = {"position_ids": positions_BT, "document_ends": ends}
    try:
        logits_BTV = model(input_ids=ids_BT, **named, use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()
    # The direction of a position follows from its token and its place in its document, as in the run alone.
    place_BT = torch.arange(ids_BT.shape[1]).expand_as(ids_BT) if positions_BT is None else positions_BT
    generator = torch.Generator().manual_seed(1)
    table = torch.randn(VOCABULARY, TOKENS, logits_BTV.shape[-1], generator=generator)
    direction_BTV = table[ids_BT, place_BT]
    if positions_BT is not None:
        direction_BTV = direction_BTV * (ids_BT != 0)[:, :, None]  # padding is no target
    (gradient_BTD,) = torch.autograd.grad((logits_BTV * direction_BTV).sum(), embeddings[:1])
    return Trace(logits_BTV.detach(), gradient_BTD, layers)


def _model_with_values(config: PretrainedConfig, trust_remote_code: bool) -> PreTrainedModel:
    """A model on the CPU, in fp32 and training mode, whose every parameter has random values of a usual size.

    Initial values would hide leaks: zero convolutions, or states that decay within a token.
    """
    with no_init_weights():
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, trust_remote_code=trust_remote_code
        )
    generator = torch.Generator().manual_seed(2)
    noise = torch.randn(1 << 16, generator=generator)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = noise[: parameter.numel()]
            values = values.repeat(-(-parameter.numel() // max(1, len(values))))[: parameter.numel()]
            values = values.roll(len(name) * 7 + parameter.numel() % 101).view_as(parameter)
            if parameter.dim() > 1:
                parameter.copy_(values / max(1.0, parameter[0].numel() ** 0.5))
            else:
                parameter.copy_(0.3 * values + (1 if name.endswith("weight") else 0))
    use_grouped_products(model)  # as in training
    return model.requires_grad_(False).train()


def _smaller(config: PretrainedConfig, trust_remote_code: bool) -> Iterator[PretrainedConfig]:
    """Small configurations of the kind of `config`, the smallest first: not every model can be built with each."""
    numbers = dict(_numbers(config.get_text_config()))
    hidden = next((value for name, value in numbers.items() if HIDDEN.search(name)), 1)
    heads = next((value for name, value in numbers.items() if HEADS.search(name)), hidden)
    # Widths and heads are divided by one number. Grouped matrix products need rows of a multiple of 16 bytes.
    common = math.gcd(hidden, heads)
    fitting = [number for number in range(1, common + 1) if common % number == 0 and hidden // number % 16 == 0]
    fitting = [number for number in fitting if hidden // number >= 64] or [1]
    divisors = [max(number for number in fitting if heads // number >= min(left, heads)) for left in (2, 4, 1)]
    for divisor in [*dict.fromkeys(each for each in divisors if each > 1), 1]:
        small = _shrunk(config, divisor)
        with contextlib.suppress(Exception):
            yield _with_fewer_layers(small, trust_remote_code)
        yield small


def _shrunk(config: PretrainedConfig, factor: int) -> PretrainedConfig:
    """A copy with a small vocabulary, few experts, short windows and chunks, no dropout, and widths / `factor`."""
    config = copy.deepcopy(config)
    for part in _parts(config):
        chosen = max((value for name, value in _numbers(part) if CHOSEN_EXPERTS.search(name)), default=1)
        for name, value in _numbers(part):
            if "drop" in name or "jitter" in name:
                setattr(part, name, type(value)(0))
            elif name.endswith("token_id"):
                setattr(part, name, min(value, 1))
            elif EXPERTS.search(name):
                setattr(part, name, min(value, max(16, 2 * chosen)))
            elif SPANS.search(name) and "layers" not in name and value > SPAN:
                setattr(part, name, SPAN)
            elif INNER.search(name):  # any width fits
                setattr(part, name, min(int(value), max(16, value // factor // 16 * 16)))
            elif WIDTHS.search(name) and value % factor == 0:
                setattr(part, name, value // factor)
            elif WIDTHS.search(name) and name.endswith(
                ("heads", "head", "groups")
            ):  # fewer heads of keys than of queries
                setattr(part, name, max(1, int(value) // factor))
    config.get_text_config().vocab_size = VOCABULARY
    return config


def _with_fewer_layers(config: PretrainedConfig, trust_remote_code: bool) -> PretrainedConfig:
    """A copy whose layers are the shortest prefix, of at least two, that has every kind of layer of `config`."""
    layers = len(_layer_kinds(config, [], trust_remote_code))
    lists = {
        name: value
        for part in _parts(config)
        for name, value in vars(part).items()
        if isinstance(value, list | tuple | str) and len(value) == layers
    }
    repeated = [name for name, value in lists.items() if len(set(map(str, value))) < layers]  # others number the layers
    kinds = _layer_kinds(config, repeated, trust_remote_code)
    needed = max(2, max(kinds.index(kind) for kind in kinds) + 1)
    small = copy.deepcopy(config)
    for part in _parts(small):
        for name, value in list(vars(part).items()):
            if LAYERS.search(name) and value == layers:
                setattr(part, name, needed)
            elif name in lists and value:
                setattr(part, name, value[:needed])
    if set(_layer_kinds(small, repeated, trust_remote_code)) != set(kinds):
        raise ValueError("its layers do not follow from a number of layers")
    return small


def _layer_kinds(config: PretrainedConfig, lists: list[str], trust_remote_code: bool) -> list[tuple[Any, ...]]:
    """What distinguishes the decoder layers: their modules, the settings of these, and their entries in `lists`."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    values = [getattr(part, name) for part in _parts(config) for name in lists if getattr(part, name, None)]
    return [
        tuple(str(each[index]) for each in values)
        + tuple(
            (name, type(module).__name__, setting, value)
            for name, module in layer.named_modules()
            for setting, value in [("", ""), *vars(module).items()]
            if isinstance(value, bool | int | str) and not POSITION.search(setting)
        )
        for index, layer in enumerate(decoder_layers(model))
    ]


def _numbers(config: PretrainedConfig) -> list[tuple[str, Any]]:
    """The settings of `config` that are numbers."""
    return [
        (name, value)
        for name, value in vars(config).items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    ]


def _parts(config: PretrainedConfig) -> list[PretrainedConfig]:
    """The configuration and those inside it."""
    inside = [value for value in vars(config).values() if isinstance(value, PretrainedConfig)]
    return [config, *(part for each in inside for part in _parts(each))]
