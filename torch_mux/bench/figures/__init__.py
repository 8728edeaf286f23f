"""The figures of ``torch-mux bench serve``, one a file: ``measure(stage)`` fills rows of the table."""
