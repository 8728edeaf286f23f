"""Several programs in one schedule: which launches of theirs are one, and which run beside each other."""
