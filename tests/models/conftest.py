"""What the tests of fused and unfused base MLPs share."""

import logging

import pytest
from transformers.utils import logging as hf_logging


@pytest.fixture
def log(caplog):
    """The log, which has warnings again that were given once before."""
    hf_logging.warning_once.cache_clear()
    caplog.set_level(logging.WARNING)
    return caplog
