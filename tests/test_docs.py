"""Every example runs as it is written: in docstrings, the README, CONTRIBUTING and docs/."""

import doctest
import importlib
import pkgutil
import re
import warnings
from pathlib import Path

import pytest
import torch

import mtbalance
from docs.make.stamps import blocks_of

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
MODULES = [
    module.name
    for module in pkgutil.walk_packages(mtbalance.__path__, prefix="mtbalance.")
    if ".integrations" not in module.name
]
FRAMEWORKS = {"integrations.md": ("lightning", "accelerate", "transformers", "peft")}
"""Packages without which a page cannot run."""


@pytest.mark.parametrize("name", ["mtbalance", *MODULES])
def test_docstrings(name: str) -> None:
    with torch.device("cpu"):  # where what they print comes from
        failed, _ = doctest.testmod(importlib.import_module(name), verbose=False)
    assert failed == 0


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Python blocks of a page run one after the other, in one namespace and an empty folder."""
    for package in FRAMEWORKS.get(page.name, ()):
        pytest.importorskip(package, reason='needs `pip install "mtbalance[integrations]"`')
        warnings.simplefilter("ignore")  # theirs; pytest puts back what was
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    for block in blocks_of(page):
        exec(compile(block, str(page), "exec"), namespace)  # noqa: S102
    assert not decayed(namespace)


def test_the_loop_of_the_readme_decays_nothing_that_is_learned() -> None:
    """AdamW's default of 0.01 would pull learned weights to where they start."""
    block = blocks_of(ROOT / "README.md")[0]
    assert "import DWA" in block
    namespace: dict[str, object] = {}
    block = block.replace("import DWA", "import Uncertainty").replace(
        "DWA(temperature=2.0)", "Uncertainty()"
    )
    exec(block, namespace)  # noqa: S102
    assert namespace["record"].weights["price"] != 0.5  # as at the start: it has learned
    assert not decayed(namespace)


def decayed(namespace: dict[str, object]) -> list[torch.Tensor]:
    """Return what Balancers learn and optimizers decay."""
    balancers = [value for value in namespace.values() if isinstance(value, mtbalance.Balancer)]
    learned = {id(parameter) for balancer in balancers for parameter in balancer.parameters()}
    optimizers = [v for v in namespace.values() if isinstance(v, torch.optim.Optimizer)]
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    return [p for g in groups if g.get("weight_decay") for p in g["params"] if id(p) in learned]


def test_links_between_pages() -> None:
    for page in [*PAGES, ROOT / "CHANGELOG.md", ROOT / "examples" / "pathology" / "README.md"]:
        prose = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
        for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", prose):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_readme_lists_every_strategy() -> None:
    readme = (ROOT / "README.md").read_text()
    for module in (mtbalance.weighting, mtbalance.gradient):
        for name in module.__all__:
            if not name.endswith(("Strategy", "Weighting", "Step")):
                assert f"`{name}`" in readme, name
