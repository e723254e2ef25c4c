"""Inside an image: the compose file's scheduler and worker commands, their health, and an extraction through them."""

from __future__ import annotations

import subprocess
import sys
import time
import urllib.request

SCHEDULER = ["dask", "scheduler", "--host", "127.0.0.1", "--port", "8786", "--dashboard-address", "127.0.0.1:8787"]
WORKER = ["dask", "worker", "tcp://127.0.0.1:8786", "--nworkers", "1", "--nthreads", "1"]
WORKER += ["--dashboard-address", "127.0.0.1:8788", "--local-directory", "/tmp", "--death-timeout", "120"]
EXTRACT = ["featstore", "extract", "--dataset", "toyhorse", "--techniques", "basic", "--limit", "4"]
EXTRACT += ["--scheduler", "tcp://127.0.0.1:8786", "--store", "/data/cluster.zarr"]


def healthy(port: int, seconds: float = 90) -> str:
    """What the health page of a process says, as soon as it says anything."""
    end = time.monotonic() + seconds
    while True:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
                return str(answer.read().decode())
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.5)


def main() -> int:
    """Start both, extract, stop both."""
    processes = []
    try:
        for name, command, port in (("scheduler", SCHEDULER, 8787), ("worker", WORKER, 8788)):
            processes.append(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
            sys.stdout.write(f"{name}: /health says {healthy(port)}\n")
        done = subprocess.run(EXTRACT, check=False, capture_output=True, text=True)
        last = (done.stdout + done.stderr).strip().splitlines()[-3:]
        sys.stdout.write(f"extract --scheduler: exit {done.returncode}\n" + "\n".join(last) + "\n")
        return done.returncode
    finally:
        for process in reversed(processes):
            process.terminate()
            process.wait(60)


if __name__ == "__main__":
    raise SystemExit(main())
