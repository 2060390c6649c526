"""A PPO step in plain PyTorch, before and after: the same loss and the same gradients, without the logits.

    python examples/own_loop.py

The model is tiny and random, so that it runs anywhere in seconds. `before` is the code that most trainers have;
`after` replaces its four lines about log-probabilities and the loss by one call, and its loop over time by another.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from twinhead.kernels import gae, linear_ppo_loss, whiten

BATCH, PROMPT, RESPONSE, WORDS = 4, 8, 24, 1000
GAMMA, LAM, CLIP = 1.0, 0.95, 0.2


def before(model: LlamaForCausalLM, tokens: Tensor, old_logprobs: Tensor, rewards: Tensor, values: Tensor) -> Tensor:
    """The loss of the responses (B, T), with logits (B, T, V) and a loop over T."""
    advantages, last, following = torch.zeros_like(rewards), 0.0, 0.0
    for t in reversed(range(RESPONSE)):
        last = rewards[:, t] + GAMMA * following - values[:, t] + GAMMA * LAM * last
        following = values[:, t]
        advantages[:, t] = last
    advantages = (advantages - advantages.mean()) / torch.sqrt(advantages.var(correction=0) + 1e-8)

    logits = model(tokens).logits[:, PROMPT - 1 : -1]
    logprobs = logits.log_softmax(-1).gather(-1, tokens[:, PROMPT:, None]).squeeze(-1)
    ratio = (logprobs - old_logprobs).exp()
    return torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - CLIP, 1 + CLIP)).mean()


def after(model: LlamaForCausalLM, tokens: Tensor, old_logprobs: Tensor, rewards: Tensor, values: Tensor) -> Tensor:
    """The same."""
    advantages, _ = gae(rewards, values, gamma=GAMMA, lam=LAM)

    hidden = model.model(tokens).last_hidden_state[:, PROMPT - 1 : -1]
    loss, _ = linear_ppo_loss(
        hidden,
        model.lm_head.weight,
        tokens[:, PROMPT:],
        old_logprobs,
        whiten(advantages),
        clip_low=CLIP,
        clip_high=CLIP,
    )
    return loss


def main() -> None:
    """Both losses, and the largest difference of any gradient."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=WORDS, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    model = LlamaForCausalLM(config)
    tokens = torch.randint(WORDS, (BATCH, PROMPT + RESPONSE))
    rewards, values, noise = torch.randn(3, BATCH, RESPONSE).unbind()
    with torch.no_grad():
        logp = model(tokens).logits[:, PROMPT - 1 : -1].log_softmax(-1)
    old_logprobs = logp.gather(-1, tokens[:, PROMPT:, None]).squeeze(-1) + 0.3 * noise

    gradients = []
    for step in (before, after):
        loss = step(model, tokens, old_logprobs, rewards, values)
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
        print(f"{step.__name__:6}  loss {loss.item():.6f}")
    apart = max((a - b).abs().max().item() for a, b in zip(*gradients, strict=True))
    print(f"gradients differ by at most {apart:.0e}")


if __name__ == "__main__":
    main()
