"""IEEE float16: 11 significant bits, magnitudes up to 65504. Multiplies float32 activations."""

import numpy as np

from paceline.ops.formats._floats import Floats

FORMAT = Floats("f16", np.dtype(np.float16), align=32)
