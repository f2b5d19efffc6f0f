"""Accelerate, the package itself: a loop with it equals the plain loop."""

import itertools
import warnings
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("accelerate", reason='needs `pip install "mtbalance[accelerate]"`')
from accelerate import Accelerator
from accelerate.state import DistributedType

from mtbalance import Record
from mtbalance.integrations.accelerate import backward, prepare
from tests.distributed.harness import ALONE, Here, Pool
from tests.integrations.parts import (
    Parts,
    assert_same,
    data,
    forget_accelerators,
    plain,
    tell_as_torchrun,
)


class Loop:
    """A loop as Accelerate's users write it; the Balancer is not part of the model."""

    def __init__(
        self,
        method: str,
        *,
        here: Here = ALONE,
        every: int = 1,
        given: bool = True,
        wrapped: bool = False,
        precision: str = "no",
        scaler: Any = None,
    ) -> None:
        self.accelerator = Accelerator(
            cpu=True, gradient_accumulation_steps=every, mixed_precision=precision
        )
        self.half = scaler is not None
        if self.half:  # Accelerate itself refuses float16 on a CPU
            self.accelerator.scaler = scaler
        self.parts = Parts(method, given=given)
        rows = torch.utils.data.TensorDataset(data().flatten(0, 1))
        loader = torch.utils.data.DataLoader(rows, batch_size=data().shape[1] // here.size)
        self.balancer: Any = prepare(self.accelerator, self.parts.balancer)
        if wrapped:
            self.accelerator._custom_objects.clear()
            self.balancer = self.accelerator.prepare(self.parts.balancer)
        self.network, self.optimizer, self.loader = self.accelerator.prepare(
            self.parts.network, self.parts.optimizer(), loader
        )
        self.records: list[Record | None] = []

    def losses(self, x: Tensor) -> dict[str, Tensor]:
        with torch.autocast("cpu", torch.float16, enabled=self.half):
            losses: dict[str, Tensor] = self.network(x)
        return losses

    def train(self, epochs: int, *, clip: float = 0.0) -> Parts:
        for _ in range(epochs):
            self.train_on(self.loader, clip=clip)
            self.parts.balancer.end_epoch()
        return self.parts

    def train_on(self, batches: Iterable[Any], *, clip: float = 0.0) -> None:
        accelerator = self.accelerator
        for (x,) in batches:
            with accelerator.accumulate(self.network):
                self.records += [backward(accelerator, self.balancer, self.losses(x))]
                if clip and accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(self.parts.parameters(), clip)
                self.optimizer.step()
                self.optimizer.zero_grad()


@pytest.mark.parametrize("method", ["pcgrad", "dwa+cagrad", "uncert+sum"])
def test_a_loop_equals_the_plain_loop(method: str) -> None:
    assert_same(Loop(method).train(2), plain(method))


@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_accumulation_with_batches_left_over_and_clipping(clip: float) -> None:
    loop = Loop("dwa+pcgrad", every=4)
    assert_same(loop.train(2, clip=clip), plain("dwa+pcgrad", clip=clip, every=4))
    assert [record is not None for record in loop.records] == [0, 0, 0, 1, 0, 1] * 2


def test_bfloat16() -> None:
    wanted = plain("uncert+cagrad", dtype=torch.bfloat16)
    assert_same(Loop("uncert+cagrad", precision="bf16").train(2), wanted)


@pytest.mark.parametrize("wrapped", [False, True], ids=["ours", "accelerator.prepare"])
def test_a_compiled_model(wrapped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    loop = Loop("uncert+pcgrad", wrapped=wrapped, every=4)
    assert isinstance(loop.network, torch._dynamo.OptimizedModule)
    assert_same(loop.train(2), plain("uncert+pcgrad", every=4))


def test_float16_has_the_scaler_of_the_accelerator() -> None:
    scalers = [torch.amp.GradScaler("cpu", init_scale=1024.0) for _ in range(2)]
    found = Loop("uncert+cagrad", scaler=scalers[0]).train(2)
    assert_same(found, plain("uncert+cagrad", dtype=torch.float16, scaler=scalers[1]))
    assert found.balancer.weighting.get_parameter("log_var").abs().max() > 0.01


@pytest.mark.parametrize("wrapped", [False, True], ids=["ours", "accelerator.prepare"])
@pytest.mark.parametrize("method", ["dwa+graddrop", "uncert+cagrad"])
def test_save_state_and_load_state(method: str, wrapped: bool, tmp_path: Path) -> None:
    first = Loop(method, wrapped=wrapped)
    first.train(2)
    first.accelerator.save_state(str(tmp_path))
    forget_accelerators()
    second = Loop(method, wrapped=wrapped)
    second.accelerator.load_state(str(tmp_path))
    assert_same(second.train(2), plain(method, epochs=4))


def test_a_loop_goes_on_in_mid_epoch(tmp_path: Path) -> None:
    first = Loop("dwa+graddrop")
    first.train(1)
    half = itertools.islice(iter(first.loader), 3)
    first.train_on(half)
    first.accelerator.save_state(str(tmp_path))
    forget_accelerators()
    second = Loop("dwa+graddrop")
    second.accelerator.load_state(str(tmp_path))
    second.train_on(second.accelerator.skip_first_batches(second.loader, 3))
    second.parts.balancer.end_epoch()
    assert_same(second.train(2), plain("dwa+graddrop", epochs=4))


def test_other_arguments_are_passed_on() -> None:
    """MoDo refuses to do without further batches."""
    loop = Loop("modo")
    batches = (lambda: loop.losses(data()[0]),)
    record = backward(loop.accelerator, loop.balancer, loop.losses(data()[1]), batches=batches)
    assert record is not None
    assert record.combination is not None


@pytest.mark.parametrize("kind", [DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM])
def test_engines_that_make_the_backward_pass_are_refused(kind: DistributedType) -> None:
    accelerator: Any = SimpleNamespace(distributed_type=kind)
    with pytest.raises(RuntimeError, match=rf"{kind.value} makes the backward pass"):
        backward(accelerator, Parts("sum").balancer, {})


def loop_in_rank(here: Here, options: dict[str, Any], clip: float) -> dict[str, Tensor]:
    tell_as_torchrun(here)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        forget_accelerators()
        try:
            loop = Loop("uncert+cagrad", here=here, **options)
            assert loop.accelerator.num_processes == here.size
            wrapped = options.get("wrapped", False)
            assert isinstance(loop.balancer, torch.nn.parallel.DistributedDataParallel) == wrapped
            return dict(loop.train(2, clip=clip).named_parameters())
        finally:
            forget_accelerators()


@pytest.mark.parametrize(
    "options",
    [{"every": 4}, {"wrapped": True}, {"given": False}],
    ids=["accumulation", "accelerator.prepare", "inferred"],
)
def test_two_processes_equal_one(options: dict[str, Any], two: Pool) -> None:
    clip = 0.0 if "every" in options else 0.5
    wanted = plain("uncert+cagrad", clip=clip, every=options.get("every", 1))
    for found in two.run(loop_in_rank, options, clip):
        for name, value in wanted.named_parameters():
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6, msg=name)
