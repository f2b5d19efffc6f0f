"""Run more cases than the tests do, or one of them again."""

import argparse
import gc
import sys

import torch

from tests.fuzz._cases import case_of
from tests.fuzz._runner import MismatchError, run


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="seed of the first case")
    parser.add_argument("--cases", type=int, default=1, help="how many, one seed after the other")
    parser.add_argument("--show", action="store_true", help="print each case")
    given = parser.parse_args()
    torch.set_num_threads(1)
    gc.freeze()  # as in tests/conftest.py
    failed = 0
    for seed in range(given.seed, given.seed + given.cases):
        case = case_of(seed)
        if given.show or given.cases == 1:
            print(case)  # noqa: T201
        try:
            run(case)
        except MismatchError as error:
            failed += 1
            print(f"--- seed {seed} ---\n{error}\n", flush=True)  # noqa: T201
    print(f"{given.cases} cases, {failed} failed")  # noqa: T201
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
