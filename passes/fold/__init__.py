"""Exact rewrites that make a captured program smaller and bring PyTorch and ONNX models to one canonical form."""
