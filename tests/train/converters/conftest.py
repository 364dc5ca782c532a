"""What the tests of converted weights share."""

import pytest
import torch


@pytest.fixture(autouse=True)
def seed_of_public_networks():
    """Networks of other packages start from torch's own generator: without it, they depended on the tests before."""
    torch.manual_seed(0)
