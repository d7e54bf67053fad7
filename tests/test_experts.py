"""Proves model/experts.py: experts equal those of transformers, and every matrix product of a step is in bf16.

The products are recorded by dispatch: forward and backward pass, whatever calls them.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.integrations.moe import grouped_mm_experts_forward

from config.options import Options
from loss.cross_entropy import token_loss_sum
from loss.next_token import NextToken
from model.build import build_model
from model.compile import compile_layers
from model.experts import NAME, experts_forward, grouped_mlp, grouped_product, is_experts, use_grouped_products
from model.layers import decoder_layers
from tests.zoo import SPECIAL, config

PRODUCTS = ("mm", "bmm", "mv", "dot", "matmul", "linear", "conv", "dot_product", "grouped_product", "grouped_weight")
# Gated, transposed with biases and interleaved gates, without gates.
KINDS = ["qwen3_moe", "gpt_oss", "nemotron_h"]


class Products(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the matrix products, and lists those with a factor that is not in bf16, with the exceptions below.

    angles: a position times a frequency, summed over one element: rotary embeddings need fp32
    router: logits of experts, where a model computes them in fp32 because bf16 would choose other experts
    solve: the backward pass of a triangular solver, which has no bf16 (delta rule)
    head: sums in fp32 over chunks, with factors in bf16 that only a GPU multiplies without a cast
    """

    def __init__(self, experts: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.experts, self.counts, self.others = experts, Counter[str](), set[str]()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        if any(product in name for product in PRODUCTS):
            self.counts[name] += 1
            factors = [value for value in args if isinstance(value, Tensor) and value.is_floating_point()]
            if "attention" in name:
                factors = factors[:3]  # what follows are sums of exponents
            node = torch._C._current_autograd_node()
            sides = {side for factor in factors for side in factor.shape}
            allowed = {
                "angles": name == "bmm" and factors[0].shape[-1] == 1,
                "router": name in ("mm", "addmm") and self.experts in sides,
                "solve": node is not None and "SolveTriangular" in node.name(),
                "head": name == "addmm_",
            }
            if {factor.dtype for factor in factors} != {torch.bfloat16} and not any(allowed.values()):
                self.others.add(f"{name} {[(str(factor.dtype), tuple(factor.shape)) for factor in factors]}")
        return function(*args, **(kwargs or {}))


def products(name: str, attention: str, implementation: str | None = None) -> Products:
    """The products of a step of the family `name` on the CPU under autocast."""
    torch.manual_seed(0)
    built = config(name)
    built._attn_implementation = attention
    model = AutoModelForCausalLM.from_config(built, dtype=torch.float32).train()
    use_grouped_products(model)
    if implementation:
        model.set_experts_implementation(implementation)
    objective = NextToken(model)
    ids_BT = torch.randint(1, 400, (2, 24))
    with Products(experts=4) as mode:
        with torch.autocast("cpu", torch.bfloat16):
            loss = objective(ids_BT, ids_BT)
        loss.backward()
    assert all(parameter.grad is None or parameter.grad.dtype == torch.float32 for parameter in model.parameters())
    assert mode.counts.total() > 20
    # Two products in the forward pass, these two again before the backward pass, and two for each of them in it. On a
    # GPU, the recomputation ends before torch's own kernel, because this kernel saves its factors before it multiplies.
    layers = sum(is_experts(module) for module in model.modules())
    assert mode.counts["grouped_product"] + mode.counts["grouped_weight_gradient"] == 8 * layers
    return mode


@pytest.mark.parametrize(
    ("name", "attention"),
    [("qwen3", "sdpa"), ("qwen3_moe", "sdpa"), ("gpt_oss", "eager"), ("nemotron_h", "sdpa"), ("llama4_text", "eager")],
)
def test_every_product_is_in_bf16(name: str, attention: str) -> None:
    assert products(name, attention).others == set()


@pytest.mark.slow
@pytest.mark.parametrize("name", SPECIAL)
def test_every_product_of_every_family_is_in_bf16(name: str) -> None:
    """With attention as plain products, because the CPU's fused attention uses fp32 for some sizes of heads."""
    assert products(name, "eager").others == set()


def test_the_record_notices_fp32() -> None:
    """transformers' own grouped products are in fp32 under autocast."""
    torch.manual_seed(0)
    experts, inputs = experts_of("qwen3_moe", torch.float32)
    with Products(experts=4) as mode, torch.autocast("cpu", torch.bfloat16):
        grouped_mm_experts_forward(experts, *inputs)
    assert "grouped_mm" in str(mode.others)


def experts_of(name: str, dtype: torch.dtype) -> tuple[Any, tuple[Tensor, Tensor, Tensor]]:
    """A module of experts with random values; 37 tokens, two experts of each, and their weights."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config(name), dtype=dtype)
    experts = next(module for module in model.modules() if is_experts(module))
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.normal_(std=0.3)
    tokens_TD = torch.randn(37, 32, dtype=dtype, requires_grad=True)
    experts_TK = torch.stack([torch.randperm(3)[:2] for _ in range(37)])  # the last expert has no token
    return experts, (tokens_TD, experts_TK, torch.rand(37, 2, dtype=dtype, requires_grad=True))


def results(function: Callable[..., Tensor], experts: nn.Module, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """The output, and the gradients of tokens, weights and parameters."""
    output = function(experts, *inputs)
    sources = [inputs[0], inputs[2], *experts.parameters()]
    return [output.detach(), *torch.autograd.grad(output.sin().sum(), sources)]


def relative(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """The largest relative L2 difference."""
    return max(((one - other).norm() / other.norm()).item() for one, other in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("name", KINDS)
def test_equal_to_transformers(name: str) -> None:
    """Output and all gradients equal those of the loop over experts; in bf16, both are about as near to them."""
    for dtype, tolerance in ((torch.float64, 1e-14), (torch.float32, 2e-6)):
        experts, inputs = experts_of(name, dtype)
        experts.config._experts_implementation = "eager"
        expected = results(type(experts).forward, experts, inputs)
        assert relative(results(experts_forward, experts, inputs), expected) < tolerance
    with torch.autocast("cpu", torch.bfloat16):
        near = results(experts_forward, experts, inputs)
        theirs = results(type(experts).forward, experts, inputs)
    assert {tensor.dtype for tensor in near} == {torch.float32}
    assert relative(near, expected) < 2 * relative(theirs, expected) < 0.15  # other values are rounded


@pytest.mark.parametrize("name", KINDS)
def test_no_expert(name: str) -> None:
    """An index beyond the experts adds nothing to output and gradients, like a weight of 0."""
    experts, (tokens_TD, experts_TK, weights_TK) = experts_of(name, torch.float64)
    experts_TK[::3, 1] = experts.num_experts
    nothing_TK = (experts_TK == experts.num_experts) * torch.ones(())
    ours = results(experts_forward, experts, (tokens_TD, experts_TK, weights_TK))
    within_TK = experts_TK.clamp(max=experts.num_experts - 1)

    def masked(module: nn.Module, tokens: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        return type(module).forward(module, tokens, chosen, weights * (1 - nothing_TK))

    experts.config._experts_implementation = "eager"

    assert relative(ours, results(masked, experts, (tokens_TD, within_TK, weights_TK))) < 1e-14


def test_rows_that_are_sorted_already() -> None:
    """grouped_mlp takes rows and the end of each expert, as expert parallelism has them."""
    experts, (tokens_TD, _, _) = experts_of("gpt_oss", torch.float64)
    ends_E = torch.tensor([5, 5, 30, 37], dtype=torch.int32)
    experts_T1 = torch.tensor([0] * 5 + [2] * 25 + [3] * 7)[:, None]
    expected = experts_forward(experts, tokens_TD, experts_T1, torch.ones(37, 1, dtype=torch.float64))
    torch.testing.assert_close(grouped_mlp(experts, tokens_TD, ends_E), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_sizes_that_are_not_aligned(dtype: torch.dtype) -> None:
    rows, weights = torch.randn(9, 5, dtype=dtype), torch.randn(3, 5, 7, dtype=dtype)
    product = grouped_product(rows, weights, torch.tensor([4, 4, 9], dtype=torch.int32))
    torch.testing.assert_close(product, torch.cat([rows[:4] @ weights[0], rows[4:] @ weights[2]]))


def test_what_is_saved() -> None:
    """For the backward pass, experts save the first product, and nothing else of one row per token and expert."""
    experts, (tokens_TD, experts_TK, weights_TK) = experts_of("qwen3_moe", torch.float32)
    saved: list[Tensor] = []

    def save(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
        experts_forward(experts, tokens_TD, experts_TK, weights_TK)
    rows = {tensor.shape for tensor in saved if tensor.dim() == 2 and len(tensor) == experts_TK.numel()}
    assert rows == {(experts_TK.numel(), experts.gate_up_proj.shape[1])}
    copies = [tensor for tensor in saved if tensor.dim() == 3 and tensor.dtype == torch.bfloat16]
    assert copies == [], "bf16 weights are recomputed"


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "longcat_flash"])
def test_head_in_chunks(name: str) -> None:
    """The loss of a mixture applies the head in chunks, and equals the loss from all logits."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config(name), dtype=torch.float32)
    use_grouped_products(model)
    objective = NextToken(model)
    assert objective.ends_with_head
    ids_BT = torch.randint(1, 400, (2, 24))
    expected = token_loss_sum(model(ids_BT).logits, ids_BT)
    torch.testing.assert_close(objective(ids_BT, ids_BT), expected, rtol=1e-5, atol=0)


def built(name: str, **options: Any) -> PreTrainedModel:
    """The model of train.py, with values."""
    family: PretrainedConfig = config(name)
    family.num_hidden_layers = 1
    model = build_model(Options(**options), family)
    assert model.config._experts_implementation == NAME
    model.to_empty(device="cpu")
    torch.manual_seed(0)
    model.init_weights()
    for module in model.modules():
        if hasattr(module, "original_inv_freq"):
            rope = type(module)(config=model.config)
            module.load_state_dict(rope.state_dict())
            module.inv_freq.copy_(rope.inv_freq)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return model


@pytest.mark.slow
def test_compiled_with_checkpointing() -> None:
    """A layer with experts is one graph, which recomputes the layer from its input, and has the gradients of eager."""
    ids_BT = torch.randint(1, 400, (2, 24))
    gradients = []
    for compiled in (False, True):
        model = built("qwen3_moe", gradient_checkpointing=True)
        objective = NextToken(model)
        if compiled:
            torch.compiler.reset()
            compile_layers(model, Options(gradient_checkpointing=True), "none")
            layer = decoder_layers(model)[0]
            assert not layer.gradient_checkpointing, "the compiled graph recomputes"
        with torch.autocast("cpu", torch.bfloat16):
            loss = objective(ids_BT, ids_BT)
        loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
    assert torch._dynamo.utils.counters["graph_break"] == {}
    assert relative(gradients[1], gradients[0]) < 0.02
