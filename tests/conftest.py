"""Before each test PyTorch multiplies as it does by itself, whatever a run in this process chose."""
import pytest

from custom_kernels.products import use_products

@pytest.fixture(autouse=True)
def plain_products():
    use_products("mkl")
