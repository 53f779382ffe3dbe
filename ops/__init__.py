"""Operators of Mixtral: public functions by family (attention, moe, linear, norm, sampling, collective, quantize).

Importing this package loads nothing; the first family module imported loads the compiled operators (ops.library).
"""
