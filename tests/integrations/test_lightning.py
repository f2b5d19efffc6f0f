"""Lightning, the package itself: a fit equals the plain loop, whatever the Trainer is told."""

import logging
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("lightning", reason='needs `pip install "mtbalance[lightning]"`')
import lightning
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins import MixedPrecision

from mtbalance import Balancer, make_balancer
from mtbalance.integrations.lightning import Balanced
from tests.distributed.harness import Here, Pool
from tests.integrations.parts import TASKS, Parts, assert_same, data, plain, tell_as_torchrun

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers",
    "ignore:.*isinstance.treespec",
    "ignore:Checkpoint directory",
)
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


class Net(Balanced, lightning.LightningModule):
    def __init__(
        self, method: str = "pcgrad", *, automatic: bool = True, given: bool = True
    ) -> None:
        super().__init__()
        self.parts = Parts(method, given=given)
        self.balancer = self.parts.balancer
        self.automatic_optimization = automatic

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        losses = self.parts.losses(batch)
        if self.automatic_optimization:
            return self.balance(losses)
        optimizer = self.optimizers()
        optimizer.zero_grad()
        total = self.balance(losses)
        optimizer.step()
        return total

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.parts.optimizer()

    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(data(), batch_size=None)


def trainer(folder: Path, **options: Any) -> lightning.Trainer:
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 2,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": folder,
    }
    return lightning.Trainer(**(defaults | options))


@pytest.mark.parametrize("method", ["pcgrad", "dwa+cagrad", "uncert+sum"])
@pytest.mark.parametrize("automatic", [True, False], ids=["automatic", "manual"])
def test_a_fit_equals_the_plain_loop(method: str, automatic: bool, tmp_path: Path) -> None:
    net = Net(method, automatic=automatic)
    trainer(tmp_path).fit(net)
    assert_same(net.parts, plain(method))


