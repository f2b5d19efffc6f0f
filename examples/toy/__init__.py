"""The two-task toy of the CAGrad paper: where each strategy ends, drawn.

``problem`` holds the two losses and their Pareto set, ``paths`` trains a model of two parameters
with a `Balancer`, ``figure`` draws, and ``cli`` alone sees the command line.

Run it with ``python -m examples.toy --help``.
"""
