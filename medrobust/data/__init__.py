"""Data sets: where the real scans come from, and the lists that bundles read."""
