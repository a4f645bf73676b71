"""Low rank: one layer becomes two or three thin ones, plain ATen layers that quantize and compile like any other.

`base` has the rank rules and the rewriting, `decomposition` what a method must say about a layer, `matrix` the one matrix
factorization that every method on matrices shares: methods differ in the metric in which they measure the error.
"""
