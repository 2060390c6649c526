"""The seventeen test vectors, which nine independent implementations agree on, through our public functions.

Masked entries of the vectors hold garbage on purpose. The engine is ragged, so its functions get the masked entries of
a padded vector one after the other. Not checked, because no function of ours returns it: the alternatives that a
vector gives only for comparison (`*_WRONG`, `wrong_denominator`, `placement_plus_one`, `literal_choose_K`, `seq_mean`,
`ipo_avg`, the sequence-level ratios, `clipfrac_dual`), the centring penalty, the mean and the variances behind the
whitened values, and what takes a model or several processes (`has_eos`, `bias*`, `gain*`, `per_rank`).
"""

from __future__ import annotations

import json
from itertools import chain
from math import isnan
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from twinhead import kernels
from twinhead.engine import losses
from twinhead.engine.batch import Rollout, cumulative, pack, segment_sum

VECTORS = json.loads((Path(__file__).parent / "data" / "vectors.json").read_text())["vectors"]


class Vectors:
    """Reads a vector in one dtype, and compares with the tolerance of that dtype."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype, self.tolerance = dtype, 1e-10 if dtype == torch.float64 else 1e-5

    def __call__(self, name: str) -> tuple[SimpleNamespace, SimpleNamespace]:
        """The inputs and the expected values; lists of numbers in a rectangle become tensors, null NaN."""
        vector = VECTORS[name]
        return tuple(
            SimpleNamespace(**{key: self.read(value) for key, value in vector[part].items()})
            for part in ("inputs", "expected")
        )

    def read(self, value: Any) -> Any:
        if isinstance(value, dict):
            return SimpleNamespace(**{key: self.read(inner) for key, inner in value.items()})
        if not isinstance(value, list):
            return value
        try:
            return torch.from_numpy(np.asarray(value, dtype=np.float64)).to(self.dtype)
        except (ValueError, TypeError):  # ragged, which torch.tensor would take for empty; or dicts
            return value

    def close(self, found: Any, expected: Any) -> None:
        expected = torch.as_tensor(expected, dtype=self.dtype)
        found = torch.as_tensor(found, dtype=self.dtype)
        assert_close(found, expected, rtol=self.tolerance, atol=self.tolerance)


@pytest.fixture(params=[torch.float64, torch.float32], ids=["float64", "float32"])
def vectors(request: pytest.FixtureRequest) -> Vectors:
    return Vectors(request.param)


def borders(mask: Tensor) -> Tensor:
    """cu_rows of a padded mask."""
    return cumulative(mask.sum(1).int().tolist())


def rollout(prompt: list[int], response: list[int], finished: bool = True) -> Rollout:
    return Rollout(prompt, response, torch.zeros(len(response)), None, finished)


def identity(logits: Tensor) -> Tensor:
    """The vocabulary matrix for which hidden states are logits."""
    return torch.eye(logits.shape[-1], dtype=logits.dtype)


def test_every_vector_has_a_test() -> None:
    assert len(VECTORS) == 17
    assert set(VECTORS) <= {name.removeprefix("test_") for name in globals()}


def test_layout(vectors: Vectors) -> None:
    given, expected = vectors("layout")
    mask, attended = expected.response_mask.bool(), expected.attention_mask.bool()
    cut = [row[: int(n)] for row, n in zip(given.generated.long().tolist(), expected.response_length, strict=True)]
    packed = pack([rollout(prompt, response) for prompt, response in zip(given.prompts, cut, strict=True)])
    vectors.close(packed.tokens, expected.input_ids[attended])
    vectors.close(packed.positions, expected.position_ids_on_real_tokens[attended])
    vectors.close(packed.targets, expected.response_ids[mask])
    vectors.close(packed.cu_rows.diff() - 1, expected.last_action_index)
    predicting = torch.zeros_like(attended)
    start, stop = expected.logits_slice.long().tolist()
    predicting[:, start:stop] = mask
    assert torch.equal(packed.rows, predicting[attended].nonzero().squeeze(1))
    assert torch.equal(packed.last, packed.rows[packed.cu_rows[1:].long() - 1] + 1)


def test_sft_loss(vectors: Vectors) -> None:
    given, expected = vectors("sft_loss")
    logits = [torch.tensor(rows, dtype=vectors.dtype, requires_grad=True) for rows in given.logits]
    # label j is predicted by row j - 1; the first label of a sequence has no predecessor
    nll = [
        -kernels.linear_logprob(z[:-1], identity(z), torch.tensor(labels[1:]))
        for z, labels in zip(logits, given.labels, strict=True)
    ]
    count = expected.n_targets.sum()
    token_mean = sum(x.sum() for x in nll) / count
    vectors.close(torch.stack([x.sum() for x in nll]), expected.nll_sum)
    vectors.close(token_mean, expected.token_mean)
    vectors.close(token_mean.exp(), expected.ppl_token_mean)
    vectors.close(torch.autograd.grad(token_mean, logits[0])[0], expected.grad_logits_seq0_token_mean)


def test_rm_loss(vectors: Vectors) -> None:
    given, expected = vectors("rm_loss")
    cu_groups = cumulative(len(scores) for scores in given.scores)
    scores = torch.tensor([*chain(*given.scores)], dtype=vectors.dtype, requires_grad=True)
    ranks = torch.tensor([*chain(*given.ranks)])
    loss, pairs = losses.kwise(scores, ranks, cu_groups), losses.num_pairs(ranks, cu_groups)
    vectors.close(pairs, expected.n_pairs)
    vectors.close(loss * pairs, expected.sum_per_prompt)
    vectors.close(loss.mean(), expected.loss_per_prompt_mean)
    vectors.close((loss * pairs).sum() / pairs.sum(), expected.flat_pair_mean)
    vectors.close(torch.autograd.grad(loss.mean(), scores)[0], [*chain(*expected.grad_scores)])
    correct, decided = losses.pair_accuracy(scores, ranks, cu_groups)
    vectors.close(correct.sum() / decided.sum(), expected.accuracy_micro_ties_half)
    vectors.close((correct / decided).mean(), expected.accuracy_macro)
    vectors.close(losses.bradley_terry(given.chosen, given.rejected), expected.pairwise)
    vectors.close(losses.bradley_terry(given.chosen, given.rejected, given.margin), expected.pairwise_margin)


def test_kl_estimators(vectors: Vectors) -> None:
    given, expected = vectors("kl_estimators")
    mask = given.mask.bool()
    for kind in ("k1", "k2", "k3"):
        estimate = kernels.kl_estimate(given.logprobs, given.ref_logprobs, kind)
        vectors.close(estimate.where(mask, 0), getattr(expected, kind))
        per_sequence = segment_sum(estimate[mask], borders(mask))
        vectors.close(per_sequence, getattr(expected.seq_sum, kind))
        vectors.close(estimate[mask].mean(), getattr(expected.token_mean, kind))
        if kind != "k2":
            vectors.close(per_sequence.mean(), getattr(expected.mean_seq_sum, kind))
    sequences = losses.sequence_kl(given.logprobs[mask], given.ref_logprobs[mask], borders(mask))
    vectors.close(sequences, expected.seq_sum.k1)


def test_full_kl(vectors: Vectors) -> None:
    given, expected = vectors("full_kl")
    for t, banned in enumerate(given.banned):
        given.logits[0, t, banned] = given.ref_logits[0, t, banned] = -float("inf")
    mask = given.mask.bool()
    kl = kernels.full_kl(given.logits, given.ref_logits)
    vectors.close(kl, expected.kl)
    vectors.close(
        kernels.full_kl(given.logits, given.ref_logits, temperature=given.temperature), expected.kl_temperature
    )
    vectors.close(kernels.full_kl(given.ref_logits, given.logits, direction="forward"), expected.kl)
    entropy = kernels.entropy_from_logits(given.logits)
    vectors.close(entropy, expected.entropy)
    vectors.close(kl.where(mask, 0).sum(1), expected.kl_masked_seq_sum)
    vectors.close(entropy[mask].mean(), expected.entropy_masked_mean)
    # without banned words the logits can come from a matrix
    z, ref = given.logits[0, [0, 3]], given.ref_logits[0, [0, 3]]
    vectors.close(kernels.linear_kl(z, identity(z), ref, identity(ref)), expected.kl[0, [0, 3]])


def test_kl_gradients(vectors: Vectors) -> None:
    given, expected = vectors("kl_gradients")
    logits, ref_logprobs = given.logits.requires_grad_(), given.ref_logprobs

    def learn(loss: Tensor) -> Tensor:
        return torch.autograd.grad(loss, logits)[0]

    for kind in ("k1", "k2", "k3"):
        logprobs = kernels.selective_log_softmax(logits.expand(4, 4), torch.arange(4))
        estimate = kernels.kl_estimate(logprobs, ref_logprobs, kind)
        p = logprobs.detach().exp()
        vectors.close((p * estimate).sum().detach(), getattr(expected.value_of_expectation, kind))
        vectors.close(learn((p * estimate).sum()), getattr(expected, f"expected_grad_{kind}"))
    reverse = kernels.full_kl(logits, ref_logprobs)
    forward = kernels.full_kl(logits, ref_logprobs, direction="forward")
    vectors.close(reverse, expected.KL_pi_ref)
    vectors.close(forward, expected.KL_ref_pi)
    vectors.close(learn(reverse), expected.grad_KL_pi_ref)
    vectors.close(learn(forward), expected.grad_KL_ref_pi)


def test_rewards(vectors: Vectors) -> None:
    given, expected = vectors("rewards")
    mask, finished = given.mask.bool(), given.has_eos.bool()
    tokens = (given.logprobs[mask], given.ref_logprobs[mask])
    rules: dict[str, dict[str, float]] = {
        "rewards": {},
        "rewards_missing_eos_subtract": {"subtract": given.missing_eos_penalty},
        "rewards_missing_eos_replace": {"replace": given.missing_eos_score},
    }
    for name, rule in rules.items():
        scores = losses.eos_rule(given.scores, finished, **rule).clamp(-given.score_clip, given.score_clip)
        rewards = losses.token_rewards(kernels.kl_estimate(*tokens), scores, borders(mask), given.kl_coef)
        vectors.close(rewards, getattr(expected, name)[mask])
        if not rule:
            vectors.close(segment_sum(rewards, borders(mask)), expected.rlhf_reward_per_sequence)
    penalty = losses.token_rewards(
        kernels.kl_estimate(*tokens), torch.zeros_like(given.scores), borders(mask), given.kl_coef
    )
    vectors.close(segment_sum(penalty, borders(mask)), expected.non_score_reward_per_sequence)


def test_adaptive_kl(vectors: Vectors) -> None:
    given, expected = vectors("adaptive_kl")
    control = losses.AdaptiveKL(given.init, given.target, given.horizon)
    found = [control.update(kl, given.n_steps) for kl in given.kl_sequence.tolist()]
    vectors.close(found, expected.beta_after)
    assert control.coef == found[-1]


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_gae_padded(vectors: Vectors, backend: str) -> None:
    given, expected = vectors("gae_padded")
    cases: dict[str, dict[str, Any]] = {
        "": {"gamma": given.gamma, "lam": given.lam},
        "_bootstrap": {"gamma": given.gamma, "lam": given.lam, "bootstrap": given.bootstrap_values},
        "_gamma1_lam1": {"lam": 1.0},
        "_gamma1_lam0": {"lam": 0.0},
    }
    for case, settings in cases.items():
        advantages, returns = kernels.gae(given.rewards, given.values, mask=given.mask, backend=backend, **settings)
        vectors.close(advantages, getattr(expected, f"advantages{case}"))
        if case != "_gamma1_lam0":
            vectors.close(returns, getattr(expected, f"returns{case}"))


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_gae_packed(vectors: Vectors, backend: str) -> None:
    given, expected = vectors("gae_packed")
    settings = {"gamma": given.gamma, "lam": given.lam, "cu_seqlens": given.cu_seqlens.int(), "backend": backend}
    advantages, returns = kernels.gae(given.rewards, given.values, **settings)
    vectors.close(advantages, expected.advantages)
    vectors.close(returns, expected.returns)
    advantages, _ = kernels.gae(given.rewards, given.values, bootstrap=given.bootstrap_values, **settings)
    vectors.close(advantages, expected.advantages_bootstrap)


def test_whitening(vectors: Vectors) -> None:
    given, expected = vectors("whitening")
    assert given.eps == 1e-8
    vectors.close(kernels.whiten(given.x, given.mask), expected.biased)
    vectors.close(kernels.whiten(given.x, given.mask, unbiased=True), expected.unbiased)
    vectors.close(kernels.whiten(given.x, given.mask, shift_mean=False), expected.biased_no_shift)
    vectors.close(kernels.whiten(given.x[given.mask.bool()]), expected.biased[given.mask.bool()])


def test_ppo_policy_loss(vectors: Vectors) -> None:
    given, expected = vectors("ppo_policy_loss")
    new, old, mask = given.new_logprobs.requires_grad_(), given.old_logprobs, given.mask.bool()
    zero = torch.zeros_like(old)
    clips = {"clip_low": given.clip_low, "clip_high": given.clip_high}

    def ppo(**settings: Any) -> tuple[Tensor, dict[str, Tensor]]:
        settings = {"mask": mask, **clips, **settings}
        return kernels.ppo_loss(new, old, given.advantages, zero, zero, zero, **settings)

    def grpo(loss_type: str, clip_high: float, **settings: Any) -> Tensor:
        settings |= {"mask": mask, "epsilon_low": given.clip_low, "epsilon_high": clip_high}
        return kernels.grpo_loss(new, old, given.advantages, loss_type=loss_type, **settings)[0]

    per_token = [ppo(mask=alone.view_as(mask), normalizer=1)[0] for alone in torch.eye(mask.numel())]
    vectors.close(torch.stack(per_token).view_as(mask).where(mask, 0), expected.per_token)
    sequences = int(mask.any(1).sum())
    for clip_high, means in (
        (given.clip_high, expected.aggregate),
        (given.clip_high_alt, expected.aggregate_clip_higher),
    ):
        vectors.close(ppo(clip_high=clip_high)[0], means.token_mean)
        vectors.close(grpo("dapo", clip_high), means.token_mean)
        vectors.close(grpo("grpo", clip_high), means.seq_mean_token_mean)
        vectors.close(grpo("dapo", clip_high, normalizer=sequences), means.seq_mean_token_sum)
        vectors.close(grpo("dr_grpo", clip_high), means.seq_sum_over_B_times_Tmax)
    dual, means = {"dual_clip": given.dual_clip}, expected.aggregate_dual_clip
    vectors.close(ppo(**dual)[0], means.token_mean)
    vectors.close(ppo(**dual, normalizer=sequences)[0], means.seq_mean_token_sum)
    vectors.close(ppo(**dual, normalizer=mask.numel())[0], means.seq_sum_over_B_times_Tmax)

    loss, stats = ppo()
    vectors.close(torch.autograd.grad(loss, new)[0], expected.grad_token_mean)
    vectors.close(torch.autograd.grad(ppo(**dual)[0], new)[0], expected.grad_token_mean_dual)
    names = {"approx_kl": "approx_kl_k1", "approx_kl_k3": "approx_kl_k3", "clipfrac": "clipfrac"}
    for ours, theirs in (names | {"ratio_mean": "ratio_mean", "ratio_max": "ratio_max"}).items():
        vectors.close(stats[ours], getattr(expected.stats, theirs))
    vectors.close(ppo(clip_high=given.clip_high_alt)[1]["clipfrac"], expected.stats.clipfrac_high_0_28)
    vectors.close(kernels.kl_estimate(old[mask], new.detach()[mask], "k2").mean(), expected.stats.approx_kl_k2)


def test_value_loss(vectors: Vectors) -> None:
    given, expected = vectors("value_loss")
    mask, values, zero = given.mask.bool(), given.values_new.requires_grad_(), torch.zeros_like(given.values_old)
    for clip, name in ((given.clip, "loss"), (None, "loss_unclipped")):
        loss, stats = kernels.ppo_loss(
            zero, zero, zero, values, given.values_old, given.returns, mask=mask, value_clip=clip, value_coef=1.0
        )
        vectors.close(loss, getattr(expected, name))
        vectors.close(stats["vf_loss"], getattr(expected, name))
        vectors.close(stats["vf_clipfrac"], expected.clipfrac)
    vectors.close(torch.autograd.grad(loss, values)[0], expected.grad)
    errors, clipped = losses.value_loss(values, given.values_old, given.returns, given.clip)
    vectors.close(errors[mask].mean(), expected.loss)
    vectors.close(clipped[mask].to(errors.dtype).mean(), expected.clipfrac)
    explained = losses.explained_variance(given.values_old[mask], given.returns[mask])
    vectors.close(explained, expected.explained_variance)


def test_grpo_loss(vectors: Vectors) -> None:
    given, expected = vectors("grpo_loss")
    mask, new = given.mask.bool(), given.new_logprobs.requires_grad_()
    scores, group = given.rewards.flatten(), given.rewards.shape[1]
    kinds = {"grpo": "advantages", "dr_grpo": "advantages_dr", "rloo": "advantages_rloo"}
    for kind, name in kinds.items():
        advantages = losses.group_advantages(scores, group, kind=kind, eps=given.std_eps)
        vectors.close(advantages, getattr(expected, name))
    clips = {"epsilon_low": given.clip_low, "epsilon_high": given.clip_high}
    cases: dict[str, tuple[Tensor, dict[str, Any]]] = {
        "grpo": (expected.advantages, {"beta": given.beta}),
        "dr_grpo": (expected.advantages_dr, {"normalizer": len(mask) * given.max_completion_length}),
        "dapo": (expected.advantages, {"epsilon_high": given.clip_high_dapo}),
    }
    flat = (new[mask], given.old_logprobs[mask])
    for loss_type, (advantages, changes) in cases.items():
        settings = {**clips, **changes, "loss_type": loss_type}
        loss, _ = kernels.grpo_loss(
            new, given.old_logprobs, advantages, mask=mask, ref_logprobs=given.ref_logprobs, **settings
        )
        vectors.close(loss, getattr(expected, f"loss_{loss_type}"))
        vectors.close(torch.autograd.grad(loss, new)[0], getattr(expected, f"grad_{loss_type}"))
        packed, _ = kernels.grpo_loss(
            *flat, advantages, cu_seqlens=borders(mask), ref_logprobs=given.ref_logprobs[mask], **settings
        )
        vectors.close(packed, getattr(expected, f"loss_{loss_type}"))


def test_dpo_loss(vectors: Vectors) -> None:
    given, expected = vectors("dpo_loss")
    chosen, rejected = given.policy_chosen.requires_grad_(), given.policy_rejected.requires_grad_()
    cases: dict[str, dict[str, Any]] = {
        "sigmoid": {},
        "cdpo": {"label_smoothing": given.label_smoothing},
        "robust": {"loss_type": "robust", "label_smoothing": given.label_smoothing},
        "ipo_sum": {"loss_type": "ipo", "beta": given.ipo_tau},
        "hinge": {"loss_type": "hinge"},
    }
    for name, settings in cases.items():
        settings = {"beta": given.beta, **settings}
        found, *rewards = kernels.dpo_loss(chosen, rejected, given.ref_chosen, given.ref_rejected, **settings)
        vectors.close(found, getattr(expected, name))
        if name == "sigmoid":
            vectors.close(found.mean(), expected.sigmoid_mean)
            gradients = torch.autograd.grad(found.mean(), (chosen, rejected))
            vectors.close(gradients[0], expected.grad_policy_chosen)
            vectors.close(gradients[1], expected.grad_policy_rejected)
            vectors.close(rewards[0], expected.rewards_chosen)
            vectors.close(rewards[1], expected.rewards_rejected)
            vectors.close(rewards[0] - rewards[1], expected.margins)
            vectors.close((rewards[0] - rewards[1]) / given.beta, expected.delta)
            vectors.close((rewards[0] > rewards[1]).double().mean(), expected.accuracy)
    z0 = given.kto_mismatched_logratios.mean().clamp(min=0)
    kto = losses.kto(
        given.kto_logratios,
        given.kto_labels,
        z0,
        beta=given.beta,
        desirable_weight=given.kto_desirable_weight,
        undesirable_weight=given.kto_undesirable_weight,
    )
    vectors.close(z0, expected.kto_z0)
    vectors.close(kto, expected.kto)
    vectors.close(kto.mean(), expected.kto_mean)


def test_sampling_filters(vectors: Vectors) -> None:
    given, expected = vectors("sampling_filters")
    logits = given.logits.expand(5000, 6)
    uniforms = torch.linspace(0, 1, 5001)[:-1]

    def drawn(**filters: Any) -> dict[int, float]:
        """Every word that can come out, and the log-probability that comes with it."""
        tokens, logprobs = kernels.sample(logits, uniforms, **filters)
        return dict(zip(tokens.tolist(), logprobs.tolist(), strict=True))

    tau = {"temperature": given.temperature}
    cases = {
        "logprob_T1": {},
        "logprob_tau": tau,
        "logprob_tau_topk": {**tau, "top_k": given.top_k},
        "logprob_tau_topp": {**tau, "top_p": given.top_p},
    }
    found = {name: drawn(**filters) for name, filters in cases.items()}
    found["logprob_T1"] |= drawn(temperature=0)  # and what greedy decoding says about its word
    for name, words in found.items():
        wanted = {word: logprob for word, logprob in enumerate(getattr(expected, name).tolist()) if not isnan(logprob)}
        assert sorted(words) == sorted(wanted)
        vectors.close([words[word] for word in sorted(words)], [wanted[word] for word in sorted(words)])
    vectors.close(sorted(found["logprob_tau_topk"]), expected.keep_topk)
    vectors.close(sorted(found["logprob_tau_topp"]), expected.keep_topp)
    assert drawn(**tau, top_k=given.top_k, top_p=given.top_p).keys() == found["logprob_tau_topp"].keys()

    # the ratios that appear when the update forgets a filter, or the temperature
    at_tau = kernels.selective_log_softmax(given.logits[None], torch.arange(6)[None], given.temperature)[0]
    at_one = kernels.selective_log_softmax(given.logits[None], torch.arange(6)[None])[0]
    vectors.close((at_tau[0] - found["logprob_tau_topk"][0]).exp(), expected.kept_mass_topk)
    vectors.close((at_tau[0] - found["logprob_tau_topp"][0]).exp(), expected.kept_mass_topp)
    vectors.close((at_tau[0] - found["logprob_tau_topp"][0]).exp(), expected.spurious_ratio_topp)
    vectors.close((at_one - at_tau).exp(), expected.spurious_ratio_temperature)


def test_ppo_end_to_end(vectors: Vectors) -> None:
    given, expected = vectors("ppo_end_to_end")
    mask, attended = given.response_mask.bool(), given.attention_mask.bool()
    width = given.prompt_width
    rows = zip(given.input_ids.long(), attended, mask, strict=True)
    packed = pack([rollout(ids[:width][a[:width]].tolist(), ids[width:][m].tolist()) for ids, a, m in rows])
    logits, values = given.logits_new.requires_grad_(), given.values_new.requires_grad_()
    words, tau = identity(logits), {"temperature": given.temperature}

    old, ref = (
        kernels.linear_logprob(z[attended][packed.rows], words, packed.targets, **tau)
        for z in (given.logits_old, given.logits_ref)
    )
    vectors.close(old, expected.old_logprobs[mask])
    vectors.close(ref, expected.ref_logprobs[mask])
    vectors.close(losses.sequence_kl(old, ref, packed.cu_rows).mean(), expected.mean_kl_k1)

    old_values = given.values_old[attended][packed.rows]
    rewards = losses.token_rewards(kernels.kl_estimate(old, ref), given.scores, packed.cu_rows, given.kl_coef)
    vectors.close(rewards, expected.rewards[mask])
    advantages, returns = kernels.gae(rewards, old_values, gamma=given.gamma, lam=given.lam, cu_seqlens=packed.cu_rows)
    vectors.close(advantages, expected.advantages_raw[mask])
    vectors.close(returns, expected.returns[mask])
    advantages = kernels.whiten(advantages)
    vectors.close(advantages, expected.advantages_whitened[mask])

    hidden, new_values = logits[attended][packed.rows], values[attended][packed.rows]
    new, entropy = kernels.linear_cross_entropy(hidden, words, packed.targets, given.temperature)
    clips = {"clip_low": given.clip, "clip_high": given.clip, "entropy_coef": given.ent_coef}
    value = {"value_clip": given.clip_value, "value_coef": given.vf_coef}
    loss, stats = kernels.ppo_loss(
        new, old, advantages, new_values, old_values, returns, entropy=entropy, **clips, **value
    )
    vectors.close(stats["pg_loss"], expected.policy_loss)
    vectors.close(stats["vf_loss"], expected.value_loss)
    vectors.close(stats["entropy"], expected.entropy)
    vectors.close(loss, expected.loss)
    by_logits, by_values = torch.autograd.grad(loss, (logits, values), retain_graph=True)
    vectors.close(by_logits, expected.grad_logits)
    vectors.close(by_values, expected.grad_values)

    # the same policy part in one pass
    fused, stats = kernels.linear_ppo_loss(hidden, words, packed.targets, old, advantages, **clips, **tau)
    vectors.close(fused + given.vf_coef * expected.value_loss, expected.loss)
    vectors.close(stats["pg_loss"], expected.policy_loss)
    vectors.close(torch.autograd.grad(fused, logits)[0], expected.grad_logits)
