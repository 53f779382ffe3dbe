"""Operators of Mixtral: public functions by family (embedding, attention, moe, linear, norm, sampling, collective,
quantize).

Importing this package loads nothing but settles two things that must be settled before Paddle is imported; the first
family module imported loads the compiled operators (ops.library).
"""

import os
import warnings

# Paddle says this at every import; it concerns people who compile operators over and over, not people who run them.
warnings.filterwarnings("ignore", message="No ccache found")

# Waiting threads spin briefly, then sleep. libgomp's own choice is to spin for milliseconds: beside other busy jobs on
# two cores, steps of the demo model then took up to 380 ms instead of 4. An idle machine pays 5 % of such a step for it
# (1.13 ms, not 1.07). libgomp reads this as it loads, with Paddle.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
