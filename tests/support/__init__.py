"""What the tests share: helpers, stand-ins and constants. Test modules import from here, never from each other."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
"""The repository."""
