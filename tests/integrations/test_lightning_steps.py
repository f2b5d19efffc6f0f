"""Lightning: steps that are resumed, left out, made by several Balancers, sharded, or compiled."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("lightning", reason='needs `pip install "mtbalance[lightning]"`')
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import fully_shard

from mtbalance import Balancer
from tests.distributed.harness import Here, Pool
from tests.integrations.parts import (
    BATCHES,
    TASKS,
    Parts,
    assert_same,
    data,
    plain,
    tell_as_torchrun,
)
from tests.integrations.test_lightning import Kept, Net, PartOfRank, trainer

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers",
    "ignore:.*isinstance.treespec",
    "ignore:Checkpoint directory",
    "ignore:The dirpath has changed",
)


class Continued:
    """Batches that go on where they were when a checkpoint was saved."""

    def __init__(self) -> None:
        self.seen = 0

    def __len__(self) -> int:
        return BATCHES

    def __iter__(self) -> Any:
        for number in range(self.seen % BATCHES, BATCHES):
            self.seen = number + 1
            yield data()[number]
        self.seen = 0

    def state_dict(self) -> dict[str, int]:
        return {"seen": self.seen}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.seen = state["seen"]


class Resumed(Net):
    def train_dataloader(self) -> Any:
        return Continued()


@pytest.mark.parametrize(
    ("every", "steps"), [(1, (2, 6, 9)), (4, (1, 2, 3))], ids=["one", "accumulation"]
)
def test_a_fit_goes_on_from_any_step(every: int, steps: tuple[int, ...], tmp_path: Path) -> None:
    """Also from the last one of an epoch, whose checkpoint precedes the epoch's end."""

    def fit(start: Path | None = None) -> Net:
        folder = tmp_path / ("whole" if start is None else start.stem)
        saves = ModelCheckpoint(folder, "{step}", save_top_k=-1, every_n_train_steps=1)
        net = Resumed("dwa+graddrop")
        trainer(
            tmp_path,
            max_epochs=3,
            accumulate_grad_batches=every,
            enable_checkpointing=True,
            callbacks=[saves],
        ).fit(net, ckpt_path=start)
        return net

    wanted = plain("dwa+graddrop", epochs=3, every=every)
    assert_same(fit().parts, wanted)
    for step in steps:
        assert_same(fit(tmp_path / "whole" / f"step={step}.ckpt").parts, wanted)


