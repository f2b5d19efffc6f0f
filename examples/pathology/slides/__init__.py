"""Slides: finding and opening them, the size of their pixels, tiles of tissue."""
