"""Proves compare/peers/: which trainers do the same work as this one, and that other work is found out."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from compare.peers import same
from compare.peers.trainers import PEERS, package_of
from tests.launch import ROOT

SEEN: dict[str, Any] = {column: ["float32"] for column in same.COLUMNS} | {"losses": [3.0, 2.0]}


def test_hash_of_global_batches() -> None:
    """The order within a global batch does not matter, because ranks share it; a token, a batch and their order do."""
    expected = same.hash_of([["a", "b"], ["c", "d"]])
    assert same.hash_of([["b", "a"], ["d", "c"]]) == expected
    for other in ([["a", "b"], ["c", "e"]], [["a", "c"], ["b", "d"]], [["c", "d"], ["a", "b"]], [["a", "b"]]):
        assert same.hash_of(other) != expected


def test_package_of_each_peer() -> None:
    assert {package_of(name) for name in PEERS} == {"accelerate", "lightning", "deepspeed", "torchtitan"}


@pytest.mark.parametrize(("tokens", "exit_code"), [("as ours", 0), ("others", 1), ("none", 1)])
def test_other_work_is_found_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tokens: str, exit_code: int
) -> None:
    """A peer that trained on other tokens, or ended early, has its name below the table."""
    seen = {"as ours": SEEN | {"tokens": "1f"}, "others": SEEN | {"tokens": "2e", "losses": [3.0, 2.5]}, "none": {}}

    def peer(name: str, folder: str, *_: Any) -> dict[str, Any]:
        Path(f"{folder}/{name}.log").write_text("its last words")
        return seen[tokens]

    monkeypatch.setattr(sys, "argv", ["same", "--ranks", "1", "--peers", "HF Trainer"])
    monkeypatch.setattr(same, "common_options", lambda *_: ["--model_name_or_path", "x"])
    monkeypatch.setattr(same, "ours", lambda *_: SEEN | {"tokens": "1f"})
    monkeypatch.setattr(same, "peer", peer)
    assert same.main() == exit_code
    output = capsys.readouterr().out
    assert ("other work: HF Trainer" in output) == bool(exit_code)
    assert ("its last words" in output) == (tokens == "none")
    assert ("| HF Trainer | 2e | 5.0e-01 |" in output) == (tokens == "others")


@pytest.mark.slow
def test_two_peers(tmp_path: Path) -> None:
    """On two ranks: the same tokens, losses equal to rounding, and all in fp32, as on the CPU."""
    command = [sys.executable, "-m", "compare.peers.same", "--peers", "HF Trainer;Accelerate"]
    run = subprocess.run([*command, "--data_cache_dir", str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    rows = [line.strip("| ").split(" | ") for line in run.stdout.splitlines() if line.startswith("| ")][1:]
    assert [row[0] for row in rows] == ["train.py", "HF Trainer", "Accelerate"]
    assert len({row[1] for row in rows}) == 1, "tokens"
    assert max(float(row[2]) for row in rows) < 1e-5
    assert {dtype for row in rows for dtype in row[3:7]} == {"float32"}


@pytest.mark.slow
def test_dtypes_in_bf16(tmp_path: Path) -> None:
    """The witness sees products in bf16, and the head's gradient, which a CPU sums in fp32 (loss/cross_entropy.py)."""
    text = tmp_path / "text.txt"
    text.write_text((ROOT / "train.py").read_text() * 4)
    argv = ["--train_file", text, "--validation_split_percentage", 0, "--max_steps", 3, "--bf16", "true"]
    argv += ["--output_dir", tmp_path / "run"]
    command = [sys.executable, "-m", "compare.peers.witness", tmp_path / "seen", *argv]
    subprocess.run(list(map(str, command)), cwd=ROOT, check=True, capture_output=True)
    seen = json.loads((tmp_path / "seen-0.json").read_text())
    assert {name: seen[name] for name in same.COLUMNS} == {
        "weights": ["float32"],
        "gradients": ["float32"],
        "moments": ["float32"],
        "products": ["bfloat16", "float32"],
    }
