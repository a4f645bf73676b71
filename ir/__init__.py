"""The intermediate representation: programs, their dialect, capture, verification and printing.

Nothing is imported here: `graphwright.load` takes `errors` and `files` of this package and must not wait for torch.
"""
