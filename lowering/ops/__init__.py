"""The operations that lowering adds to ATen: one slot (``semantic``) and a bundle of slots (``slots``)."""
