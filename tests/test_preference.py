"""Proves loss/dpo.py, loss/dpo_reference.py and the pairs of data/: loss, reference, topologies and checkpoints."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

import checkpoint.ranks
from config.errors import OptionError
from data.batches import collate_pairs
from data.ledger import problems, read
from data.packing import Packing, pack
from data.prepare import show_examples
from data.sequences import Sequence
from loss.dpo import Preference
from metrics.records import read_records
from tests import world
from tests.launch import train, train_ok
from tests.proof import FSDP, GATES, TENSOR, Case, first_gradient, marked, relative_l2
from tests.test_chat import assistant, prepare_records, rows_of, user
from tests.test_resume import STEADY, cut_off_at, equal_to_the_bit, trajectory
from tests.world import PLAIN, with_markers, without_markers

DPO = {"objective": "dpo"}
LN_2 = math.log(2)


# --- Pairs ----------------------------------------------------------------------------------------------------------


QUESTION = [user("a"), assistant("b"), user("c")]
PAIRS: dict[str, dict[str, Any]] = {
    "implicit prompt": {"chosen": [*QUESTION, assistant("good")], "rejected": [*QUESTION, assistant("bad, too")]},
    "the prompt in words": {
        "prompt": "c",
        "messages": [*QUESTION, assistant("good")],
        "chosen": [*QUESTION, assistant("good")],
        "rejected": [*QUESTION, assistant("bad, too")],
    },
    "explicit prompt": {"prompt": QUESTION, "chosen": [assistant("good")], "rejected": [assistant("bad, too")]},
    "text": {"prompt": "a b c", "chosen": " good", "rejected": " bad, too"},
}


@pytest.mark.parametrize("markers", [with_markers, without_markers])
@pytest.mark.parametrize("name", PAIRS)
def test_shapes(tokenizer: PreTrainedTokenizerBase, tmp_path: Path, name: str, markers: Any) -> None:
    """A record has both sequences of a pair, the chosen one first. The prompt is masked, the answers are trained on."""
    tokenizer.chat_template = markers(PLAIN)
    pairs = prepare_records([PAIRS[name]], tokenizer, tmp_path, **DPO)
    assert (pairs.packing, pairs.counts["train"].shape) == ("pairs", "preference")
    row = pairs.train[0]
    pieces = zip(
        torch.split(row.tokens, row.segment_lengths), torch.split(row.trained_on, row.segment_lengths), strict=True
    )
    (tmp_path / "alone").mkdir()
    for answer, (tokens, learned) in zip(("good", "bad, too"), pieces, strict=True):
        text, end = (True, "<eos>") if name == "text" else (False, "<|im_end|>")
        assert tokenizer.decode(tokens[learned]).lstrip() == answer + end
        prompt: Any = "a b c" if text else QUESTION
        completion: Any = f" {answer}" if text else [assistant(answer)]
        alone = prepare_records([{"prompt": prompt, "completion": completion}], tokenizer, tmp_path / "alone")
        assert rows_of(alone) == [(tokens.tolist(), learned.tolist())]


def test_pairs_stay_together(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """A pair is skipped and counted if one answer has no target in its sequence. A truncated answer is allowed."""
    fine, long = PAIRS["text"], "word " * 99
    records = [
        *[fine] * 18,
        {**fine, "rejected": long},
        {**fine, "prompt": long},
        {"chosen": QUESTION, "rejected": [*QUESTION, assistant("good")]},  # no answer to learn in the first
        {"prompt": [], "chosen": [], "rejected": [user("a"), assistant("b")]},
        fine,
    ]
    pairs = prepare_records(records, tokenizer, tmp_path, **DPO)
    counts = pairs.counts["train"]
    assert len(pairs.train) == counts.sequences == 20
    assert (counts.documents, counts.cut_documents) == (40, 1)
    assert (counts.targetless_documents, counts.empty_documents) == (4, 2)
    assert all(len(pairs.train[index].segment_lengths) == 2 for index in range(20))
    assert rows_of(pairs)[0] == rows_of(pairs)[-1]
    with pytest.raises(OptionError) as error:
        prepare_records(records, tokenizer, tmp_path, max_targetless_fraction=0.08, **DPO)
    assert "2 of 23 records have no token to train on" in str(error.value)
    assert "chat.jsonl: line 20: 'word word" in str(error.value)


@pytest.mark.parametrize(
    ("record", "objective", "complaint"),
    [
        (PAIRS["text"], "sft", "holds records of the shape preference"),
        ({"prompt": "a", "completion": "b"}, "dpo", "holds records of the shape prompt"),
        ({"text": "a"}, "dpo", "holds records of the shape text"),
        (
            {"chosen": "a", "rejected": "b"},
            "dpo",
            "line 1: chosen and rejected are answers, but the record has no prompt",
        ),
        (
            {"prompt": "a", "chosen": "a", "rejected": 3},
            "dpo",
            "line 1: rejected must be text or a list of messages, and is 3",
        ),
        (
            {"chosen": ["a"], "rejected": ["b"]},
            "dpo",
            "line 1: chosen must be text or a list of messages, and is ['a']",
        ),
    ],
)
def test_records_that_will_not_do(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, record: Any, objective: str, complaint: str
) -> None:
    with pytest.raises(OptionError) as error:
        prepare_records([record], tokenizer, tmp_path, objective=objective)
    assert complaint in str(error.value)
    assert len(str(error.value).splitlines()) <= 3


def test_prepared_pairs_are_no_text(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """The error does not depend on the cache of an earlier run, and a record shape can be named."""
    record = {"messages": [user("a"), assistant("good")], **PAIRS["implicit prompt"]}
    prepare_records([record], tokenizer, tmp_path, **DPO)
    with pytest.raises(OptionError, match="preference"):
        prepare_records([record], tokenizer, tmp_path)
    assert prepare_records([record], tokenizer, tmp_path, data_format="messages").counts["train"].shape == "messages"


def test_pack_pairs() -> None:
    packed = pack(Packing("pairs", 5), torch.tensor([3, 5, 0, 0, 2, 4]).numpy())
    assert packed.segments.tolist() == [[0, 3], [3, 8], [8, 10], [10, 14]]
    assert packed.first_segments.tolist() == [0, 2, 4]


def test_collate_pairs() -> None:
    def pair(number: int, *lengths: int) -> Sequence:
        tokens = torch.arange(1, sum(lengths) + 1)
        learned = torch.ones_like(tokens, dtype=torch.bool)
        learned[0] = learned[lengths[0]] = False
        return Sequence(number, tokens, learned, list(lengths))

    reference = torch.arange(10.0).view(2, 5)
    batch = collate_pairs([pair(4, 2, 3), pair(1, 4, 1)], reference)
    assert batch["input_ids"].tolist() == [[1, 2, 0, 0], [1, 2, 3, 4], [3, 4, 5, 0], [5, 0, 0, 0]]
    assert batch["labels"].tolist()[2] == [-100, 4, 5, -100]
    assert (batch["indices"].tolist(), batch["tokens"].tolist(), int(batch["targets"])) == ([4, 1], [2, 4, 3, 1], 2)
    assert batch["reference"].tolist() == [4, 1, 9, 6]
    assert "reference" not in collate_pairs([pair(0, 2, 2)])
    nothing = collate_pairs([], reference)
    assert (nothing["input_ids"].shape, nothing["reference"].shape, int(nothing["targets"])) == ((1, 2), (0,), 0)


def test_show(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    text = show_examples(prepare_records([PAIRS["text"]], tokenizer, tmp_path, **DPO).train, 1, tokenizer, False)
    assert text.index("good<eos>") < text.index("bad, too<eos>")


# --- The loss -------------------------------------------------------------------------------------------------------


def some_pairs(number: int) -> list[Sequence]:
    """Pairs of a shared prompt of 5 tokens and answers of 1 to 20, from a fixed seed."""
    torch.manual_seed(3)
    rows = []
    for index in range(number):
        lengths = [5 + int(torch.randint(1, 21, ())) for _ in range(2)]
        prompt = torch.randint(0, world.VOCABULARY, (5,))
        sides = [torch.cat([prompt, torch.randint(0, world.VOCABULARY, (length - 5,))]) for length in lengths]
        learned = torch.cat([torch.arange(length) >= 5 for length in lengths])
        rows.append(Sequence(index, torch.cat(sides), learned, lengths))
    return rows


def learned_log_probability(model: PreTrainedModel, row: Sequence, side: int) -> Any:
    """The expected value of one sequence without padding, token by token, in the dtype of the model."""
    tokens, learned = (torch.split(part, row.segment_lengths)[side] for part in (row.tokens, row.trained_on))
    log_p_TV = model(input_ids=tokens[None]).logits[0].log_softmax(dim=-1)
    return torch.stack([log_p_TV[t - 1, tokens[t]] for t in range(1, len(tokens)) if learned[t]]).sum()


def gradients(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def forward(objective: Preference, batch: dict[str, Tensor]) -> Any:
    names = ("input_ids", "labels", "reference")
    return objective(**{name: batch[name] for name in names if name in batch})


def test_against_the_formula_in_double(model_dir: Path) -> None:
    """Loss and gradient of equation 7 in fp64, for a model that differs from its reference."""
    rows, beta = some_pairs(3), 0.3
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    reference = forward(Preference(model, beta), collate_pairs(rows)).detach().view(2, 3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    loss = forward(Preference(model, beta), collate_pairs(rows, reference))
    loss.backward()
    actual = gradients(model)

    old = AutoModelForCausalLM.from_pretrained(model_dir).double()
    new = model.double()
    new.zero_grad()
    expected: Any = 0
    for row in rows:
        ratios = [
            learned_log_probability(new, row, side) - learned_log_probability(old, row, side).detach()
            for side in (0, 1)
        ]
        expected = expected - torch.log(torch.sigmoid(beta * (ratios[0] - ratios[1])))
    expected.backward()
    assert loss.dtype == torch.float32
    assert abs(expected.item() / 3 - LN_2) > 0.01, "the model has moved"
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    assert relative_l2(actual, gradients(new)) < 1e-5


def test_before_the_first_step(model_dir: Path) -> None:
    """With the model as its reference: ln 2 per pair, and beta / 2 x the gradient of (rejected - chosen)."""
    rows, beta = some_pairs(4), 0.3
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    objective = Preference(model, beta)
    reference = forward(objective, collate_pairs(rows)).detach().view(2, 4)
    loss = forward(objective, collate_pairs(rows, reference))
    loss.backward()
    actual = gradients(model)
    assert loss.item() == pytest.approx(4 * LN_2, abs=1e-6)
    model.zero_grad()
    chosen, rejected = forward(objective, collate_pairs(rows)).chunk(2)
    loss = beta / 2 * (rejected - chosen).sum()
    loss.backward()
    assert relative_l2(actual, gradients(model)) < 1e-6
    nothing = forward(objective, collate_pairs([], reference))
    assert (nothing.item(), nothing.requires_grad) == (0, True)


# --- Through the trainer --------------------------------------------------------------------------------------------


def referenced(dpo: list[object]) -> set[Path]:
    """The cached references; the cache directory is the last option."""
    return set(Path(str(dpo[-1])).glob("reference-*"))


@pytest.fixture(scope="module")
def unbroken(dpo: list[object], model_with_dropout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty steps on two ranks, with dropout and in micro-steps."""
    run = tmp_path_factory.mktemp("unbroken")
    options = ["--model_name_or_path", model_with_dropout, "--save_steps", 10, "--per_device_train_batch_size", 4]
    output = train_ok(2, *dpo, *STEADY, *options, "--ledger", "--output_dir", run)
    assert "objective     dpo, beta 0.1" in output
    assert "131 of 128 tokens, packing pairs" in output
    return run


