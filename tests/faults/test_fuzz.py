"""Ten thousand files that lie: each is accepted or refused in words, and nothing else happens.

A failure names the seed. `FUZZ_SEED=seed pytest ...` replays it.
"""

import json
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist
from hypothesis import HealthCheck, Phase, given, seed, settings
from transformers import AutoModelForCausalLM, AutoTokenizer

from config.errors import OptionError
from tests.faults.fuzz import CHAT, TARGETS, World, snapshot, watch
from tests.world import PLAIN, make_documents, without_markers

INPUTS = 10_000  # of the slow test, over all targets


@pytest.fixture(scope="module")
def world(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """A directory with a model, data, a finished checkpoint, and files outside that nothing may touch."""
    place = tmp_path_factory.mktemp("fuzz")
    shutil.copytree(model_dir, place / "model")
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = without_markers(PLAIN)
    shutil.copytree(model_dir, place / "sharded", ignore=shutil.ignore_patterns("*.safetensors"))
    AutoModelForCausalLM.from_pretrained(model_dir).save_pretrained(place / "sharded", max_shard_size="20KB")
    (place / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in make_documents()[:9]))
    (place / "chat.jsonl").write_text("".join(json.dumps({"messages": CHAT[1:3]}) + "\n" for _ in range(3)))
    (place / "pairs.jsonl").write_text(json.dumps({"p": "a", "c": "b", "r": "c"}) + "\n")
    (place / "outside").mkdir()
    (place / "outside" / "file").write_text('{"outside": 1}')
    os.mkfifo(place / "pipe")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(place / "cache" / "compiled"))
        dist.init_process_group("gloo", store=dist.FileStore(str(place / "store"), 1), rank=0, world_size=1)
        yield World(place, tokenizer)
        dist.destroy_process_group()


@pytest.fixture(autouse=True)
def less_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Templates and configurations without end are found sooner."""
    for module in ("chat.template", "model.build"):
        monkeypatch.setattr(f"{module}.SECONDS", 5.0)


def check_inputs(world: World, name: str, number: int, derandomize: bool) -> None:
    """Give `number` inputs to a target. Raises AssertionError, with the smallest input that fails."""
    target, place = TARGETS[name], world.place
    strategy = target.content(world)
    before = snapshot(place / "outside"), snapshot(place / "model"), snapshot(place / "sharded")
    number_of_seed = int(os.environ.get("FUZZ_SEED", secrets.randbelow(2**32)))

    def once(content: object) -> None:
        try:
            target.read(world, content)
        except OptionError as error:
            lines = str(error).splitlines()
            assert 1 <= len(lines) <= 3, lines
        finally:
            for prepared in (place / "cache").glob("data-*"):  # thousands of them would take time
                shutil.rmtree(prepared) if prepared.is_dir() else prepared.unlink()
        assert not (place / "trace").exists()

    def every(content: object) -> None:
        with watch(place):
            once(content)

    every = given(strategy)(every)
    phases = (Phase.generate, Phase.shrink)
    checks = list(HealthCheck)
    rules = settings(
        max_examples=number,
        derandomize=derandomize,
        deadline=None,
        database=None,
        phases=phases,
        suppress_health_check=checks,
    )
    run = rules(every) if derandomize else seed(number_of_seed)(rules(every))
    try:
        run()
    except BaseException as error:
        error.add_note(f"replay with FUZZ_SEED={number_of_seed}" if not derandomize else "it fails each time")
        raise
    assert (snapshot(place / "outside"), snapshot(place / "model"), snapshot(place / "sharded")) == before


@pytest.mark.fault(
    "security",
    "any file that a run reads, changed in hundreds of ways",
    "used, or exit 2 with at most three lines; no hang, nothing executed, nothing written elsewhere",
)
@pytest.mark.parametrize("name", TARGETS)
def test_files_that_lie(world: World, name: str) -> None:
    check_inputs(world, name, 4 * TARGETS[name].weight, derandomize=True)


@pytest.mark.slow
@pytest.mark.fault("security", "any file that a run reads, changed in 10,000 ways", "as above")
@pytest.mark.parametrize("name", TARGETS)
def test_ten_thousand_files_that_lie(world: World, name: str) -> None:
    total = sum(target.weight for target in TARGETS.values())
    check_inputs(world, name, INPUTS * TARGETS[name].weight // total, derandomize=False)
