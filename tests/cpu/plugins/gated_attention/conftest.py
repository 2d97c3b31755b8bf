from tests.interpreter import within_bounds  # noqa: F401 - a fixture for all tests here
