"""Round a registered version's weights to fp16 and widen them again: the smallest honest change of a model.

Run ``make candidate``, or this and then ``proteus model register``.
"""

import sys
from pathlib import Path

import torch

from proteus_pipeline import ModelInterface
from proteus_pipeline.models.checkpoint import Checkpoint
from proteus_pipeline.models.folder import write_folder


def main(reference: str, folder: Path) -> None:
    checkpoint = ModelInterface(reference).checkpoint
    rounded = {name: t.to(torch.float16).to(t.dtype) for name, t in checkpoint.tensors.items()}
    write_folder(Checkpoint(checkpoint.architecture, rounded), folder)
    print(f"{folder}: {reference}, rounded to fp16 and stored as fp32")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(f"usage: {sys.argv[0]} REFERENCE FOLDER")
    main(sys.argv[1], Path(sys.argv[2]))
