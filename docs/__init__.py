"""The documentation site: pages, and the package that makes what is computed of them."""
