"""mtbalance in other packages' training loops: a module per package, read when it is imported.

- :mod:`mtbalance.integrations.lightning`: Lightning modules.
- :mod:`mtbalance.integrations.accelerate`: loops with Hugging Face Accelerate.
- :mod:`mtbalance.integrations.transformers`: the Trainer of Hugging Face Transformers.
- :mod:`mtbalance.integrations.torchjd`: aggregators of TorchJD as strategies, and the other way.

A module whose package is not installed says which to install.
"""
