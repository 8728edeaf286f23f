"""From requests to bundles to results: the serving side of torch-mux."""
