"""Numbers and figures to pages."""
