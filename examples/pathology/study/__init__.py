"""All methods side by side: the benchmark's folder, tables, tests and report."""
