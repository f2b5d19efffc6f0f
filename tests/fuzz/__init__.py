"""Random cases for the Balancer, held to a slow, dense re-statement of what its documents promise.

``_network`` builds a random network, ``_cases`` draws what is done with it from a seed, ``_oracle``
predicts every call in float64 without the library's own functions, and ``_runner`` compares after
each. ``python -m tests.fuzz --cases 20000 --seed 0`` runs more of them than the tests do, and
``python -m tests.fuzz --seed N`` one again.
"""
