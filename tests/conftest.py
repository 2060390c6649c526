"""What every test shares: an offline, quiet, predictable process, and memory that starts as NaN."""

import os

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", HF_HUB_DISABLE_PROGRESS_BARS="1", MPLBACKEND="Agg")
os.environ.update(TOKENIZERS_PARALLELISM="false", TRANSFORMERS_VERBOSITY="error")

import pytest
import torch
from torch import Tensor

torch.set_num_threads(1)  # on busy cores threads wait for each other: the suite is up to 8 times slower with two


@pytest.fixture
def nan_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uninitialised memory holds NaN (integers: the smallest value), so what a kernel forgets to write shows."""

    def poisoned(allocate):
        def empty(*args, **kwargs) -> Tensor:
            memory = allocate(*args, **kwargs)
            if memory.is_floating_point() or memory.is_complex():
                return memory.detach().fill_(float("nan")).requires_grad_(memory.requires_grad)
            return memory.fill_(False if memory.dtype == torch.bool else torch.iinfo(memory.dtype).min)

        return empty

    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (torch, "empty_permuted"),
        (Tensor, "new_empty"),
        (Tensor, "new_empty_strided"),
    ):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))