def test_it_learns_to_prefer(unbroken: Path) -> None:
    """The validation loss begins at ln 2 and falls."""
    rows = read_records(unbroken / "metrics.jsonl")
    evaluations = [row["eval_loss"] for row in rows if "eval_loss" in row]
    assert evaluations[0] == pytest.approx(LN_2, abs=1e-6)
    assert evaluations == sorted(evaluations, reverse=True)
    assert evaluations[-1] < LN_2 / 2
    assert rows[0]["eval_pairs"] == 15
    assert "eval_perplexity" not in rows[0]
    AutoModelForCausalLM.from_pretrained(unbroken)


def test_the_ledger_of_pairs(unbroken: Path) -> None:
    steps = read(unbroken)
    assert problems(unbroken) == []
    assert {len(rows) for rows in steps.values()} == {16}
    tokens = read_records(unbroken / "metrics.jsonl")[-1]["tokens_seen"]
    assert sum(length for rows in steps.values() for _, length, _ in rows) == tokens


def not_again() -> None:
    """Patch a rank so that it cannot compute a reference."""
    original = checkpoint.ranks.compute_once
    checkpoint.ranks.compute_once = lambda path, compute: original(path, lambda: pytest.fail("computed again"))


def test_a_reference_for_each_way_of_computing(dpo: list[object], tmp_path: Path) -> None:
    """In bf16, a reference that is computed with other options differs, so the loss would not begin at ln 2."""
    options = [*dpo, "--data_cache_dir", tmp_path, "--bf16", "true", "--max_steps", 1]
    for name, more in {"one": [], "other": ["--bf16_residual"]}.items():
        train_ok(1, *options, *more, "--output_dir", tmp_path / name)
        assert read_records(tmp_path / name / "metrics.jsonl")[0]["eval_loss"] == pytest.approx(LN_2, abs=1e-6)


