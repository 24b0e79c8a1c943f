import pytest
from torch import nn

from python_tests.positions.shared import ENCODINGS


@pytest.fixture(params=ENCODINGS)
def encoding(request: pytest.FixtureRequest) -> nn.Module:
    return ENCODINGS[request.param]()


@pytest.fixture(params=[name for name in ENCODINGS if name.startswith(("cayley", "circulant", "reflection"))])
def string(request: pytest.FixtureRequest) -> nn.Module:
    return ENCODINGS[request.param]()
