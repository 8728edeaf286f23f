"""Executors: how a bundle runs on a device."""