@pytest.mark.fault(
    "data",
    "the cached log-probabilities of the reference model (DPO) cut off, or with one bit flipped",
    "they are computed again; the resumed run is the unbroken one to the bit",
)
@pytest.mark.parametrize("state", ["kept", pytest.param("cut off", marks=pytest.mark.slow), "flipped"])
def test_resumed_to_the_bit(
    dpo: list[object], model_with_dropout: Path, unbroken: Path, tmp_path: Path, state: str
) -> None:
    """After a resume, the reference is still that of the initial model: read from the cache or computed again."""
    (path,) = referenced(dpo)
    reference = path.read_bytes()
    if state != "kept":
        path.write_bytes(reference[:100] if state == "cut off" else reference[:-1] + bytes([reference[-1] ^ 1]))
    cut_off_at(10, unbroken, tmp_path)
    options = [*dpo, *STEADY, "--model_name_or_path", model_with_dropout, "--save_steps", 10, "--output_dir", tmp_path]
    outcome = train(2, [*options, "--resume_from_checkpoint", "auto"], before=not_again if state == "kept" else None)
    assert outcome.exit_codes == [0, 0], outcome.output
    assert trajectory(tmp_path) == trajectory(unbroken)
    assert equal_to_the_bit(tmp_path / "checkpoint-20", unbroken / "checkpoint-20")
    assert path.read_bytes() == reference


