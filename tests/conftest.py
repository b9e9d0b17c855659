"""What every test shares: the repository root on the import path, one thread per core, fixed seeds, no network, real data."""

import os
import random
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported; test_hub.py starts processes of its own
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the shapes are small: a second thread costs more than it brings
os.environ.setdefault("TRITON_INTERPRET", "1")  # as kernels.py is imported: its kernels then run here, if asked for by name

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


@pytest.fixture(autouse=True)
def seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real data kept beside the repository; a clone has none, and the tests that read it are then skipped."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no real data: {folder} does not exist")
    return folder
