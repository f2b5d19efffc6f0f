"""What all trainings have in common; imports nothing that is slow."""

from dataclasses import dataclass

TASKS = ("upper-left", "lower-right", "ink")
"""Two classifications of ten digits each, and a regression."""


@dataclass(frozen=True)
class Setting:
    """Data, network and training.

    Args:
        shift: Pixels by which the lower-right digit lies right of and below the other.
        width: Of both hidden layers of the trunk.
        pictures: That are trained on.
        held_out: Pictures for validation, and as many for the test.
        batch: Pictures in a step.
        epochs: How often each picture is trained on.
        rates: Learning rates that are tried for every method.
    """

    shift: int = 2
    width: int = 64
    pictures: int = 10_000
    held_out: int = 4_000
    batch: int = 200
    epochs: int = 10
    rates: tuple[float, ...] = (0.02, 0.04, 0.08)

    @property
    def steps_of_epoch(self) -> int:
        """In one epoch; what does not fill a batch is left out of it."""
        return self.pictures // self.batch

    @property
    def steps(self) -> int:
        """Of one training."""
        return self.epochs * self.steps_of_epoch

    def share_of_rate(self, step: int) -> float:
        """Return how much of the learning rate a step has.

        It rises in the first epoch, without which large rates fail, and falls linearly to zero.

        Args:
            step: Counted from 0.
        """
        return min(1, (step + 1) / self.steps_of_epoch) * max(0.0, 1 - step / self.steps)


QUICK = Setting(pictures=2_000, held_out=1_000, batch=100, epochs=6, rates=(0.02, 0.04))
"""To see that all works; its numbers say little."""
