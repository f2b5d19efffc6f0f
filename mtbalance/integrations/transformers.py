"""A Trainer of Hugging Face Transformers that balances tasks.

Needs Transformers (``pip install "mtbalance[transformers]"``). ``BalancedTrainer`` stands where
``Trainer`` was, and the model returns its ``losses`` by task. "Training loops of others" in the
documentation has a script.
"""

import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mtbalance._balancer import Balancer
from mtbalance._record import Record

try:
    from transformers import Trainer, TrainerCallback
except ImportError as error:
    raise ImportError(
        "mtbalance.integrations.transformers needs Transformers. Run "
        '`pip install "mtbalance[transformers]"`.'
    ) from error

from mtbalance.integrations._total import sum_of
from mtbalance.integrations.accelerate import backward

__all__ = ["BalancedTrainer"]

STATE = "balancer.pt"


class BalancedTrainer(Trainer):
    """A ``Trainer`` that balances the losses of several tasks.

    The model returns a dictionary whose ``"losses"`` are scalar means over the batch, by task; or
    override :meth:`compute_losses`. Accumulation, clipping, precision, schedulers and processes are
    the Trainer's, as ever.

    It also closes epochs (``balancer.end_epoch()``), adds ``record.as_dict()`` under ``balance/``,
    without what is NaN, to what is logged, saves the Balancer's state in each checkpoint and loads
    it with ``resume_from_checkpoint``, and gives what a weighting learns to the optimizer, without
    weight decay.

    Args:
        *args: As for ``Trainer``.
        balancer: The Balancer.
        **kwargs: As for ``Trainer``.

    Attributes:
        balancer: The Balancer.
        record: What the last balanced step did.

    Raises:
        ValueError: If an option would have no effect (``compute_loss_func``, label smoothing), if
            one process holds several GPUs, or if the optimizer given lacks what a weighting learns.

    Example:
        >>> import torch
        >>> from mtbalance import make_balancer
        >>> class Model(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.trunk = torch.nn.Linear(4, 8)
        ...         self.heads = torch.nn.ModuleDict({t: torch.nn.Linear(8, 1) for t in "ab"})
        ...
        ...     def forward(self, x):
        ...         h = self.trunk(x).relu()
        ...         return {"losses": {t: f(h).square().mean() for t, f in self.heads.items()}}
        >>> model = Model()
        >>> balancer = make_balancer("uncert+pcgrad", tasks=("a", "b"), shared=model.trunk)
        >>> trainer = BalancedTrainer(model=model, balancer=balancer)  # doctest: +SKIP
    """

    def __init__(self, *args: Any, balancer: Balancer, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.compute_loss_func is not None:
            raise ValueError("`compute_loss_func` has no effect; override `compute_losses`.")
        if self.label_smoother is not None:
            raise ValueError("`label_smoothing_factor` has no effect; smooth in the model.")
        if self.args.n_gpu > 1:
            raise ValueError(
                f"one process must hold one GPU, but holds {self.args.n_gpu}. Start one for each "
                "(`torchrun --nproc-per-node`), or hide the others (`CUDA_VISIBLE_DEVICES=0`)."
            )
        self.balancer: Balancer = balancer.to(self.args.device)
        self.record: Record | None = None
        self.model_accepts_loss_kwargs = False  # losses are means over each batch
        self.add_callback(_Epochs(balancer))

    def compute_losses(
        self, model: nn.Module, inputs: dict[str, Any]
    ) -> tuple[Mapping[str, Tensor], Any]:
        """Return the losses of a batch by task, and the outputs of the model; for overriding.

        Args:
            model: The model, as the Trainer has wrapped it.
            inputs: The batch.
        """
        outputs = model(**inputs)
        if not (isinstance(outputs, Mapping) and "losses" in outputs):
            raise ValueError(
                'the model must return a dictionary that holds "losses" by task, or '
                "`compute_losses` must be overridden."
            )
        others = {name: value for name, value in outputs.items() if name not in ("losses", "loss")}
        return outputs["losses"], others

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,  # noqa: FBT001, FBT002
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the sum of the losses; when training, balance them first.

        The sum has no graph to the parameters: the Trainer's own backward pass adds nothing.
        """
        del num_items_in_batch
        losses, outputs = self.compute_losses(model, inputs)
        total = sum_of(losses, self.args.device)
        if model.training and torch.is_grad_enabled():
            batches = self.current_gradient_accumulation_steps
            if batches > 1:
                losses = {task: loss / batches for task, loss in losses.items()}
            self.record = backward(self.accelerator, self.balancer, losses) or self.record
            total.requires_grad_()
        return (total, {"loss": total, **outputs}) if return_outputs else total

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Make the optimizer, and give it what a weighting learns."""
        given = self.optimizer is not None
        optimizer: torch.optim.Optimizer = super().create_optimizer(*args, **kwargs)
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        learned = [p for p in self.balancer.parameters() if p.requires_grad and id(p) not in held]
        if learned and given:
            raise ValueError(
                "the optimizer given in `optimizers` must hold what the weighting learns. Add "
                '`{"params": balancer.parameters(), "weight_decay": 0.0}` to its groups.'
            )
        if learned:
            optimizer.add_param_group({"params": learned, "weight_decay": 0.0})
        return optimizer

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log, with the record where the training loss is logged."""
        if "loss" in logs and self.record is not None:
            figures = self.record.as_dict().items()
            logs.update({f"balance/{k}": value for k, value in figures if not math.isnan(value)})
        super().log(logs, *args, **kwargs)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            torch.save(self.balancer.state_dict(), Path(output_dir, STATE))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        if not Path(checkpoint, STATE).exists():
            warnings.warn(
                f"{checkpoint} holds no state of a Balancer ({STATE}), which starts anew.",
                stacklevel=2,
            )
            return
        state = torch.load(Path(checkpoint, STATE), map_location="cpu", weights_only=True)
        self.balancer.load_state_dict(state)


class _Epochs(TrainerCallback):
    """Closes epochs, and clears gradients of what a weighting learns."""

    def __init__(self, balancer: Balancer) -> None:
        self._balancer = balancer

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        del args, control, kwargs
        if float(state.epoch or 0).is_integer():  # not in the middle of one that is resumed
            self._close()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        del args, state, control, kwargs
        self._close()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        del args, state, control, kwargs
        self._balancer.zero_grad()  # the Trainer does so to the model's alone

    def _close(self) -> None:
        if self._balancer._epoch.steps:  # else closed already, before a checkpoint was saved
            self._balancer.end_epoch()
