"""Whole runs: cross-validation, deployment on another cohort, heat maps."""
