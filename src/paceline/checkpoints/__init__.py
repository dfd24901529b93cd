"""Model files: Hugging Face folders, single safetensors, GGUF, and our own quantised folders."""

from paceline.checkpoints.base import Checkpoint, TensorInfo
from paceline.checkpoints.open import open_checkpoint

__all__ = ["Checkpoint", "TensorInfo", "open_checkpoint"]
