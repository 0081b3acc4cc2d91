"""Options of the whole suite."""


def pytest_addoption(parser):
    parser.addoption(
        "--backend",
        action="append",
        choices=["reference", "cpu", "cuda_host", "cuda"],
        help="run the kernel suite on these backends only; may be repeated",
    )
