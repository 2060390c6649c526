"""Which backend runs, what happens to one that cannot, and that the public list is what other trainers call."""

from __future__ import annotations

import inspect
import re
from types import SimpleNamespace

import pytest
import torch

from twinhead import kernels
from twinhead.kernels import _dispatch
from twinhead.kernels._dispatch import Backends

CPU, CUDA = torch.device("cpu"), torch.device("cuda")

SIGNATURES = """
    selective_log_softmax(logits, index, temperature=1.0, row_mask=None)
    selective_log_softmax_and_entropy(logits, index, entropy_requires_grad=True, temperature=1.0, row_mask=None)
    entropy_from_logits(logits, chunk_size=128)
    linear_logprob(hidden, weight, targets, bias=None, *, temperature=1.0, softcap=None, logit_scale=1.0,
        return_entropy=False, ignore_index=-100, backend=None)
    linear_cross_entropy(hidden, weight, labels, temperature=1.0, reduction='none', dist_process_group=None)
    linear_ppo_loss(hidden, weight, targets, old_logprobs, advantages, *, clip_low=0.2, clip_high=0.2, dual_clip=None,
        ref_logprobs=None, kl_coef=0.0, kl_estimator='k3', entropy_coef=0.0, temperature=1.0, normalizer=None,
        bias=None,
        softcap=None, logit_scale=1.0, return_logprobs=False, backend=None)
    linear_kl(hidden, weight, ref_hidden, ref_weight, *, direction='reverse', temperature=1.0, backend=None)
    kl_estimate(logprobs, ref_logprobs, kind='k1')
    full_kl(logits, ref_logits, *, direction='reverse', temperature=1.0, backend=None)
    gae(rewards, values, *, gamma=1.0, lam=0.95, mask=None, cu_seqlens=None, bootstrap=None, whiten=False, backend=None)
    whiten(x, mask=None, *, shift_mean=True, unbiased=False)
    ppo_loss(logprobs, old_logprobs, advantages, values, old_values, returns, *, mask=None, entropy=None,
        clip_low=0.2, clip_high=0.2, dual_clip=None, value_clip=0.2, value_coef=0.5, entropy_coef=0.0,
        normalizer=None, backend=None)
    grpo_loss(logprobs, old_logprobs, advantages, *, mask=None, cu_seqlens=None, ref_logprobs=None, beta=0.0,
        epsilon_low=0.2, epsilon_high=None, loss_type='grpo', normalizer=None, backend=None)
    dpo_loss(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, *, beta=0.1,
        loss_type='sigmoid', label_smoothing=0.0)
    sample(logits, uniforms, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, backend=None)
"""


def test_the_public_list_is_the_one_others_call() -> None:
    found = {}
    for name in kernels.__all__:
        signature = inspect.signature(getattr(kernels, name))
        bare = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
        found[name] = f"{name}{inspect.Signature(bare)}"
    expected = re.split(r"\n    (?=\w)", SIGNATURES.strip())
    assert sorted(found.values()) == sorted(" ".join(line.split()) for line in expected)


def calls() -> dict[str, tuple]:
    """One small call of every public function."""
    x, cu_seqlens = torch.zeros(3), torch.tensor([0, 3], dtype=torch.int32)
    logits, weight, index = torch.zeros(3, 5), torch.zeros(5, 4), torch.zeros(3, dtype=torch.int64)
    hidden = torch.zeros(3, 4)
    return {
        "selective_log_softmax": ((logits, index), {}),
        "selective_log_softmax_and_entropy": ((logits, index), {}),
        "entropy_from_logits": ((logits,), {}),
        "linear_logprob": ((hidden, weight, index), {}),
        "linear_cross_entropy": ((hidden, weight, index), {}),
        "linear_ppo_loss": ((hidden, weight, index, x, x), {}),
        "linear_kl": ((hidden, weight, hidden, weight), {}),
        "kl_estimate": ((x, x), {}),
        "full_kl": ((logits, logits), {}),
        "gae": ((x, x), {"cu_seqlens": cu_seqlens}),
        "whiten": ((x,), {}),
        "ppo_loss": ((x, x, x, x, x, x), {}),
        "grpo_loss": ((x, x, x), {"cu_seqlens": cu_seqlens}),
        "dpo_loss": ((x, x, x, x), {}),
        "sample": ((logits, x), {}),
    }


