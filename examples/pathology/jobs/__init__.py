"""Work shared out among processes and machines, on Dask."""
