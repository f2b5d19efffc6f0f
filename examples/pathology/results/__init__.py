"""Predictions to numbers: folds on disk, metrics, resampling, comparisons."""
