from __future__ import annotations
from tests.pair import Job
JOBS = [
    Job("sft", "sft"),
    Job("pretrain", "pretrain", {"batch_size": 3}),
    Job("reward", "reward"),
    Job("dpo", "dpo"),
    Job("kto", "dpo", {"loss": "kto", "data": "{unpaired}", "eval_data": "{labelled}", "precompute_reference": True}),
    Job("ppo", "ppo", {"reward_model": "{reward_model}", "ptx_data": "{documents}", "ptx_batch_size": 5, "kl_target_nats": 0.01, "kl_horizon": 20, "normalise_scores": True, "tokens_per_micro": 20}),
    Job("few", "ppo", {"rollouts_per_step": 3, "minibatches": 3, "ptx_data": "{documents}", "ptx_batch_size": 1}),
    Job("stop", "ppo", {"kl_stop": 0.01, "old_logprobs": "recompute", "importance_cap": 1.1}),
    Job("grpo", "grpo", {"beta": 0.1, "resample": 1, "process_function": "{rewards}:progress"}),
    Job("generate", "ppo", {}, None, "generate 1"),
    Job("write", "sft", {}, None, "write 0"),
]
