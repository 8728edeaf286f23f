"""From a captured graph to a plan: programs, passes, the slot axis and super-kernels."""
