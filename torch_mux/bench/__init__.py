"""Benchmarks against the peers, as a library behind ``torch-mux bench``."""
