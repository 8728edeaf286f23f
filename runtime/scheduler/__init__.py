"""Scheduling policies: which pending requests go out together."""
