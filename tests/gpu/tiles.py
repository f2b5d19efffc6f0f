"""Large bags: time and memory of a step, and that attention makes no matrix of tiles by tiles."""

from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.benchmarks.memory import memory_of
from tests.benchmarks.peers import Step
from tests.benchmarks.step_cost import (
    PRECISIONS,
    VARIANTS,
    balanced_step,
    balancers,
    floors,
    interleaved,
    medians_of,
)
from tests.benchmarks.workloads import transformer, with_precision
from tests.gpu.rows import Row, Setting, attempted, mebibytes, milliseconds

TILES = (4096, 16384)
QUICK = (64,)
MEASURED = ("equal+sum", "equal+pcgrad", "equal+cagrad", "equal+graddrop", "autol+cagrad")
ROUNDS = 15
MARGIN = 12.0
"""Seconds for imports, and for memory to be measured."""
WITHOUT_MATRIX = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
if hasattr(SDPBackend, "CUDNN_ATTENTION"):
    WITHOUT_MATRIX.append(SDPBackend.CUDNN_ATTENTION)


def measure(setting: Setting) -> Iterator[Row]:
    """Yield a row for each number of tiles and precision, and one about attention."""
    sizes = QUICK if setting.quick else TILES
    share = setting.share(len(sizes) * len(PRECISIONS), MARGIN)
    for tiles in sizes:
        for precision in PRECISIONS:
            what = f"{tiles:,} tiles, {precision}"
            yield from attempted(what, _rows, what, tiles, precision, share, setting)


def _rows(what: str, tiles: int, precision: str, seconds: float, setting: Setting) -> Iterator[Row]:
    device = setting.device
    workload = with_precision(transformer(device, tiles), precision)
    made = balancers(workload, {name: VARIANTS[name] for name in MEASURED})
    steps = floors(workload)
    steps |= {name: balanced_step(workload, made[name], VARIANTS[name]) for name in MEASURED}
    trained = nn.ModuleList([workload.model, *made.values()])
    rounds = 1 if setting.quick else ROUNDS
    times, _ = interleaved(steps, {}, trained, rounds, most_seconds=seconds)
    medians = medians_of(times)
    peaks = {}
    for name, step in steps.items():
        trained.zero_grad(set_to_none=True)
        peaks[name] = memory_of(step, device).peak
    cells = [f"{n} {milliseconds(t)} {mebibytes(peaks[n])}" for n, t in medians.items()]
    figures = {"seconds": medians, "peaks": peaks, "rounds": max(map(len, times.values()))}
    yield Row(what, ", ".join(cells), figures)
    yield attention(what, steps["floor 1"], trained, tiles, peaks["floor 1"], device)


def attention(
    what: str, step: Step, trained: nn.Module, tiles: int, peak: float, device: torch.device
) -> Row:
    """Return whether a plain step runs where attention with a matrix is forbidden.

    A peak below one such matrix in 16-bit numbers proves it once more; above, it tells nothing.
    """
    matrix = 2 * tiles * tiles
    found = f"peak {mebibytes(peak)}, one n x n matrix of 16-bit numbers {mebibytes(matrix)}"
    trained.zero_grad(set_to_none=True)
    try:
        with sdpa_kernel(WITHOUT_MATRIX):
            step()
    except RuntimeError as error:
        first = str(error).strip().partition("\n")[0]
        # On a CPU, attention with dropout has no other way in training, and none is promised.
        good = False if device.type == "cuda" else None
        return Row(f"{what}: attention", f"makes a matrix ({first[:120]}); {found}", good=good)
    return Row(f"{what}: attention", f"makes no matrix; {found}", {"matrix": matrix}, good=True)
