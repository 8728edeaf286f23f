"""Super-kernels: one Triton launch does one operation for every slot of a bundle, one family a file."""
