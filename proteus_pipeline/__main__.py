"""``python -m proteus_pipeline`` is ``proteus``."""

import sys

from proteus_pipeline.cli.main import main

sys.exit(main())
