"""Trainings that are killed at random instants and go on; started by test_preflight.py.

python killed_trainings.py OUT KILLS CONFIG [key=value ...]

Children are forked from this process, which has trained once and so imported everything. They draw no curves, which
take most of the time, and write their checkpoints slowly, so that kills meet half-written ones. Prints JSON.
"""

import io
import json
import os
import shutil
import signal
import sys
import time
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import torch

from visionattn.training import folder
from visionattn.training.config import load_config
from visionattn.training.loop import train

PIECES, PAUSE = 10, 0.01


def save_slowly(state, path) -> None:
    """In place of torch.save: the same bytes in pieces."""
    whole = io.BytesIO()
    save(state, whole)
    with open(path, "wb", buffering=0) as file:
        for piece in np.array_split(np.frombuffer(whole.getvalue(), np.uint8), PIECES):
            file.write(piece.tobytes())
            time.sleep(PAUSE)


def run(output: Path) -> None:
    """Trains in `output`, or goes on where the run there was killed; what it prints is left out."""
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        train(load_config(config, (*overrides, f"output={output}", "resume=auto")))


def start(output: Path) -> int:
    """Forks a training in `output`; its process id."""
    if child := os.fork():
        return child
    try:
        run(output)
        os._exit(0)
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(1)


def epochs(output: Path) -> int:
    """Complete epochs of a run, read from its checkpoint."""
    last = output / "last.pt"
    return len(torch.load(last, weights_only=True)["history"]) if last.exists() else 0


def differs(output: Path) -> bool:
    """Whether a finished run ended with other checkpoints than the one that was not killed, in number or content."""
    kept, wanted = (sorted(path.relative_to(folder) for path in folder.rglob("*.pt")) for folder in (output, whole))
    return kept != wanted or any(weights_differ(whole / name, output / name) for name in wanted)


def weights_differ(first: Path, second: Path) -> bool:
    """Whether two checkpoints hold other weights or averages."""
    wanted, found = (torch.load(path, weights_only=True) for path in (first, second))
    return any(
        not torch.equal(found[part][name], value) for part in ("model", "ema") for name, value in wanted[part].items()
    )


out, kills, config, overrides = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4:]
save, rng = torch.save, np.random.default_rng(0)
torch.set_num_threads(1)
torch.save, folder.draw_curves = save_slowly, lambda history, baselines, path: path.write_bytes(b"")
whole = out / "whole"
run(whole)
began = time.perf_counter()
failed = os.waitstatus_to_exitcode(os.waitpid(start(out / "again"), 0)[1])
seconds = time.perf_counter() - began
found = {"failed": failed, "kills": 0, "lost": 0, "half_written": 0, "finished": 0, "different": 0}
output = out / "run"
while not found["failed"] and (found["kills"] < kills or output.exists()):
    before = epochs(output)
    child = start(output)
    if found["kills"] < kills:
        time.sleep(rng.uniform(0, seconds))
        os.kill(child, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    found["lost"] += epochs(output) < before
    for path in output.glob("checkpoints/*.pt"):
        torch.load(path, weights_only=True)
    if code == -signal.SIGKILL:
        found["kills"] += 1
        found["half_written"] += bool(list(output.glob(".last.pt.*")))
    elif code:
        found["failed"] = code
    else:
        found["finished"] += 1
        found["different"] += differs(output)
        found["leftover"] = [path.name for path in output.rglob(".*")]
        shutil.rmtree(output)
print(json.dumps(found))
