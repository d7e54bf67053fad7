"""Proves model/adapters.py: LoRA equals PEFT, on any topology; checkpoints, exports and DPO of adapters."""

import json
import math
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM, PreTrainedModel

import ddp
import loss.objective
from config.checks import check
from config.command_line import parse
from config.errors import OptionError
from config.options import Options
from data.ledger import read
from data.prepare import prepare_data
from estimate.flops import count_uses, flops_per_token
from estimate.memory import numel, predict
from metrics.records import read_records
from model.adapters import (
    PREFIX,
    adapted_modules,
    adapter_parameters,
    adapters_off,
    add_adapters,
    describe_adapters,
)
from model.build import build_model, load_config_and_tokenizer
from model.export import load_finished
from model.weights import find_weights, load_weights
from optim import learning_rate
from tests import world, zoo
from tests.launch import train, train_ok
from tests.proof import FSDP, GATES, HYBRID, REFERENCE, Case, curve, first_gradient, marked, read_tensors, relative_l2
from tests.test_resume import STEADY, cut_off_at, equal_to_the_bit, trajectory

STEPS = 20


@pytest.fixture(scope="module")
def lora(tiny: list[object]) -> list[object]:
    """The options of tests/world.py with adapters, and without dropout, which differs between topologies."""
    return [*tiny, "--use_peft", "--lora_r", 4, "--lora_alpha", 8, "--lora_dropout", 0, "--learning_rate", 0.02]