def test_the_plain_sum_equals_lightning_without_us(tmp_path: Path) -> None:
    class Summed(Net):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return torch.stack(list(self.parts.losses(batch).values())).sum()

    net, summed = Net("sum"), Summed("sum")
    trainer(tmp_path).fit(net)
    trainer(tmp_path).fit(summed)
    for found, wanted in zip(net.parameters(), summed.parameters(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_accumulation_with_batches_left_over_and_clipping(clip: float, tmp_path: Path) -> None:
    net = Net("dwa+pcgrad")
    trainer(tmp_path, gradient_clip_val=clip, accumulate_grad_batches=4).fit(net)
    assert_same(net.parts, plain("dwa+pcgrad", clip=clip, every=4))


@pytest.mark.parametrize("every", [1, 4])
def test_a_batch_without_any_loss(every: int, tmp_path: Path) -> None:
    class Unlabelled(Net):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return self.balance({} if batch_idx == 2 else self.parts.losses(batch))

    net = Unlabelled("uncert+cagrad")
    trainer(tmp_path, accumulate_grad_batches=every).fit(net)
    assert_same(net.parts, plain("uncert+cagrad", every=every, unlabelled=3))


@pytest.mark.parametrize("automatic", [True, False], ids=["automatic", "manual"])
def test_bfloat16(automatic: bool, tmp_path: Path) -> None:
    net = Net("uncert+cagrad", automatic=automatic)
    trainer(tmp_path, precision="bf16-mixed").fit(net)
    assert_same(net.parts, plain("uncert+cagrad", dtype=torch.bfloat16))


@pytest.mark.parametrize(
    ("automatic", "every"), [(True, 1), (True, 4), (False, 1)], ids=["one", "four", "manual"]
)
def test_float16_has_the_scaler_of_the_trainer(automatic: bool, every: int, tmp_path: Path) -> None:
    """A learned weight that stood still would show the scaler to be left out."""
    scalers = [torch.amp.GradScaler("cpu", init_scale=1024.0) for _ in range(2)]
    precision = MixedPrecision("16-mixed", "cpu", scalers[0])
    net = Net("uncert+cagrad", automatic=automatic)
    trainer(tmp_path, plugins=[precision], accumulate_grad_batches=every).fit(net)
    wanted = plain("uncert+cagrad", every=every, dtype=torch.float16, scaler=scalers[1])
    assert_same(net.parts, wanted)
    assert net.balancer.weighting.get_parameter("log_var").abs().max() > 0.01


def test_a_weighting_that_looks_back(tmp_path: Path) -> None:
    class LooksBack(Net):
        def on_train_batch_end(self, outputs: Any, batch: Tensor, batch_idx: int) -> None:
            self.balancer.after_step(lambda: self.parts.losses(batch))

    net = LooksBack("famo+sum")
    trainer(tmp_path).fit(net)
    assert_same(net.parts, plain("famo+sum"))


@pytest.mark.parametrize("automatic", [True, False], ids=["automatic", "manual"])
def test_other_arguments_are_passed_on(automatic: bool, tmp_path: Path) -> None:
    """MoDo refuses to do without further batches."""

    class Further(Net):
        def balance(self, losses: Any, **options: Any) -> Tensor:
            return super().balance(losses, batches=(lambda: self.parts.losses(data()[0]),))

    net = Further("modo", automatic=automatic)
    trainer(tmp_path).fit(net)
    assert net.record is not None
    assert net.record.combination is not None


class LooksAhead(Net):
    """Auto-Lambda, with optimizers that are made when Lightning asks for them."""

    def __init__(self, *, several: bool) -> None:
        super().__init__(automatic=not several)  # as Lightning demands it of several
        self.several = several
        self.parts.balancer = self.balancer = ahead(self.parts, None)

    def balance(self, losses: Any, **options: Any) -> Tensor:
        return super().balance(losses, validation=lambda: self.parts.losses(data()[0]))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        if not self.several:
            return super().training_step(batch, batch_idx)
        optimizers = self.optimizers()
        for each in optimizers:
            each.zero_grad()
        total = self.balance(self.parts.losses(batch))
        for each in optimizers:
            each.step()
        return total

    def configure_optimizers(self) -> Any:
        optimizers = optimizers_of(self.parts, several=self.several)
        self.balancer.weighting.optimizer = optimizers
        return optimizers


def ahead(parts: Parts, optimizer: Any) -> Balancer:
    name, trunk = "autol+cagrad", parts.network.trunk
    return make_balancer(name, tasks=TASKS, shared=trunk, optimizer=optimizer, lr=0.01)


def optimizers_of(parts: Parts, *, several: bool) -> list[torch.optim.Optimizer]:
    if not several:
        return [parts.optimizer()]
    trunk, heads = parts.network.trunk.parameters(), parts.network.heads.parameters()
    return [torch.optim.SGD(trunk, lr=0.02, momentum=0.9), torch.optim.AdamW(heads, lr=0.01)]


def looked_ahead(*, several: bool, epochs: int) -> Parts:
    """Return what the plain loop trains, in which optimizers are there before the Balancer."""
    parts = Parts("sum")
    optimizers = optimizers_of(parts, several=several)
    parts.balancer = ahead(parts, optimizers)
    for _ in range(epochs):
        for x in data():
            for each in optimizers:
                each.zero_grad()
            losses = parts.losses(x)
            parts.balancer.backward(losses, validation=lambda: parts.losses(data()[0]))
            for each in optimizers:
                each.step()
        parts.balancer.end_epoch()
    return parts


@pytest.mark.parametrize("several", [False, True], ids=["one", "several"])
def test_optimizers_that_come_after_the_balancer(several: bool, tmp_path: Path) -> None:
    """Auto-Lambda looks ahead with them, and a second fit goes on from the first one's state."""
    options: dict[str, Any] = {"enable_checkpointing": True}
    trainer(tmp_path, **options).fit(LooksAhead(several=several))
    net = LooksAhead(several=several)
    saved = next(tmp_path.rglob("*.ckpt"))
    trainer(tmp_path, max_epochs=3, **options).fit(net, ckpt_path=saved)
    assert_same(net.parts, looked_ahead(several=several, epochs=3))
    weights = net.balancer.weighting.get_buffer("lambdas")
    assert (weights - 0.1).abs().min() > 0.01


def test_an_optimizer_that_is_not_assigned(tmp_path: Path) -> None:
    class Forgets(LooksAhead):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return self.parts.optimizer()

    with pytest.raises(ValueError, match="in Lightning, in `configure_optimizers`"):
        trainer(tmp_path).fit(Forgets(several=False))


class Kept(Logger):
    """Keeps what is logged."""

    name, version = "kept", 0

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int, dict[str, float]]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.append((step or 0, {k: v for k, v in metrics.items() if k != "epoch"}))

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass


def test_records_are_logged_when_the_trainer_logs(tmp_path: Path) -> None:
    class WithoutB(Net):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            losses = self.parts.losses(batch)
            if batch_idx == 3:
                del losses["b"]
            return self.balance(losses)

    logger = Kept()
    net = WithoutB()
    trainer(tmp_path, logger=logger, log_every_n_steps=2, max_epochs=1).fit(net)
    rows = [row for row in logger.rows if row[1]]
    assert [step for step, _ in rows][:3] == [1, 3, 5]
    assert "balance/weight/b" in rows[0][1]
    assert "balance/weight/b" not in rows[1][1]
    assert rows[1][1]["balance/absent"] == 1
    assert "balance/cosine/a/c" in rows[1][1]


@pytest.mark.parametrize("when", ["after training", "after validation"])
def test_a_fit_goes_on_from_a_checkpoint(when: str, tmp_path: Path) -> None:
    """Whether the epoch's end came before it was saved or after; DWA counts epochs."""

    class Validated(Net):
        def validation_step(self, batch: Tensor, batch_idx: int) -> None:
            pass

        def val_dataloader(self) -> Any:
            return self.train_dataloader()

    kind = Net if when == "after training" else Validated
    options: dict[str, Any] = {"enable_checkpointing": True, "num_sanity_val_steps": 0}

    def fit(net: Net, start: Path | None = None) -> None:
        saves = lightning.pytorch.callbacks.ModelCheckpoint(tmp_path, save_top_k=-1)
        trainer(tmp_path, max_epochs=4, callbacks=[saves], **options).fit(net, ckpt_path=start)

    fit(kind("dwa+graddrop"))
    first = next(tmp_path.glob("epoch=1-*.ckpt"))

    net = kind("dwa+graddrop")
    fit(net, first)
    assert_same(net.parts, plain("dwa+graddrop", epochs=4))
    assert net.balancer.end_epoch().steps == 0


def test_epochs_end_where_a_module_has_a_hook_of_its_own(tmp_path: Path) -> None:
    class Hooked(Net):
        def on_train_epoch_end(self) -> None:
            pass

    net, wanted = Hooked("dwa+sum"), plain("dwa+sum", epochs=4)
    trainer(tmp_path, max_epochs=4).fit(net)
    net.balancer.end_epoch()
    assert_same(net.parts, wanted)


@pytest.mark.parametrize(
    "change",
    [
        lambda net, loss: loss + 1e-3 * net.parts.network.trunk[0].weight.square().sum(),
        lambda net, loss: 0.5 * loss,
        lambda net, loss: loss / 2,
        lambda net, loss: {"loss": loss.exp()},
        lambda net, loss: loss.clone().detach().requires_grad_(),
    ],
)
def test_what_balance_returns_is_returned_as_it_is(change: Any, tmp_path: Path) -> None:
    class Changed(Net):
        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            return change(self, super().training_step(batch, batch_idx))

    with pytest.raises(RuntimeError, match=r"`self.balance\(losses\)` as it is"):
        trainer(tmp_path).fit(Changed())


@pytest.mark.filterwarnings("ignore:.*returned `None`")  # once in the life of a process
def test_what_balance_returns_is_returned(tmp_path: Path) -> None:
    class Forgetful(Net):
        def training_step(self, batch: Tensor, batch_idx: int) -> None:
            super().training_step(batch, batch_idx)

    with pytest.raises(RuntimeError, match="nothing was trained"):
        trainer(tmp_path).fit(Forgetful())


@pytest.mark.parametrize("automatic", [True, False], ids=["automatic", "manual"])
def test_validation_may_share_the_code(automatic: bool, tmp_path: Path) -> None:
    """There, `balance` is the sum of the losses, and leaves everything as it is."""
    seen = []

    class Shared(Net):
        def validation_step(self, batch: Tensor, batch_idx: int) -> None:
            losses = self.parts.losses(batch)
            total = self.balance(losses)
            seen.append((float(total), float(sum(losses.values()))))

        def val_dataloader(self) -> Any:
            return self.train_dataloader()

    net = Shared("dwa+cagrad", automatic=automatic)
    trainer(tmp_path).fit(net)
    assert_same(net.parts, plain("dwa+cagrad"))
    assert len(seen) > 2 * len(data())  # those of the sanity check, too
    assert all(total == pytest.approx(plainly) for total, plainly in seen)


def test_balanced_stands_in_front() -> None:
    with pytest.raises(TypeError, match=r"`class Behind\(Balanced, LightningModule\)`\.$"):

        class Behind(lightning.LightningModule, Balanced):
            pass


def test_a_dictionary_may_be_returned(tmp_path: Path) -> None:
    class Named(Net):
        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            return {"loss": super().training_step(batch, batch_idx), "rows": len(batch)}

    net = Named()
    trainer(tmp_path).fit(net)
    assert_same(net.parts, plain())


def test_a_step_without_balance_is_lightnings(tmp_path: Path) -> None:
    class Now(Net):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return self.parts.losses(batch)["a"]

    net = Now()
    trainer(tmp_path, max_epochs=1).fit(net)
    assert net.record is None
    assert net.parts.network.trunk[0].weight.grad is not None


class PartOfRank(Net):
    """Its part of each batch, as a distributed sampler would give."""

    here: Here

    def train_dataloader(self) -> Any:
        parts = [self.here.part(x) for x in data()]
        return torch.utils.data.DataLoader(torch.stack(parts), batch_size=None)


def fit_in_rank(
    here: Here, folder: str, method: str, strategy: str, options: dict[str, Any]
) -> dict[str, Tensor]:
    tell_as_torchrun(here)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net = PartOfRank(method, given=options.pop("given"))
        net.here = here
        automatic = options.pop("automatic", True)
        net.automatic_optimization = automatic
        run = trainer(
            Path(folder), strategy=strategy, devices=2, use_distributed_sampler=False, **options
        )
        run.fit(net)
    assert run.world_size == here.size
    return dict(net.parts.named_parameters())


@pytest.mark.parametrize(
    ("strategy", "options"),
    [
        ("ddp", {"given": True, "accumulate_grad_batches": 4}),
        ("ddp", {"given": True, "automatic": False}),
        ("ddp_find_unused_parameters_true", {"given": False, "gradient_clip_val": 0.5}),
    ],
    ids=["accumulation", "manual", "unused"],
)
def test_two_processes_equal_one(
    strategy: str, options: dict[str, Any], two: Pool, tmp_path: Path
) -> None:
    wanted = plain(
        "dwa+cagrad",
        clip=options.get("gradient_clip_val", 0.0),
        every=options.get("accumulate_grad_batches", 1),
    )
    for found in two.run(fit_in_rank, str(tmp_path), "dwa+cagrad", strategy, options):
        for name, value in wanted.named_parameters():
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6, msg=name)
