# ruff: noqa: T201  (it prints what it measures)
"""Memory and time of a training step on large bags: ``python -m tests.pathology.long_bags 10000``.

Every number of tiles has a process of its own, with one thread. Memory is the peak of the step
(forward and backward pass of two targets, and AdamW) above what was there before; time is that
of the processor. ``--matrix-gb`` moves the size above which attention goes in blocks: ``inf`` for
PyTorch's attention at any size, 0 for blocks at any.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy

from examples.pathology.training import attention
from examples.pathology.training.model import JointTransformer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tiles", type=int, nargs="+")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--matrix-gb", type=float, default=attention.MATRIX_GB)
    args = parser.parse_args()
    if len(args.tiles) > 1:
        same = "--layers", str(args.layers), "--matrix-gb", str(args.matrix_gb)
        for tiles in args.tiles:
            subprocess.run([sys.executable, "-m", __spec__.name, str(tiles), *same], check=True)
        return
    torch.set_num_threads(1)
    torch.manual_seed(0)
    attention.MATRIX_GB = args.matrix_gb
    model = JointTransformer([2, 1], layers=args.layers).train()
    tiles = torch.randn(args.tiles[0], 768)
    before, started = peak_gb(), time.process_time()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    logits, number = model(tiles).outputs
    (cross_entropy(logits, torch.tensor([1])) + number.square().mean()).backward()
    optimizer.step()
    seconds = time.process_time() - started
    print(f"{args.tiles[0]} tiles: {peak_gb() - before:.2f} GB, {seconds:.1f} s", flush=True)


def peak_gb() -> float:
    """Return the most memory that this process has had, on Linux."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024e-9


if __name__ == "__main__":
    main()
