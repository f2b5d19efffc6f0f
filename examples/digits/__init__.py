"""Two overlaid handwritten digits and their ink: every strategy, side by side.

``data`` draws the pictures, ``methods`` names what is compared, ``training`` is the loop, ``study``
trains everything in several processes and remembers what is done, ``costs`` measures steps,
``results`` chooses, ranks and compares, ``figure`` draws, ``page`` writes, and ``cli`` alone sees
the command line.

Run it with ``python -m examples.digits --help``.
"""
