"""What the tests of the ``transformers`` classes share: no network, no progress bars, small models with odd weights."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch


@pytest.fixture(scope="session")
def quiet_transformers():
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


@pytest.fixture
def make():
    """A model with weights, gates, decays, routers and tables that no constructor gives."""
    from gatework.models import GateworkConfig, GateworkForCausalLM

    def build(dtype: torch.dtype = torch.float64, scale: float = 0.3, **settings) -> GateworkForCausalLM:
        config = GateworkConfig(**({"vocab_size": 31, "d_model": 16, "layers": 2, "heads": 2, "d_ff": 24} | settings))
        torch.manual_seed(0)
        model = GateworkForCausalLM(config).to(dtype).eval()
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
        return model

    return build
