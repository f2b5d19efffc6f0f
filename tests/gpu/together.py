"""Two processes that share one GPU do what one process does with the whole batch.

They talk by gloo: NCCL refuses two ranks on one device.
"""

import os
import time
from collections.abc import Iterator

import torch

from tests.gpu.rows import Row, Setting, attempted

WRAPPERS = ("no wrapper", "DDP")
QUICK = ("equal+cagrad",)


def measure(setting: Setting) -> Iterator[Row]:
    """Yield a row for each wrapper and dtype."""
    os.environ["MTBALANCE_TEST_DEVICE"] = setting.device.type  # read by the ranks, too
    from tests._device import compute_there
    from tests.distributed.harness import Pool

    compute_there()
    pool = Pool(2)
    try:
        for wrapper in WRAPPERS:
            for dtype in (torch.float64, torch.float32):
                what = f"{wrapper}, {str(dtype).removeprefix('torch.')}"
                yield from attempted(what, _rows, what, pool, wrapper, dtype, setting)
    finally:
        pool.stop()


def _rows(what: str, pool, wrapper: str, dtype: torch.dtype, setting: Setting) -> Iterator[Row]:
    from mtbalance import PAPER_COMBINATIONS
    from tests.distributed.harness import ALONE
    from tests.distributed.runs import assert_equal, same_everywhere
    from tests.distributed.test_whole_batch import TOLERANCES, train_all

    names = QUICK if setting.quick else PAPER_COMBINATIONS
    # In float32, further steps would measure how training magnifies rounding.
    options = {"precision": dtype, "steps": 1 if dtype == torch.float32 else 3}
    start = time.monotonic()
    ranks = pool.run(train_all, wrapper, names, options)
    took = time.monotonic() - start
    alone = train_all(ALONE, wrapper, names, options)
    for name in names:
        outcomes = [outcomes[name] for outcomes in ranks]
        places = {value.device.type for each in outcomes for value in each.values.values()}
        if places != {setting.device.type}:
            raise AssertionError(f"the ranks must compute on {setting.device}, but do on {places}")
        assert_equal(outcomes, alone[name], TOLERANCES[dtype], name)
        same_everywhere(outcomes)
    found = f"{len(names)} combinations as one process within {TOLERANCES[dtype]:.0e}, {took:.1f} s"
    yield Row(what, found, {"names": list(names), "seconds": took}, good=True)