@pytest.mark.filterwarnings("ignore:.*returned `None`")
@pytest.mark.parametrize("left_out", [0, 1, BATCHES - 1])
def test_a_batch_without_any_loss_within_accumulation(left_out: int, tmp_path: Path) -> None:
    """Whichever of the batches of a step it is, the others make that step, as in Lightning."""

    class Sparse(Net):
        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            return None if batch_idx == left_out else super().training_step(batch, batch_idx)

    class Summed(Sparse):
        def balance(self, losses: Any, **options: Any) -> Tensor:
            return torch.stack(list(losses.values())).sum()

    nets = Sparse("sum"), Summed("sum")
    for net in nets:
        trainer(tmp_path, accumulate_grad_batches=2).fit(net)
    for found, wanted in zip(*(net.parameters() for net in nets), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


class Several(PartOfRank):
    """Two networks in turn, the second of which sees what the first has become."""

    def __init__(self, here: Here | None = None) -> None:
        super().__init__("dwa+pcgrad", automatic=False)
        self.second = Parts("dwa+graddrop")
        if here is not None:
            self.here = here

    def train_dataloader(self) -> Any:
        return super().train_dataloader() if hasattr(self, "here") else Continued()

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        first, second = self.optimizers()
        first.zero_grad()
        self.balance(self.parts.losses(batch))
        first.step()
        second.zero_grad()
        self.balance(chained(self.parts, self.second, batch), balancer=self.second.balancer)
        second.step()

    def configure_optimizers(self) -> Any:
        return self.parts.optimizer(), self.second.optimizer()


def chained(first: Parts, second: Parts, x: Tensor) -> dict[str, Tensor]:
    with torch.no_grad():
        seen = first.network.trunk(x).mean(1, keepdim=True)
    return second.losses(x + seen)


def two_in_a_plain_loop() -> tuple[Parts, Parts]:
    first, second = Parts("dwa+pcgrad"), Parts("dwa+graddrop")
    optimizers = first.optimizer(), second.optimizer()
    for _ in range(2):
        for x in data():
            optimizers[0].zero_grad()
            first.balancer.backward(first.losses(x))
            optimizers[0].step()
            optimizers[1].zero_grad()
            second.balancer.backward(chained(first, second, x))
            optimizers[1].step()
        first.balancer.end_epoch()
        second.balancer.end_epoch()
    return first, second


def test_several_balancers_in_one_module(tmp_path: Path) -> None:
    logger, net = Kept(), Several()
    trainer(tmp_path, logger=logger, log_every_n_steps=1).fit(net)
    for found, wanted in zip((net.parts, net.second), two_in_a_plain_loop(), strict=True):
        assert_same(found, wanted)
    names = {name for _, row in logger.rows for name in row}
    assert {"balance/loss/a", "second.balancer/loss/a"} <= names


@pytest.mark.parametrize(
    ("automatic", "own", "error", "words"),
    [
        (True, True, RuntimeError, "`balancer` is for manual optimization"),
        (False, False, ValueError, "`balancer` must be a submodule"),
    ],
)
def test_a_balancer_that_cannot_be_told(
    automatic: bool, own: bool, error: Any, words: str, tmp_path: Path
) -> None:
    stranger = Parts("sum").balancer

    class Wrong(Net):
        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            other = self.balancer if own else stranger
            return self.balance(self.parts.losses(batch), balancer=other)

    with pytest.raises(error, match=words):
        trainer(tmp_path).fit(Wrong(automatic=automatic))


def test_a_compiled_module(tmp_path: Path) -> None:
    net = Net("uncert+pcgrad")
    trainer(tmp_path).fit(torch.compile(net, backend="eager"))
    assert_same(net.parts, plain("uncert+pcgrad"))


class Sharded(PartOfRank):
    """Sharded where Lightning wants it, with a Balancer made thereafter."""

    def configure_model(self) -> None:
        mesh = self.device_mesh["data_parallel"]
        network = self.parts.network
        for each in (network.trunk, *network.heads.values(), network):
            fully_shard(each, mesh=mesh)
        self.parts.balancer = self.balancer = Balancer(
            self.balancer.weighting, self.balancer.gradient, tasks=TASKS, shared=network.trunk
        )


ABSENT = {(1, 1): ("b",), (0, 2): TASKS, (0, 4): ("a", "c")}
"""Tasks without labels in a rank's part of a batch, by (rank, batch)."""


class Partial(PartOfRank):
    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        absent = ABSENT.get((self.here.rank, batch_idx), ())
        losses = self.parts.losses(batch)
        return self.balance({task: loss for task, loss in losses.items() if task not in absent})


def one_process_with_both_parts() -> tuple[Parts]:
    """A plain loop in which a task's loss is the mean of the parts that have it."""
    parts = Parts("uncert+cagrad")
    optimizer = parts.optimizer()
    for _ in range(2):
        for number, x in enumerate(data()):
            optimizer.zero_grad()
            of_ranks = [parts.losses(part) for part in x.chunk(2)]
            known: dict[str, list[Tensor]] = {task: [] for task in TASKS}
            for rank, losses in enumerate(of_ranks):
                for task in set(TASKS).difference(ABSENT.get((rank, number), ())):
                    known[task].append(losses[task])
            parts.balancer.backward({task: sum(of) / len(of) for task, of in known.items() if of})
            optimizer.step()
    return (parts,)


WANTED: dict[str, Any] = {
    "several": two_in_a_plain_loop,
    "sharded": lambda: (plain("uncert+cagrad"),),
    "partial": one_process_with_both_parts,
}


def fit_in_rank(here: Here, folder: str, kind: str) -> list[dict[str, Tensor]]:
    tell_as_torchrun(here)
    net: PartOfRank
    if kind == "several":
        net = Several(here)
    else:
        net = (Partial if kind == "partial" else Sharded)("uncert+cagrad")
        net.here = here
    strategy: Any = ModelParallelStrategy(2, 1) if kind == "sharded" else "ddp"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer(Path(folder), strategy=strategy, devices=2, use_distributed_sampler=False).fit(net)
    parts = (net.parts, net.second) if isinstance(net, Several) else (net.parts,)
    return [
        {name: getattr(p, "full_tensor", lambda p=p: p)() for name, p in each.named_parameters()}
        for each in parts
    ]


@pytest.mark.parametrize("kind", list(WANTED))
def test_two_processes_equal_one(kind: str, two: Pool, tmp_path: Path) -> None:
    wanted = WANTED[kind]()
    for found in two.run(fit_in_rank, str(tmp_path), kind):
        for ours, parts in zip(found, wanted, strict=True):
            for name, value in parts.named_parameters():
                torch.testing.assert_close(ours[name], value, rtol=1e-5, atol=1e-6, msg=name)
