"""Programs built on mtbalance; not part of the package."""