@pytest.fixture(scope="module")
def adapted(lora: list[object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process that takes the global batch at once: its first gradient, and a curve of 20 steps."""
    directory = tmp_path_factory.mktemp("adapted")
    torch.save(first_gradient(REFERENCE, lora, directory / "gradient"), directory / "gradient.pt")
    curve(REFERENCE, [*lora, "--ledger", "--save_steps", 10], directory / "curve")
    return directory


def build(options: list[object], seed: int = 42) -> tuple[PreTrainedModel, Options]:
    """The model of a run before its first step, in this process."""
    parsed = parse([str(word) for word in options])
    model = build_model(parsed, load_config_and_tokenizer(parsed)[0])
    weights = find_weights(parsed, model)
    model.to_empty(device="cpu")
    model.tie_weights()
    torch.manual_seed(seed)
    load_weights(model, weights)
    return model, parsed


def losses(run: Path, key: str = "loss") -> list[float]:
    return [record[key] for record in read_records(run / "metrics.jsonl") if "loss" in record]


# --- The arithmetic -------------------------------------------------------------------------------------------------


def test_as_peft(lora: list[object], model_dir: Path, adapted: Path, tmp_path: Path) -> None:
    """First gradient, losses and norms of 20 steps, and adapters after them: PEFT with a plain loop of AdamW."""
    peft = pytest.importorskip("peft")
    start, options = build([*lora, "--bf16", "false"])
    unclipped = ["--max_steps", 1, "--adam_beta1", 0, "--max_grad_norm", 0]  # its first moment is the gradient
    train_ok(1, *lora, *unclipped, "--output_dir", tmp_path)
    first = read_tensors(tmp_path / "checkpoint-1" / "optimizer")
    config = peft.LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32), config)
    trained = {
        name.replace(".default", "").removeprefix(PREFIX): parameter
        for name, parameter in theirs.named_parameters()
        if parameter.requires_grad
    }
    assert trained.keys() == adapter_parameters(start).keys()
    with torch.no_grad():
        for name, parameter in adapter_parameters(start).items():
            trained[name].copy_(parameter)
    sequences = prepare_data(options, load_config_and_tokenizer(options)[1]).train
    optimizer = torch.optim.AdamW(trained.values(), weight_decay=0.1)
    records = [record for record in read_records(adapted / "curve" / "metrics.jsonl") if "loss" in record]
    for step, entries in read(adapted / "curve").items():
        batch = [sequences[number].tokens for number, *_ in entries]
        total, targets = torch.zeros(()), sum(len(tokens) - 1 for tokens in batch)
        for tokens in batch:
            logits_TV = theirs(input_ids=tokens[None]).logits[0, :-1]
            total = total + functional.cross_entropy(logits_TV, tokens[1:], reduction="sum")
        (total / targets).backward()  # type: ignore[no-untyped-call]
        if step == 1:
            ours = {name: moment for name, moment in first.items() if name.startswith("exp_avg.")}
            gradient = {f"exp_avg.{name}": parameter.grad for name, parameter in trained.items()}
            assert relative_l2(ours, gradient) < 1e-5
        norm = torch.nn.utils.clip_grad_norm_(trained.values(), 0.4)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, STEPS, options)
        optimizer.step()
        optimizer.zero_grad()
        assert records[step - 1]["loss"] == pytest.approx((total / targets).item(), abs=1e-5)
        assert records[step - 1]["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    assert len(records) == STEPS
    assert relative_l2(read_tensors(adapted / "curve" / f"checkpoint-{STEPS}" / "model"), trained) < 1e-5
    assert records[-1]["loss"] < records[0]["loss"] - 0.05


CASES = [
    Case("single", 1, 4, slow=True),
    Case("DDP", 2, 8, slow=True),
    Case("DDP", 2, 2, slow=True),
    Case("DDP", 4, 4, slow=True),
    Case("DDP, sharded optimizer", 2, 2, ("--shard_optimizer",), slow=True),
    Case("DDP, activation checkpointing", 2, 4, ("--gradient_checkpointing",), slow=True),
    Case("FSDP", 2, 4, FSDP),
    Case("FSDP", 4, 4, FSDP, slow=True),
    Case("FSDP, reduce-scattered in each micro-step", 2, 2, (*FSDP, "--sync_each_batch"), slow=True),
    Case("FSDP (ZeRO-2)", 2, 4, (*FSDP, "--reshard_after_forward", "false"), slow=True),
    Case("hybrid FSDP 2 x 2", 4, 2, HYBRID, slow=True),
    Case("FSDP, CPU offload", 2, 4, (*FSDP, "--cpu_offload"), slow=True),
    Case(
        "FSDP, checkpointing and offload", 2, 4, (*FSDP, "--gradient_checkpointing", "--offload_activations"), slow=True
    ),
    Case("DDP x context parallel", 2, 8, ("--context_parallel", "2"), slow=True),
    Case("FSDP x context parallel", 4, 2, (*FSDP, "--context_parallel", "2"), slow=True),
]


@pytest.mark.parametrize("case", marked(CASES))
def test_any_topology(lora: list[object], adapted: Path, tmp_path: Path, case: Case) -> None:
    """The first gradient, and losses, norms and adapters of 20 steps, are those of one process."""
    gradient = first_gradient(case, lora, tmp_path / "gradient")
    assert relative_l2(gradient, torch.load(adapted / "gradient.pt")) < GATES.gradient
    run = curve(case, lora, tmp_path / "curve")
    assert losses(run) == pytest.approx(losses(adapted / "curve"), abs=GATES.loss)
    assert losses(run, "grad_norm") == pytest.approx(losses(adapted / "curve", "grad_norm"), rel=GATES.grad_norm)
    ours, expected = (load_file(path / "adapter_model.safetensors") for path in (run, adapted / "curve"))
    assert relative_l2(ours, expected) < GATES.parameters


def count_reductions(log: Path) -> None:
    """Patch a rank: note the numbers that DDP and FSDP reduce, and their dtype."""
    name = "reduce_scatter_single" if hasattr(dist, "reduce_scatter_single") else "reduce_scatter_tensor"  # torch 2.11
    scatter, wrap = getattr(dist, name), ddp.wrap

    def note(output: Tensor, input: Tensor, *others: Any, **named: Any) -> Any:
        with open(log, "a") as file:
            file.write(f"{input.numel()} {input.dtype}\n")
        return scatter(output, input, *others, **named)

    def wrap_and_note(*given: Any) -> Any:
        wrapped: Any = wrap(*given)
        with open(log, "a") as file:
            file.write(f"{wrapped._get_ddp_logging_data()['total_parameter_size_bytes'] // 4} torch.float32\n")
        return wrapped

    setattr(dist, name, note)
    ddp.wrap = wrap_and_note  # type: ignore[assignment]


@pytest.mark.parametrize("strategy", [pytest.param("ddp", marks=pytest.mark.slow), "fsdp"])
def test_bf16_base(lora: list[object], adapted: Path, tmp_path: Path, strategy: str) -> None:
    """The frozen model is bf16, adapters and moments fp32; only adapters are reduced; the gradient stays near fp32."""
    model, _ = build([*lora, "--bf16", "true"])
    trained = adapter_parameters(model)
    dtypes = {(name in trained, parameter.dtype) for name, parameter in model.named_parameters()}
    assert dtypes == {(True, torch.float32), (False, torch.bfloat16)}
    case = Case(strategy, 2, 8, ("--bf16", "true", "--strategy", strategy))
    gradient = first_gradient(case, lora, tmp_path / "run", partial(count_reductions, tmp_path / "log"))
    assert 1e-4 < relative_l2(gradient, torch.load(adapted / "gradient.pt")) < 2e-2
    saved = read_tensors(tmp_path / "run" / "checkpoint-1" / "model")
    assert {tensor.dtype for tensor in [*saved.values(), *gradient.values()]} == {torch.float32}
    sizes, kinds = zip(*(line.split() for line in (tmp_path / "log").read_text().splitlines()), strict=True)
    assert sum(map(int, sizes)) == 2 * numel(trained.values()), "on each of two ranks"
    assert set(kinds) == {"torch.float32"}


@pytest.mark.slow
def test_dropout_and_checkpointing(lora: list[object], tmp_path: Path) -> None:
    """Dropout changes the gradient, and a recomputed layer draws the same."""
    options = [*lora, "--lora_dropout", 0.3]
    one = Case("single", 1, 16)
    again = Case("checkpointed", 1, 16, ("--gradient_checkpointing",))
    gradients = [first_gradient(case, options, tmp_path / case.name) for case in (one, again)]
    assert relative_l2(gradients[1], gradients[0]) < GATES.gradient
    without = first_gradient(one, lora, tmp_path / "without")
    assert relative_l2(gradients[0], without) > 1e-2


def test_scale(lora: list[object]) -> None:
    for more, scale in (([], 2.0), (["--use_rslora"], 4.0)):
        model, _ = build([*lora, *more])
        assert {module.scaling for module in adapted_modules(model).values()} == {scale}


@pytest.mark.slow
def test_compiled(lora: list[object], adapted: Path, tmp_path: Path) -> None:
    """Compiled layers have the same first gradient."""
    case = Case("compiled", 1, 16, ("--torch_compile", "true"))
    gradient = first_gradient(case, lora, tmp_path)
    assert relative_l2(gradient, torch.load(adapted / "gradient.pt")) < GATES.gradient


# --- Which modules --------------------------------------------------------------------------------------------------


def test_all_linear_modules_but_the_head(lora: list[object], model_dir: Path, tmp_path: Path) -> None:
    """As PEFT chooses: also of a model whose head is not tied."""
    peft = pytest.importorskip("peft")
    untied = AutoModelForCausalLM.from_pretrained(model_dir)
    config = untied.config.__class__.from_pretrained(model_dir, tie_word_embeddings=False)
    world.make_family(config, tmp_path / "untied", model_dir)
    ours, _ = build([*lora, "--model_name_or_path", tmp_path / "untied"])
    theirs = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(tmp_path / "untied"), peft.LoraConfig(target_modules="all-linear")
    )
    chosen = {
        name.removeprefix(PREFIX)
        for name, module in theirs.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }
    assert adapted_modules(ours).keys() == chosen
    assert len(chosen) == 2 * 7


def test_named_modules(lora: list[object]) -> None:
    """Names as in PEFT: the end of a path."""
    model, _ = build([*lora, "--lora_target_modules", "q_proj, layers.1.mlp.up_proj"])
    assert sorted(adapted_modules(model)) == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.mlp.up_proj",
        "model.layers.1.self_attn.q_proj",
    ]


@pytest.mark.slow
def test_experts_have_no_adapters(lora: list[object], model_dir: Path, tmp_path: Path) -> None:
    """The matrices of experts are no linear modules: they stay as they are, and the start block says so."""
    world.make_mixture(tmp_path / "mixture", model_dir)
    options = [*lora, "--model_name_or_path", tmp_path / "mixture", "--max_steps", 2, *FSDP, "--merge_lora"]
    output = train_ok(2, *options, "--output_dir", tmp_path / "run")
    assert "8 modules (q_proj, k_proj, v_proj, o_proj)" in output
    assert "experts have none, because they are no linear modules" in output
    before, after = (load_file(path / "model.safetensors") for path in (tmp_path / "mixture", tmp_path / "run"))
    changed = {name for name in before if not before[name].equal(after[name])}
    assert changed == {name for name in before if "self_attn" in name and name.endswith("proj.weight")}


def test_modules_that_are_not_called() -> None:
    """Mamba reads the weight of dt_proj only: an adapter there would have no effect, and no gradient."""

    def start(names: str) -> PreTrainedModel:
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(zoo.config("mamba"))
        add_adapters(model, Options(use_peft=True, lora_target_modules=names))
        return model

    model = start("all-linear")
    names = {path.rpartition(".")[2] for path in adapted_modules(model)}
    assert names == {"in_proj", "x_proj", "out_proj"}
    assert describe_adapters(model, Options()).endswith("; without an adapter: dt_proj")
    with pytest.raises(OptionError, match=r"dt_proj without calling it, so an adapter would have no effect"):
        start("in_proj,dt_proj")


REFUSED = [
    (["--lora_r", 8], "lora_r 8: all parameters are trained\npass --use_peft, or remove --lora_r"),
    (["--use_peft", "--lora_r", 0], "lora_r 0: must be at least 1"),
    (["--use_peft", "--lora_alpha", 0], "lora_alpha 0.0: must be above 0"),
    (["--use_peft", "--lora_dropout", 1], "lora_dropout 1.0: must be at least 0 and below 1"),
    (["--use_peft", "--optim", "muon"], "use_peft true: cannot be combined with optim muon"),
    (["--use_peft", "--bf16", "true", "--float8"], "use_peft true: cannot be combined with float8 true"),
    (["--use_peft", *FSDP, "--tensor_parallel", 2], "use_peft true: cannot be combined with tensor_parallel 2"),
    (["--use_peft", *FSDP, "--expert_parallel", 2], "use_peft true: cannot be combined with expert_parallel 2"),
    (["--use_peft", "--router_bias_update_rate", 0.1], "cannot be combined with router_bias_update_rate 0.1"),
    (["--use_peft", "--lora_target_modules", "q"], "lora_target_modules q: Qwen3ForCausalLM has no such module"),
    (["--use_peft", "--lora_target_modules", "lm_head"], "lora_target_modules lm_head: the head has no adapter"),
    (
        ["--use_peft", "--lora_target_modules", "q_proj,mlp"],
        "mlp: the adapters are for linear modules\npass all-linear",
    ),
]


@pytest.mark.parametrize(("words", "message"), REFUSED)
def test_refused(tiny: list[object], words: list[object], message: str) -> None:
    def start() -> None:
        options = parse([str(word) for word in [*tiny, *words]])
        check(options, 2)
        build_model(options, load_config_and_tokenizer(options)[0])

    with pytest.raises(OptionError) as refusal:
        start()
    assert message in str(refusal.value)


def test_a_model_without_weights(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="use_peft true: adapters belong to a model with trained weights"):
        check(parse(["--use_peft"]), 1)


# --- Checkpoints ----------------------------------------------------------------------------------------------------


def test_resume_to_the_bit(lora: list[object], tmp_path: Path) -> None:
    """On the same ranks, with dropout. A checkpoint holds adapters and their moments alone."""
    options = [*lora, *STEADY, "--lora_dropout", 0.1, "--max_steps", 10, "--save_steps", 5]
    unbroken, resumed = tmp_path / "unbroken", tmp_path / "resumed"
    train_ok(2, *options, "--output_dir", unbroken)
    cut_off_at(5, unbroken, resumed)
    train_ok(2, *options, "--output_dir", resumed, "--resume_from_checkpoint", "auto")
    assert trajectory(resumed) == trajectory(unbroken)
    assert equal_to_the_bit(unbroken / "checkpoint-10", resumed / "checkpoint-10")
    names = read_tensors(unbroken / "checkpoint-10" / "model").keys()
    assert len(names) == 2 * 2 * 7
    assert all(".lora_" in name for name in names)


@pytest.mark.parametrize(
    ("ranks", "strategy"),
    [(2, "fsdp"), pytest.param(1, "fsdp", marks=pytest.mark.slow), pytest.param(4, "ddp", marks=pytest.mark.slow)],
)
def test_resume_on_other_ranks(lora: list[object], adapted: Path, tmp_path: Path, ranks: int, strategy: str) -> None:
    """A run of one process goes on elsewhere, on the same curve."""
    cut_off_at(10, adapted / "curve", tmp_path / "run")
    train_ok(ranks, *lora, "--strategy", strategy, "--output_dir", tmp_path / "run", "--resume_from_checkpoint", "auto")
    assert losses(tmp_path / "run") == pytest.approx(losses(adapted / "curve"), abs=GATES.loss)
    ours, expected = (read_tensors(path / "checkpoint-20" / "model") for path in (tmp_path / "run", adapted / "curve"))
    assert relative_l2(ours, expected) < GATES.parameters


def other_base(model_dir: Path, path: Path) -> list[object]:
    shutil.copytree(model_dir, path)
    tensors = load_file(path / "model.safetensors")
    tensors["model.norm.weight"][0] += 0.5
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return ["--model_name_or_path", path]


@pytest.mark.fault("configuration", "the frozen model of adapters changed before a resume", "the resume is refused")
@pytest.mark.parametrize(
    "change", ["base", *(pytest.param(name, marks=pytest.mark.slow) for name in ("alpha", "rank", "no adapters"))]
)
def test_another_base_is_refused(
    tiny: list[object], lora: list[object], model_dir: Path, adapted: Path, tmp_path: Path, change: str
) -> None:
    words: list[object] = {"alpha": ["--lora_alpha", 9], "rank": ["--lora_r", 2]}.get(change, [])
    if change == "base":
        words = other_base(model_dir, tmp_path / "base")
    cut_off_at(10, adapted / "curve", tmp_path / "run")
    options = [*(tiny if change == "no adapters" else lora), *words, "--output_dir", tmp_path / "run"]
    outcome = train(1, [*options, "--resume_from_checkpoint", "auto"])
    assert outcome.exit_codes == [2], outcome.output
    said = {
        "base": "model_fingerprint was",
        "alpha": "lora_alpha was 8.0 and is 9.0 now\npass --lora_alpha 8.0",
        "rank": "lora_r was 4 and is 2 now\npass --lora_r 4",
        "no adapters": "use_peft was True and is False now\npass --use_peft true",
    }
    assert said[change] in outcome.output


# --- The finished adapters ------------------------------------------------------------------------------------------


def logits_of(model: Any) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model.eval()(input_ids=torch.arange(24)[None]).logits.float()
    return logits


@pytest.fixture(scope="module")
def finished(lora: list[object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapters of two FSDP ranks, with the completion of a prompt, and beside them the same run merged."""
    directory = tmp_path_factory.mktemp("finished")
    options = [*lora, *FSDP, "--max_steps", 4, "--use_rslora", "--learning_rate", 0.1]
    output = train_ok(2, *options, "--output_dir", directory / "adapters", "--prompt", "copyright")
    assert "--- completion of 'copyright' ---" in output
    assert "the adapters, the tokenizer" in output
    train_ok(2, *options, "--output_dir", directory / "merged", "--merge_lora")
    return directory


def test_peft_loads_the_adapters(finished: Path, model_dir: Path) -> None:
    """Same logits by PEFT, by our loader without PEFT, and by the merged model; others than the base model's."""
    peft = pytest.importorskip("peft")
    config = json.loads((finished / "adapters" / "adapter_config.json").read_text())
    assert Path(config["base_model_name_or_path"]) == model_dir
    base = AutoModelForCausalLM.from_pretrained(model_dir)
    before = logits_of(base)
    by_peft = logits_of(peft.PeftModel.from_pretrained(base, finished / "adapters"))
    by_auto_class = logits_of(peft.AutoPeftModelForCausalLM.from_pretrained(finished / "adapters"))
    merged = logits_of(AutoModelForCausalLM.from_pretrained(finished / "merged"))
    ours = logits_of(load_finished(str(finished / "adapters")))
    assert (by_peft - before).abs().max() > 1e-2
    for other in (by_auto_class, merged, ours):
        assert (other - by_peft).abs().max() < 1e-5


def test_another_base_of_the_finished_adapters(
    finished: Path, model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Adapters beside weights that they were not trained with: a warning. Beside a copy of the right ones: none."""
    shutil.copytree(finished / "adapters", tmp_path / "adapters")
    shutil.copytree(model_dir, tmp_path / "copy")
    other_base(model_dir, tmp_path / "other")
    config = json.loads((tmp_path / "adapters" / "adapter_config.json").read_text())
    for name, warned in (("copy", False), ("other", True)):
        config["base_model_name_or_path"] = str(tmp_path / name)
        (tmp_path / "adapters" / "adapter_config.json").write_text(json.dumps(config))
        load_finished(str(tmp_path / "adapters"))
        expected = f"base_model_name_or_path {tmp_path / name}: not the files of weights that the adapters were trained"
        assert (expected in capsys.readouterr().err) == warned


@pytest.mark.parametrize("name", ["embed_tokens.lora_embedding_A", "embed_tokens.lora_A.weight", "norm.token_deltas"])
def test_tensors_of_other_adapters_are_refused(finished: Path, tmp_path: Path, name: str) -> None:
    """Adapters of PEFT that would be left out without a word, or that are for other modules than linear ones."""
    shutil.copytree(finished / "adapters", tmp_path / "other")
    file = tmp_path / "other" / "adapter_model.safetensors"
    save_file({**load_file(file), f"base_model.model.model.{name}": torch.ones(1)}, file)
    with pytest.raises(OptionError, match=f"{name}: no adapters of this trainer"):
        load_finished(str(tmp_path / "other"))


def test_evaluation_is_of_the_adapted_model(finished: Path, lora: list[object]) -> None:
    """Both runs evaluate the same, and the merged model evaluates, as a base, to what the run with adapters said."""
    ours, merged = (read_records(finished / name / "metrics.jsonl")[-1] for name in ("adapters", "merged"))
    assert ours["eval_loss"] == pytest.approx(merged["eval_loss"], abs=1e-6)
    options = parse([str(word) for word in [*lora, "--model_name_or_path", finished / "merged"]])
    model = load_finished(str(finished / "merged"))
    total = targets = 0.0
    sequences = prepare_data(options, load_config_and_tokenizer(options)[1]).validation["eval"]
    for tokens in (sequences[index].tokens for index in range(len(sequences))):
        if len(tokens) > 1:
            total += model(input_ids=tokens[None], labels=tokens[None]).loss.item() * (len(tokens) - 1)
            targets += len(tokens) - 1
    assert total / targets == pytest.approx(ours["eval_loss"], abs=1e-5)


def test_files(finished: Path) -> None:
    """Adapters without a model, a model without adapters; a directory of adapters is no model to train."""
    files = {path.name for path in (finished / "adapters").iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json"} <= files
    assert not {"model.safetensors", "config.json"} & files
    assert not [path for path in (finished / "merged").iterdir() if path.name.startswith("adapter")]
    for weights in ("adapters/adapter_model.safetensors", "merged/model.safetensors"):
        beside = finished / weights.split("/")[0] / "tokenizer.json"
        assert (finished / weights).stat().st_mode == beside.stat().st_mode, "others can read all files, or none"
    options = parse(["--model_name_or_path", str(finished / "adapters")])
    with pytest.raises(OptionError, match=r"it holds adapters of another model(.|\n)*--merge_lora"):
        load_config_and_tokenizer(options)


@pytest.mark.slow
def test_merged_replaces_adapters(lora: list[object], tmp_path: Path) -> None:
    """A new run in the same directory removes the files of the other kind, which from_pretrained would prefer."""
    options = [*lora, "--max_steps", 1, "--save_steps", 0, "--output_dir", tmp_path, "--overwrite_output_dir"]
    train_ok(1, *options)
    train_ok(1, *options, "--merge_lora")
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("adapter")]
    AutoModelForCausalLM.from_pretrained(tmp_path)
    train_ok(1, *options)
    assert not (tmp_path / "model.safetensors").exists()


# --- DPO ------------------------------------------------------------------------------------------------------------


def cached_reference() -> None:
    """Patch a rank: the reference is computed before the run and cached, as without adapters."""
    prepare = loss.objective.prepare_objective

    def add(objective: Any, data: Any, wrapped: Any, options: Any, device: Any) -> Any:
        objective.adapters = False
        return prepare(objective, data, wrapped, options, device)

    loss.objective.prepare_objective = add


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_dpo_needs_no_reference(dpo: list[object], tmp_path: Path, strategy: str) -> None:
    """The model with its adapters off is the reference: losses, norms and evaluation equal those of the cached one."""
    options = [*dpo, "--use_peft", "--lora_dropout", 0, "--max_steps", 6, "--strategy", strategy]
    options += ["--data_cache_dir", tmp_path / "cache"]
    output = train_ok(2, *options, "--output_dir", tmp_path / "off")
    assert "reference: the model without its adapters, in each step" in output
    assert not list((tmp_path / "cache").glob("reference-*"))
    outcome = train(2, [*options, "--output_dir", tmp_path / "cached"], before=cached_reference)
    assert outcome.exit_codes == [0, 0], outcome.output
    assert len(list((tmp_path / "cache").glob("reference-*"))) == 1, "of the second run"
    for key in ("loss", "grad_norm"):
        assert losses(tmp_path / "off", key) == pytest.approx(losses(tmp_path / "cached", key), rel=1e-5)
    ends = [read_records(tmp_path / name / "metrics.jsonl")[-1]["eval_loss"] for name in ("off", "cached")]
    assert ends[0] == pytest.approx(ends[1], abs=GATES.evaluation)
    assert losses(tmp_path / "off")[0] == pytest.approx(math.log(2), abs=1e-6)
    assert ends[0] < math.log(2) - 0.05


def test_adapters_off(lora: list[object], model_dir: Path) -> None:
    """Within the context, the model is the base model to the bit; after it, its adapters are on again."""
    model, _ = build([*lora, "--bf16", "false"])
    for module in adapted_modules(model).values():
        torch.nn.init.normal_(module.lora_B.weight)
    base = logits_of(AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32))
    with adapters_off(model):
        assert logits_of(model).equal(base)
    assert not torch.allclose(logits_of(model), base)


# --- Predictions ----------------------------------------------------------------------------------------------------


def test_forecast(tiny: list[object], lora: list[object]) -> None:
    """The frozen model takes 2 bytes a parameter, and only adapters have gradients and moments."""
    bf16 = ["--bf16", "true"]
    model, options = build([*lora, *bf16])
    memory = predict(model, options, 1)
    trained = numel(adapter_parameters(model).values())
    frozen = numel(model.parameters()) - trained
    assert memory.parameters == 2 * frozen + 4 * trained
    assert 8 * trained <= memory.optimizer < 8 * trained + 4 * 100
    full, options = build([*tiny, *bf16])
    assert predict(full, options, 1).parameters == 4 * frozen


def test_flops(tiny: list[object], lora: list[object]) -> None:
    """A frozen weight costs 4 operations a token, a weight of an adapter 6; attention costs what it cost."""
    model, _ = build(lora)
    full, _ = build(tiny)
    uses = count_uses(full)
    assert not isinstance(uses, str)
    expected = flops_per_token(full, 64) - 2 * uses.products + 6 * numel(adapter_parameters(model).values())  # type: ignore[operator]
    assert flops_per_token(model, 64) == pytest.approx(expected)
