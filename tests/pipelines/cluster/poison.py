"""Preloaded by workers: the process dies when it reads one image, as a decoder of foreign code can."""

from __future__ import annotations

import os
import signal

KEY = "130.png"


def dask_setup(worker):
    from featstore.datasets.files import FileDataset

    genuine = FileDataset.image_as

    def deadly(self, key, digest):
        if key == KEY:
            os.kill(os.getpid(), signal.SIGKILL)
        return genuine(self, key, digest)

    FileDataset.image_as = deadly
