"""Imported last by the server of ``tests._forks``: forks do not look through what it has made."""

import gc

gc.collect()
gc.freeze()
