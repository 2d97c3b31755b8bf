from tests import interpreter  # noqa: F401 - mended before kernels are loaded
