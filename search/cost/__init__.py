"""What a choice costs: bytes, bit operations, memory at the peak, and microseconds measured on the kernels that ship."""
