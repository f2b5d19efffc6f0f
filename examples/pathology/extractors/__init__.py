"""Networks that turn tiles into features, behind one contract."""
