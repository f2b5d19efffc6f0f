"""Names that a package does not have: where they are, or the nearest."""

import copy
import pickle
import subprocess
import sys
from types import ModuleType

import pytest

import mtbalance


@pytest.mark.parametrize(
    ("statement", "words"),
    [
        ("from mtbalance import CAGrad", "Write `from mtbalance.gradient import CAGrad`."),
        ("from mtbalance import AutoLambda", "Write `from mtbalance.weighting import AutoLambda`."),
        (
            "from mtbalance import auto_lambda",
            "Did you mean 'AutoLambda'? Write `from mtbalance.weighting import AutoLambda`.",
        ),
        ("from mtbalance import Balanser", "from 'mtbalance'. Did you mean 'Balancer'?"),
        ("from mtbalance.gradient import CAgrad", "'mtbalance.gradient'. Did you mean 'CAGrad'?"),
        ("from mtbalance.gradient import Balancer", "Write `from mtbalance import Balancer`."),
        ("from mtbalance.gradient import DWA", "Write `from mtbalance.weighting import DWA`."),
        ("from mtbalance.weighting import dwa", "Did you mean 'DWA'?"),
        ("from mtbalance.weighting import Uncertanty", "Did you mean 'Uncertainty'?"),
    ],
)
def test_import_errors_say_where_names_are(statement: str, words: str) -> None:
    name = statement.split()[-1]
    with pytest.raises(ImportError) as caught:
        exec(statement)  # noqa: S102
    assert str(caught.value).endswith(words)
    assert str(caught.value).startswith(f"cannot import name '{name}' from 'mtbalance")
    assert caught.value.name == name


def test_attributes_have_the_same_hints() -> None:
    with pytest.raises(AttributeError, match=r"no attribute 'CAgrad'. Did you mean 'CAGrad'"):
        mtbalance.gradient.CAgrad  # noqa: B018
    with pytest.raises(AttributeError, match=r"Write `from mtbalance.gradient import UPGrad`"):
        mtbalance.UPGrad  # noqa: B018
    assert not hasattr(mtbalance, "CAGrad")
    assert getattr(mtbalance.weighting, "Dwa", None) is None


def test_other_names_are_errors_as_ever() -> None:
    with pytest.raises(ImportError, match=r"^cannot import name 'Quxxly' from 'mtbalance' \("):
        from mtbalance import Quxxly  # noqa: F401
    with pytest.raises(AttributeError, match=r"no attribute 'Quxxly'$"):
        mtbalance.Quxxly  # noqa: B018
    assert not hasattr(mtbalance, "__wrapped__")


def test_modules_are_imported_as_ever() -> None:
    """One whose name is near to a public name, too, and where nothing was imported before."""
    code = "from mtbalance import testing, integrations; from mtbalance.weighting import _dwa"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert isinstance(mtbalance.gradient, ModuleType)
    strategy = mtbalance.gradient.CAGrad()
    assert repr(pickle.loads(pickle.dumps(copy.deepcopy(strategy)))) == repr(strategy)


def test_help_names_every_strategy() -> None:
    for package in (mtbalance.weighting, mtbalance.gradient):
        for name in package.__all__:
            if name == "RandomWeighting" or not name.endswith(("Strategy", "Weighting", "Step")):
                assert f"``{name}``" in mtbalance.__doc__
