"""The demo behind ``torch-mux demo``: really trained models served together."""
