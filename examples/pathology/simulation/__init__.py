"""Cohorts and slides whose truth is known."""
