"""The shared fixtures do what they promise."""

from __future__ import annotations

import pytest
import torch


@pytest.mark.usefixtures("nan_empty")
def test_nan_empty_poisons_what_is_not_written() -> None:
    like = torch.ones(3, dtype=torch.bfloat16)
    for memory in (torch.empty(3), torch.empty_like(like), like.new_empty(3), torch.empty_strided((2, 2), (1, 2))):
        assert memory.isnan().all()
    assert torch.empty(3, requires_grad=True).requires_grad
    assert (torch.empty(3, dtype=torch.int32) == torch.iinfo(torch.int32).min).all()
    compiled = torch.compile(torch.empty_like, fullgraph=True, backend="eager")
    assert compiled(like).isnan().all()
