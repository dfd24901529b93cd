"""bfloat16: 8 significant bits, float32's range. Multiplies activations that are rounded to bfloat16."""

import ml_dtypes
import numpy as np

from paceline.ops.formats._floats import Floats

FORMAT = Floats("bf16", np.dtype(ml_dtypes.bfloat16), align=32)
