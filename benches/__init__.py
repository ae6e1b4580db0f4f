"""Measurements against floors and rivals in the same run. `make bench` runs them all."""
