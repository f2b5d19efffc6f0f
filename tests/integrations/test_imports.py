"""Integrations are read when asked for, say what they need, and their examples run."""

import doctest
import importlib
import subprocess
import sys

import pytest

NEEDS = {
    "accelerate": ("accelerate",),
    "lightning": ("lightning", "pytorch_lightning"),
    "transformers": ("transformers",),
}


@pytest.mark.parametrize("name", NEEDS)
def test_what_is_missing_is_named_with_its_pip_line(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in NEEDS[name]:
        monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, f"mtbalance.integrations.{name}", raising=False)
    with pytest.raises(ImportError, match=rf'`pip install "mtbalance\[{name}\]"`'):
        importlib.import_module(f"mtbalance.integrations.{name}")


@pytest.mark.parametrize("name", NEEDS)
def test_examples_run(name: str) -> None:
    pytest.importorskip(NEEDS[name][0], reason=f'needs `pip install "mtbalance[{name}]"`')
    failed, tried = doctest.testmod(importlib.import_module(f"mtbalance.integrations.{name}"))
    assert failed == 0
    assert tried > 0


def test_the_library_reads_none_of_them() -> None:
    code = "import sys, mtbalance; print([m for m in sys.modules if 'integrations' in m])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