def test_another_reference_is_refused(dpo: list[object], unbroken: Path, tmp_path: Path) -> None:
    """A resume with trained weights as the initial model is refused, because the reference would differ."""
    cut_off_at(10, unbroken, tmp_path)
    options = [*dpo, *STEADY, "--model_name_or_path", unbroken, "--output_dir", tmp_path]
    outcome = train(1, [*options, "--per_device_train_batch_size", 16, "--resume_from_checkpoint", "auto"])
    assert outcome.exit_codes == [2]
    assert "data_fingerprint was" in outcome.output


@pytest.fixture(scope="module")
def one_process(dpo: list[object], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    return first_gradient(Case("single", 1, 16), dpo, tmp_path_factory.mktemp("one"))


@pytest.mark.parametrize(
    "case",
    marked([Case("DDP", 2, 2), Case("FSDP", 2, 4, FSDP), Case("tensor parallel", 2, 4, TENSOR, slow=True)]),
)
def test_same_gradient(dpo: list[object], one_process: dict[str, Tensor], tmp_path: Path, case: Case) -> None:
    """With any ranks, strategy and accumulation, the gradient of a step equals that of one process."""
    assert relative_l2(first_gradient(case, dpo, tmp_path), one_process) < GATES.gradient


def test_bf16(dpo: list[object], tmp_path: Path) -> None:
    """FSDP casts module inputs to bf16, but not the reference: the loss is ln 2."""
    options = [*dpo, "--bf16", "true", "--strategy", "fsdp", "--max_steps", 1, "--validation_split_percentage", 0]
    train_ok(2, *options, "--dpo_beta", 1, "--output_dir", tmp_path)
    assert read_records(tmp_path / "metrics.jsonl")[0]["loss"] == pytest.approx(LN_2, abs=1e-3)


def test_more_ranks_than_pairs(dpo: list[object], tmp_path: Path) -> None:
    """A rank without pairs joins the collectives of an evaluation and adds 0. The cache key depends on the weights."""
    options = [*dpo, "--validation_split_percentage", 1, "--global_batch_size", 12, "--max_steps", 2]
    options += ["--warmup_steps", 0]
    before = referenced(dpo)
    train_ok(3, *options, "--output_dir", tmp_path / "three", "--strategy", "fsdp")
    train_ok(1, *options, "--output_dir", tmp_path / "one")
    assert len(referenced(dpo) - before) == 1, "one for both topologies"
    three, one = (read_records(tmp_path / name / "metrics.jsonl") for name in ("three", "one"))
    for ours, theirs in zip(three, one, strict=True):
        for name in ("loss", "eval_loss", "eval_pairs"):
            assert ours.get(name) == pytest.approx(theirs.get(name), abs=1e-5)
    assert three[0]["eval_pairs"] == 2
