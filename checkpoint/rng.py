"""The random number generators of a rank: seeded, saved and restored."""

import base64
import hashlib
from typing import Any

import torch


def seed_rank(seed: int, step: int, rank: int) -> None:
    """Seed this rank's generators from seed, step and rank, because equal dropout on all ranks would be biased."""
    torch.manual_seed(int.from_bytes(hashlib.sha256(f"{seed} {step} {rank}".encode()).digest()[:4]))


def rng_state() -> dict[str, str]:
    """The states of torch's generators on the CPU and on this rank's GPU, in base64."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return {device: base64.b64encode(state.numpy().tobytes()).decode() for device, state in states.items()}


def is_rng_state(state: Any) -> bool:
    """Whether a JSON value is a state that `restore_rng` accepts: of a CPU, perhaps with a state of a GPU."""
    if not isinstance(state, dict) or not {"cpu"} <= state.keys() <= {"cpu", "cuda"}:
        return False
    try:
        states = {device: base64.b64decode(text, validate=True) for device, text in state.items()}
        torch.Generator().set_state(torch.frombuffer(bytearray(states["cpu"]), dtype=torch.uint8))
    except (ValueError, TypeError, RuntimeError):
        return False
    # A state of a GPU is the seed and the offset of Philox, 8 bytes each. The offset counts in steps of 4.
    cuda = states.get("cuda", bytes(16))
    return len(cuda) == 16 and int.from_bytes(cuda[8:], "little") % 4 == 0


def restore_rng(state: dict[str, str]) -> None:
    """Set torch's generators to the states that `rng_state` returned."""
    states = {
        device: torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8) for device, text in state.items()
    }
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
