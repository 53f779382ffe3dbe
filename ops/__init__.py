"""Operators of Mixtral: public functions by family (attention, moe, linear, norm, sampling, collective, quantize).

Importing this package loads nothing but settles two things that must be settled before Paddle is imported; the first
family module imported loads the compiled operators (ops.library).
"""

import os
import warnings

# Paddle says this at every import; it concerns people who compile operators over and over, not people who run them.
warnings.filterwarnings("ignore", message="No ccache found")

# Waiting threads sleep instead of spinning: with another busy process on the machine, spinning ones made a step of the
# demo model a hundred times slower (3 ms against over 300), and without one they gain 0.3 ms. libgomp reads this as it loads.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "0")
