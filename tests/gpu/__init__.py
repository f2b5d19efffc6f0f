"""What the project does on a GPU, in at most eight minutes: ``tests/gpu/run``.

Nine parts, the most worth knowing first, each in a process of its own with a time limit of its own:
one that fails or takes too long is a line of the table, and the others go on. At the end there is
one table, and everything as JSON in ``gpu.json``. Without a GPU it says what it would do.

    tests/gpu/run                                  # or: python -m tests.gpu
    tests/gpu/run --parts waits agreement --to today.json
    tests/gpu/run --device cpu --quick             # every part, tiny: does the script work?
"""
