"""Where this user's measurements of this machine are kept: processor rates and tuned kernels. Deleting it loses only time."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/graphwright`, by default `~/.cache/graphwright`; made by whoever writes into it."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "graphwright"
