"""Write a model in one of our formats, parameter by parameter, so that memory holds one of them at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from paceline import models
from paceline.assemble import Progress, locate, native_isas, read_tokenizer, under
from paceline.checkpoints import open_checkpoint
from paceline.checkpoints.packed import save_packed
from paceline.core.config import EngineConfig
from paceline.models import loader
from paceline.ops import formats


def packer() -> loader.Packer:
    """The fastest packing there is here."""
    if not native_isas():
        return formats.pack
    from paceline.ops.native import NativeOps

    return NativeOps().pack


def quantize(
    model: str | Path, out: Path, config: EngineConfig, *, overwrite: bool = False, progress: Progress | None = None
) -> dict[str, Any]:
    """Quantise `model` to `config.format` into the folder `out`; it appears complete or not at all. Raises PacelineError subclasses."""
    checkpoint = open_checkpoint(locate(model), offline=config.offline)
    try:
        model_config = models.read(checkpoint.config)
        choice = loader.FormatChoice.parse(config.format, config.dtype)
        sizes = loader.plan_sizes(model_config, choice, checkpoint)
        tokenizer = read_tokenizer(checkpoint)
        notes: list[str] = []
        save_packed(
            out,
            checkpoint.config,
            loader.parameters(
                checkpoint, model_config, choice, notes, progress and under("quantising", progress), packer()
            ),
            form=config.format,
            generation=checkpoint.generation,
            source=checkpoint.path if checkpoint.path.is_dir() else None,
            write_tokenizer=None if tokenizer is None or checkpoint.path.is_dir() else tokenizer.save,
            expected_bytes=sizes.n_bytes,
            overwrite=overwrite,
        )
    finally:
        checkpoint.close()
    return {
        "path": str(out),
        "formats": sizes.formats,
        "bytes": sizes.n_bytes,
        "parameters": sizes.n_params,
        "bits_per_weight": 8 * sizes.n_bytes / sizes.n_params,
        "notes": notes,
    }
