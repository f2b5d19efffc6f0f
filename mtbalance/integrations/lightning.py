"""Lightning modules that balance their tasks.

Needs Lightning (``pip install "mtbalance[lightning]"``). Three lines change: the base class, a
``self.balancer``, and ``return self.balance(losses)`` where the sum of the losses was returned.
"Training loops of others" in the documentation has a script.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler

from mtbalance._balancer import Balancer
from mtbalance._record import Record
from mtbalance.integrations._total import sum_of

try:
    import lightning.pytorch  # noqa: F401
except ImportError as error:
    try:
        import pytorch_lightning  # noqa: F401
    except ImportError:
        raise ImportError(
            'mtbalance.integrations.lightning needs Lightning. Run `pip install "mtbalance'
            '[lightning]"`.'
        ) from error

__all__ = ["Balanced"]


class Balanced:
    """Base class in front of ``LightningModule``, for a module that has a ``balancer``.

    With automatic optimization, gradients are written in the hook ``backward``, so that clipping,
    accumulation, precision, schedulers and strategies are Lightning's, as ever. Works with
    ``lightning`` and ``pytorch_lightning``.

    It also closes epochs (``end_epoch()`` of every Balancer in the module), and logs
    ``record.as_dict()`` under ``balance/``, without what is NaN, in the steps in which the Trainer
    logs. As ``self.balancer`` is a submodule, checkpoints hold its state, and
    ``self.parameters()`` what it learns.

    Attributes:
        balancer: The Balancer; assign it in ``__init__``.
        record: What the last balanced step did.

    Example:
        >>> import lightning, torch
        >>> from mtbalance import make_balancer
        >>> class Net(Balanced, lightning.LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.trunk = torch.nn.Linear(4, 8)
        ...         self.heads = torch.nn.ModuleDict({t: torch.nn.Linear(8, 1) for t in "ab"})
        ...         self.balancer = make_balancer("pcgrad", tasks=("a", "b"), shared=self.trunk)
        ...
        ...     def training_step(self, batch, batch_idx):
        ...         h = self.trunk(batch).relu()
        ...         return self.balance({t: f(h).square().mean() for t, f in self.heads.items()})
    """

    balancer: Balancer
    record: Record | None = None
    _waiting: "Mapping[str, Any] | None" = None
    """Options of the step of which batches have been accumulated."""
    _given: "tuple[Tensor, dict[str, Tensor], dict[str, Any]] | None" = None
    _epoch_of_last_step: int | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        order = [base.__name__ for base in cls.__mro__]
        if "LightningModule" in order[: order.index("Balanced")]:
            raise TypeError(
                f"`Balanced` must stand in front of LightningModule among the bases of "
                f"{cls.__name__}, whose backward pass it makes: "
                f"`class {cls.__name__}(Balanced, LightningModule)`."
            )

    # Of a compiled module, the forward pass alone is traced.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def balance(
        self, losses: Mapping[str, Tensor], *, balancer: Balancer | None = None, **options: Any
    ) -> Tensor:
        """Balance the losses of a batch, when training; call it once in ``training_step``.

        Args:
            losses: As in :meth:`mtbalance.Balancer.backward`: raw, neither scaled nor divided.
            balancer: With manual optimization, another Balancer of this module than
                ``self.balancer``; its record is logged under the name of its attribute.
            options: Other arguments of that method but for ``scaler``, which is the Trainer's.

        Returns:
            The sum of the losses, to return from ``training_step``. With automatic optimization
            Lightning then calls back, and gradients are written. With manual optimization they have
            been written already, where ``self.manual_backward(loss)`` would; batches given to
            ``self.balancer.accumulate`` before are part of the step.

        Raises:
            ValueError: If ``balancer`` is no submodule.
            RuntimeError: If ``balancer`` is given with automatic optimization, or if what this
                returned for the last batch was not returned to Lightning.
        """
        module: Any = self
        total = sum_of(losses, module.device)
        if not getattr(module._trainer, "training", True):  # steps may share their code
            return total
        if not module.automatic_optimization:
            chosen = self.balancer if balancer is None else balancer
            name = self._name_of(chosen)
            self._begin_batch()
            self._note(name, chosen.backward(losses, scaler=self._scaler, **options))
            return total
        if balancer is not None:
            raise RuntimeError(
                "`balancer` is for manual optimization: with automatic optimization, a step is "
                "that of `self.balancer`. Say `self.automatic_optimization = False` in `__init__`."
            )
        if self._given is not None:
            self._given = None
            raise RuntimeError(
                "`training_step` must return what `self.balance(losses)` returns, but the last "
                "time it returned something else, and nothing was trained."
            )
        self._given = total.requires_grad_(), dict(losses), options
        return total

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Write balanced gradients; Lightning calls it."""
        if self._given is None:
            super().backward(loss, *args, **kwargs)  # type: ignore[misc]
            return
        (total, losses, options), self._given = self._given, None
        trainer: Any = self.trainer  # type: ignore[attr-defined]
        if not _is_untouched(total, loss, scaled=self._scaler is not None):
            raise RuntimeError(
                "`training_step` must return `self.balance(losses)` as it is, but something was "
                "added to it, or it was multiplied. Do that to `losses`, or give a task more."
            )
        batches = trainer.accumulate_grad_batches
        done = trainer.fit_loop.epoch_loop.batch_progress
        self._begin_batch()
        if batches > 1:
            losses = {task: loss / batches for task, loss in losses.items()}
        if done.current.ready % batches == 0 or trainer.is_last_batch:
            self._note("balance", self.balancer.backward(losses, scaler=self._scaler, **options))
        else:
            self.balancer.accumulate(losses, scaler=self._scaler)
            self._waiting = options

    def on_train_epoch_end(self) -> None:
        """Close the epoch of the Balancer; Lightning calls it."""
        super().on_train_epoch_end()  # type: ignore[misc]
        self._close_epoch()

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Balance what waits if the last batch of several gave no losses; Lightning calls it."""
        if self.automatic_optimization and self.balancer._pending:  # type: ignore[attr-defined]
            self._note("balance", self.balancer.apply(scaler=self._scaler, **(self._waiting or {})))
        super().on_before_optimizer_step(optimizer)  # type: ignore[misc]

    def _begin_batch(self) -> None:
        """Close an epoch that was left open: by a hook of the module's own, or in a checkpoint."""
        trainer: Any = self.trainer  # type: ignore[attr-defined]
        epoch, known = trainer.current_epoch, self._epoch_of_last_step
        if known is None:  # a checkpoint of an epoch's last step was saved before it was closed
            left_open = trainer.fit_loop.epoch_loop.batch_progress.current.ready == 1
        else:
            left_open = epoch != known
        if left_open:
            self._close_epoch()
        self._epoch_of_last_step = epoch

    def _note(self, name: str, record: Record) -> None:
        """Keep a record, and log it."""
        self.record = record
        trainer: Any = self.trainer  # type: ignore[attr-defined]
        if trainer.loggers and trainer._logger_connector.should_update_logs:
            # Not `log_dict`: a task that is absent would keep its last value to the epoch's end.
            figures = record.as_dict().items()
            trainer._logger_connector.log_metrics(
                {f"{name}/{key}": value for key, value in figures if not math.isnan(value)}
            )

    @property
    def _scaler(self) -> GradScaler | None:
        trainer: Any = self.trainer  # type: ignore[attr-defined]
        return getattr(trainer.precision_plugin, "scaler", None)

    def _close_epoch(self) -> None:
        for balancer in self._balancers().values():
            if balancer._epoch.steps:  # else it has been closed, before a checkpoint was saved
                balancer.end_epoch()

    def _name_of(self, balancer: Balancer) -> str:
        """Return under which name the records of a Balancer are logged."""
        if balancer is getattr(self, "balancer", None):
            return "balance"
        for name, each in self._balancers().items():
            if each is balancer:
                return name
        raise ValueError(
            "`balancer` must be a submodule, but is not: no checkpoint would hold its state. "
            "Assign it in `__init__`, as `self.critic = balancer`."
        )

    def _balancers(self) -> dict[str, Balancer]:
        module: Any = self
        return {name: each for name, each in module.named_modules() if isinstance(each, Balancer)}


def _is_untouched(total: Tensor, loss: Tensor, *, scaled: bool) -> bool:
    """Return whether a loss is ``total`` as Lightning hands it on: divided and perhaps scaled."""
    left = ["DivBackward0"] + ["MulBackward0"] * scaled
    node = loss.grad_fn
    while node is not None and not hasattr(node, "variable"):
        if node.name() not in left:
            return False
        left.remove(node.name())
        node = next((each for each, _ in node.next_functions if each is not None), None)
    return (loss if node is None else node.variable) is total
