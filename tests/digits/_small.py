"""A study that takes no time, and trainings that nobody has made."""

import math

from examples.digits.methods import SINGLE
from examples.digits.setting import TASKS, Setting
from examples.digits.study import Done, Job, Plan
from examples.digits.training import Measured

TINY = Setting(pictures=120, held_out=100, batch=40, epochs=2, width=8, rates=(0.01, 0.03))


def plan_of(*methods, seeds=2, setting=TINY):
    return Plan(("sum", *methods), seeds, setting)


def done(method, seed, rate, values, test=None, error=""):
    """A training with accuracies, error and R²; in the test, ``test`` if it differs."""
    job = Job(method, seed, rate)
    if error:
        return Done(job, None, None, error)
    if method.startswith(SINGLE):
        task = TASKS.index(method.partition(":")[2])
        keep = {0: (0,), 1: (1,), 2: (2, 3)}[task]
        values, test = (
            [value if i in keep else math.nan for i, value in enumerate(each)]
            for each in (values, test or values)
        )
    return Done(job, Measured(*values), Measured(*(test or values)))
