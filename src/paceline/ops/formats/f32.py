"""float32, as it comes: the exact reference."""

import numpy as np

from paceline.ops.formats._floats import Floats

FORMAT = Floats("f32", np.dtype(np.float32), align=1)
