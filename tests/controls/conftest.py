"""What the tests of controls share."""

import pytest
from studied import make_study


@pytest.fixture(scope="package")
def studied(tmp_path_factory):
    """The SAE with the cache of eight images, the images, and rows with their labels at random."""
    return make_study(tmp_path_factory.mktemp("cache"))
