"""Lets the tests here import `harness` and `calls`: a folder of tests is not on the path by itself."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
