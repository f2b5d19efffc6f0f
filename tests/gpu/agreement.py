"""What one step of each strategy writes on the device, against the same step on the CPU."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from tests.benchmarks import catalogue
from tests.benchmarks.workloads import mlp
from tests.gpu.rows import Row, Setting, attempted

TASKS = 3
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-4}
"""How far all written gradients may be off, as a part of their length."""
CPU = torch.device("cpu")


def measure(setting: Setting) -> Iterator[Row]:
    """Yield a row for each dtype, and one for each strategy that is off."""
    for dtype in TOLERANCES:
        what = str(dtype).removeprefix("torch.")
        yield from attempted(what, _rows, what, dtype, setting)


def _rows(what: str, dtype: torch.dtype, setting: Setting) -> Iterator[Row]:
    found = {}
    variants = catalogue.variants(TASKS)
    for variant in variants[:: 10 if setting.quick else 1]:
        there, here = (written(variant, device, dtype) for device in (setting.device, CPU))
        found[variant] = relative_error(there.cpu(), here)
    yield from rows_of(what, found, TOLERANCES[dtype])


def rows_of(what: str, errors: Mapping[str, float], tolerance: float) -> Iterator[Row]:
    """Yield a row for all strategies, and one for each whose error is too large, or NaN."""
    off = {variant: error for variant, error in errors.items() if not error <= tolerance}
    worst = max(errors, key=lambda name: (errors[name] != errors[name], errors[name]))
    summary = (
        f"{len(errors)} strategies, worst {worst} {errors[worst]:.1e}, at most {tolerance:.0e}"
    )
    yield Row(what, summary, dict(errors), good=not off)
    for variant, error in off.items():
        yield Row(f"{what}: {variant}", f"off by {error:.1e}", good=False)


def written(variant: str, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return everything that a step has put into ``.grad``, as one vector in float64."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        workload = mlp(device, TASKS, width=32, size=16)
        balancer = catalogue.balancer_of(workload, variant).to(dtype)
        catalogue.step_of(workload, balancer)()
    finally:
        torch.set_default_dtype(before)
    gradients = [p.grad for p in [*workload.model.parameters(), *balancer.parameters()]]
    return torch.cat([g.detach().double().flatten() for g in gradients if g is not None])


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Return the length of the difference over the length of what is expected."""
    if found.shape != expected.shape:
        raise ValueError(
            f"both devices must write as many numbers, but wrote {len(found)} and {len(expected)}."
        )
    return float((found - expected).norm() / expected.norm())
