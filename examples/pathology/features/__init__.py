"""Tiles to feature files: the network over one slide, and over many."""