def call(name: str, **extra: str) -> None:
    args, kwargs = calls()[name]
    getattr(kernels, name)(*args, **kwargs, **extra)


ONLY_IN_TORCH = {"whiten", "kl_estimate", "grpo_loss", "dpo_loss"}


@pytest.mark.parametrize("name", kernels.__all__)
def test_the_environment_forces_a_backend(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TWINHEAD_KERNELS", "torch")
    call(name)
    monkeypatch.setenv("TWINHEAD_KERNELS", "fortran")
    with pytest.raises(ValueError, match="unknown backend 'fortran', expected one of triton, cpu, torch"):
        call(name)
    monkeypatch.setenv("TWINHEAD_KERNELS", "triton")
    if name not in ONLY_IN_TORCH:
        with pytest.raises(ValueError, match="backend 'triton' cannot run here"):
            call(name)
    else:
        call(name)


@pytest.mark.parametrize(
    "name", [n for n in kernels.__all__ if "backend" in inspect.signature(getattr(kernels, n)).parameters]
)
def test_the_argument_goes_before_the_environment(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=f"{name}: unknown backend 'gpu'"):
        call(name, backend="gpu")
    monkeypatch.setenv("TWINHEAD_KERNELS", "fortran")
    call(name, backend="torch")


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A machine whose installed modules the test chooses; picking a backend gives the module's name."""
    machine = SimpleNamespace(installed={"triton", _dispatch.EXTENSION})
    monkeypatch.setattr(_dispatch, "_installed", lambda module: module in machine.installed)
    monkeypatch.setattr(_dispatch, "_load", lambda name: name)
    monkeypatch.delenv("TWINHEAD_KERNELS", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    return machine


EVERYTHING = Backends("op", triton="gpu", cpu="cpu", torch="reference")


@pytest.mark.usefixtures("machine")
def test_the_environment_leaves_alone_what_is_there_once(monkeypatch: pytest.MonkeyPatch) -> None:
    once = Backends("op", torch="reference")
    monkeypatch.setenv("TWINHEAD_KERNELS", "cpu")
    assert once.pick("op", CPU) == "op.reference" and EVERYTHING.pick("op", CPU) == "op.cpu"
    with pytest.raises(ValueError, match="no backend 'cpu' for this operation, expected one of torch"):
        once.pick("op", CPU, "cpu")


def test_the_device_picks(machine: SimpleNamespace) -> None:
    assert EVERYTHING.pick("op", CUDA) == "op.gpu"
    assert EVERYTHING.pick("op", CPU) == "op.cpu"
    assert EVERYTHING.pick("op", torch.device("mps")) == "op.reference"
    assert Backends("op", torch="reference").pick("op", CPU) == "op.reference"


def test_what_is_not_installed_is_not_picked_and_cannot_be_forced(machine: SimpleNamespace) -> None:
    machine.installed.clear()
    assert EVERYTHING.pick("op", CUDA) == EVERYTHING.pick("op", CPU) == "op.reference"
    with pytest.raises(ValueError, match=r"op: backend 'cpu' cannot run here, the extension .* is not built"):
        EVERYTHING.pick("op", CPU, "cpu")
    with pytest.raises(ValueError, match="op: backend 'triton' cannot run here, the package triton is not installed"):
        EVERYTHING.pick("op", CUDA, "triton")


def test_a_backend_is_not_forced_on_the_wrong_device(machine: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="expected CPU tensors, got tensors on cuda"):
        EVERYTHING.pick("op", CUDA, "cpu")
    with pytest.raises(ValueError, match=r"expected CUDA tensors .* got tensors on cpu"):
        EVERYTHING.pick("op", CPU, "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert EVERYTHING.pick("op", CPU, "triton") == "op.gpu"
    assert EVERYTHING.pick("op", CPU) == "op.cpu", "the interpreter only runs where it is asked for"
