"""Run the server's command as a child that never outlives its parent.

`python -m cupaged.engine.replicas.child` takes the arguments of `python -m cupaged.serve`, and ends at once
when its standard input does: when the parent has died, however that came about.
"""

from __future__ import annotations

import os
import sys
import threading

from cupaged.serve import main


def end_with_parent() -> None:
    """End the process when its standard input ends; the parent never writes to it."""
    os.read(0, 1)
    os._exit(1)


if __name__ == "__main__":
    threading.Thread(target=end_with_parent, name="cupaged-parent", daemon=True).start()
    sys.exit(main())
