"""Puts the repository's root on the path.

Scripts in folders import this before our other modules when they are run as files.
"""

import sys
from pathlib import Path

ROOT = str(Path(__file__).resolve().parent.parent)
if ROOT not in sys.path:
    sys.path.insert(0, ROOT)
