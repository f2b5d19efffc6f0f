"""Speed and memory, measured in one run each: ``python -m tests.benchmarks.step_cost``.

Measure on an idle machine. On a busy one, threads that spin between two parallel parts, as they do
by default, stretch single steps many times over. With ``OMP_WAIT_POLICY=PASSIVE`` in the
environment they sleep, which costs every parallel part some microseconds, in all variants alike.
"""
