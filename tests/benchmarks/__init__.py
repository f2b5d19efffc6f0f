"""Speed and memory, measured in one run each: ``python -m tests.benchmarks.step_cost``."""

import os

# Before torch, which reads it once. By default its threads spin between two parallel parts. Then
# whatever else runs on the same cores stretches single steps many times over: luck is compared.
# Threads that sleep instead cost every parallel part some microseconds, in all variants alike.
# With OMP_WAIT_POLICY=ACTIVE GOMP_SPINCOUNT=300000 in the environment it is as by default.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
