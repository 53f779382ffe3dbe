"""Operators of Mixtral: public functions by family (attention, moe, linear, norm, sampling, collective, quantize).

Importing this package loads nothing; the first family module imported loads the compiled operators (ops.library).
"""

import warnings

# Paddle says this at every import; it concerns people who compile operators over and over, not people who run them.
warnings.filterwarnings("ignore", message="No ccache found")
