"""The faces of graphwright: `optimize`, the command line, reports, benchmarks and reference models."""
