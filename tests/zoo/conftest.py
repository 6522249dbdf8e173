"""The zoo needs torchvision and timm; where they are not installed its tests are skipped."""

import pytest

from bench import zoo

try:
    zoo.import_torchvision()
    import timm  # noqa: F401

    HAVE_BOTH = True
except ImportError:
    HAVE_BOTH = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    alone = ("test_properties", "test_operations", "test_own_networks", "test_example_twins", "test_contractions")
    for item in items:
        if "zoo" in item.path.parts and item.path.stem not in alone and not HAVE_BOTH:
            item.add_marker(pytest.mark.skip(reason="torchvision and timm are not both installed"))
