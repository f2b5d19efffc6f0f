import os

# Before torch: idle threads that spin would keep cores from whoever feeds the GPU.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from tests.gpu.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
