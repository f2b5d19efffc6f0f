"""Settings of the documentation site: ``python -m sphinx -W docs site``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import mtbalance

project = "mtbalance"
author = copyright = "the mtbalance developers"  # noqa: A001
version = release = mtbalance.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "docs.make.sphinx",
]
exclude_patterns = [
    "make",
    "**/__pycache__",
    "digits/table.md",  # shown on the page of the digits
]
nitpicky = False  # the signatures name types of torch, whose pages are elsewhere

myst_enable_extensions = ["alert", "dollarmath"]
myst_heading_anchors = 4

autodoc_mock_imports = ["accelerate", "lightning", "pytorch_lightning", "transformers"]
autodoc_inherit_docstrings = False  # what a base class says stands there
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 48  # the width of a phone
napoleon_numpy_docstring = False

html_title = f"mtbalance {version}"
pygments_dark_style = "github-dark"
html_theme = "furo"
html_static_path = ["_static"]
templates_path = ["_templates"]
html_css_files = ["site.css"]
html_math_renderer = "mathml"
html_show_sphinx = False
html_copy_source = False
html_domain_indices = False  # of few modules: the index has all names
html_theme_options = {
    "source_repository": "https://github.com/mtbalance/mtbalance/",
    "source_branch": "main",
    "source_directory": "docs/",
}
copybutton_prompt_text = r">>> |\.\.\. "
copybutton_prompt_is_regexp = True
