"""The arms of the comparison on task A: how each spends the same budget, and what became of its answers.

Every arm starts from one SFT checkpoint per seed and learns from one of two reward models (or from the rankings that
they were trained on): `reward` has seen 6000 rankings and can be trusted, `weak` 300 noisy ones and can be fooled.
What an arm came to is kept in its seed's folder, so a measurement that was stopped goes on where it was.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from benchmarks import reviews
from benchmarks.quality import HEALTHY, WEAK, Labels, Reviews, accuracy
from twinhead.engine import checkpoint, data, dpo, grpo, labeler, ppo, refresh, reward, rows
from twinhead.engine.best_of import best_of
from twinhead.engine.checkpoint import write_file
from twinhead.engine.diversity import group_diversity
from twinhead.engine.evaluate import Contest, distinct, win_rate
from twinhead.engine.generate import generate
from twinhead.engine.policy import Policy, RewardModel
from twinhead.engine.run import Run
from twinhead.engine.sampling import Sampling
from twinhead.engine.scorers import RewardFunction, Scorer, score_with

Point = dict[str, float]  # step, answers, labels, kl, gold, proxy, win_rate, eos_rate, distinct, length, ...
MEASURED = ("win_rate", "gold", "kl", "distinct", "eos_rate", "length")
USUAL_LENGTH = 14  # tokens of an answer of the SFT model, about
TRUSTED, HACKABLE = "reward", "weak"


@dataclass(frozen=True)
class Budget:
    """What an arm may spend. The second half is for rehearsals on a smaller task."""

    steps: int = 20  # of 256 generated and scored answers and 16 optimizer steps (PPO, GRPO)
    answers: int = 256
    every: int = 2  # steps between two contests
    prompts: int = 256  # of a contest
    learning_rate: float = 3e-4
    best_of: tuple[int, ...] = (1, 4, 16, 64)
    passes: tuple[tuple[str, int], ...] = ((TRUSTED, 1), (HACKABLE, 12))  # of DPO over the rankings of a reward model
    rounds: int = 4  # of refresh
    demonstrations: int = 400 * 128
    labels: tuple[tuple[str, Labels], ...] = ((TRUSTED, HEALTHY), (HACKABLE, WEAK))


class Trial:
    """One seed of the comparison: its SFT checkpoint, its reward models, and what its arms have in common."""

    def __init__(self, folder: Path, seed: int, budget: Budget) -> None:
        self.seed, self.budget = seed, budget
        self.task = Reviews(folder, seed, budget.demonstrations)

    def measured(self, name: str, arm: Arm) -> list[Point]:
        """The arm's points: from its file or, once, from training it."""
        file = Path(self.task.path("arms")) / f"{name}.json"
        if not file.is_file():
            file.parent.mkdir(exist_ok=True)
            write_file(file, json.dumps(arm.train(self, name), indent=1) + "\n")
        points: list[Point] = json.loads(file.read_text(encoding="utf-8"))
        return points

    @cached_property
    def sft(self) -> str:
        """The checkpoint that all arms start from."""
        return self._once("sft", self.task.sft)

    @cached_property
    def start(self) -> Policy:
        """The policy in it."""
        return Policy.from_pretrained(self.sft, critic="none")

    def judge(self, name: str) -> str:
        """A reward model's folder; weak_2 and weak_3 differ from weak in their first weights and the order of rows."""
        labels = dict(self.budget.labels)
        weak = {"width": 32, "layers": 1, "heads": 2}
        trunks: dict[str, Callable[[], str]] = {
            TRUSTED: lambda: self.sft,
            HACKABLE: lambda: self.task.empty("empty_weak", **weak),
            "weak_2": lambda: self.task.empty("empty_weak_2", **weak, draw=1),
            "weak_3": lambda: self.task.empty("empty_weak_3", **weak, draw=2),
            "larger": lambda: self.task.empty("empty_larger", width=64, layers=2, heads=4, draw=1),
            "grown": lambda: self.sft,
        }
        rankings = TRUSTED if name == TRUSTED else HACKABLE
        draw = int(name[-1]) - 1 if name[-1].isdigit() else 0
        train = partial(self.task.reward_model, name, labels[rankings], rankings=rankings, draw=draw)
        if name != HACKABLE and rankings == HACKABLE:
            self.judge(HACKABLE)  # whose rankings they share
        assert self.sft, "rankings are of its answers"
        return self._once(name, lambda: train(model=trunks[name]()))

    def accuracies(self) -> dict[str, float]:
        """The share of held-out pairs that each reward model orders as the labeler did."""
        names = (TRUSTED, HACKABLE, "weak_2", "weak_3", "larger", "grown")
        return {name: accuracy(self.task, name) for name in names if Path(self.task.path(name)).is_dir()}

    def answer(self, name: str) -> str:
        """What the policy that stands in the folder of that name says to the first prompt of the contests."""
        policy = Policy.from_pretrained(self.task.path(name), critic="none")
        first = self.asked[0]
        (rollout,) = generate(policy, [first.tokens], self.task.sampling)
        return f"{first.text} {self.task.text.decode(rollout.response)}"

    def contest(self, judge: str) -> Contest:
        """Answers to held-out prompts against those of the SFT model; `judge` is the proxy whose score is told."""
        proxy = RewardModel.from_pretrained(self.judge(judge))
        return Contest(self.start, self.task.text, self.asked, reviews.judge, self.task.sampling, proxy)

    @cached_property
    def asked(self) -> Sequence[data.Prompt]:
        """The prompts of every contest."""
        found = reviews.prompts(self.budget.prompts, self.seed + 7)
        return data.prompts(found, self.task.text, reviews.PROMPT_TOKENS)

    def asked_for(self, name: str) -> dict[str, Any]:
        """Options that every arm's training shares."""
        return {
            "model": self.sft, "output_dir": self.task.path(name), "seed": self.seed,
            "learning_rate": self.budget.learning_rate,
        }  # fmt: skip

    def online(self, name: str) -> dict[str, Any]:
        """And those that generate."""
        return self.asked_for(name) | {
            "prompts": self.task.path("prompts.jsonl"), "steps": self.budget.steps,
            "max_prompt_tokens": reviews.PROMPT_TOKENS, "max_new_tokens": reviews.COMPLETION_TOKENS,
            "missing_eos_penalty": 1.0, "eval_every": self.budget.every, "save_every": self.budget.every,
            "epochs": 4, "minibatches": 4,
        }  # fmt: skip

    def _once(self, name: str, train: Callable[[], Run]) -> str:
        """A finished stage is not opened again: its options may have been those of an older version."""
        folder = Path(self.task.path(name))
        return str(folder if (folder / "config.json").is_file() else train().dir)


@dataclass(frozen=True)
class Arm:
    """A row of the comparison."""

    title: str
    train: Callable[[Trial, str], list[Point]]  # of a seed, into the folder of that name


def with_ppo(
    trial: Trial, name: str, judge: str, functions: Sequence[RewardFunction] = (), kl_coef: float = 0.0,
    against: Sequence[str] = (), **options: Any,
) -> list[Point]:  # fmt: skip
    """PPO against a reward model, or an ensemble (`against`); `judge` is the proxy whose score is told."""
    contest = trial.contest(judge)
    models = {"reward_models": tuple(map(trial.judge, against))} if against else {"reward_model": trial.judge(judge)}
    config = ppo.Config(
        **trial.online(name) | models | options, kl_coef=kl_coef, rollouts_per_step=trial.budget.answers
    )
    return points(ppo.train(config, functions, contest), contest, trial)


def with_grpo(trial: Trial, name: str, judge: str, **options: Any) -> list[Point]:
    """GRPO: eight answers to each prompt, and otherwise as many answers and optimizer steps as PPO."""
    contest, group = trial.contest(judge), min(8, trial.budget.answers // 2)
    config = grpo.Config(
        **trial.online(name) | {"prompts_per_step": trial.budget.answers // group, "group_size": group} | options,
        reward_model=trial.judge(judge), adam_eps=1e-5,
    )  # fmt: skip
    return points(grpo.train(config, evaluate=contest), contest, trial)


def with_dpo(trial: Trial, name: str, judge: str, **options: Any) -> list[Point]:
    """DPO on the rankings that the reward model was trained on; contests are held for its checkpoints."""
    contest, size = trial.contest(judge), 16
    rankings, passes = f"{judge}.jsonl", dict(trial.budget.passes)[judge]
    total = passes * -(-len(rows.rows(trial.task.path(rankings))) // size)
    config = dpo.Config(
        **trial.asked_for(name) | {"learning_rate": 2e-4} | options, data=trial.task.path(rankings), epochs=passes,
        batch_size=size, max_length=32, save_every=max(1, total // 10), keep_checkpoints=12,
    )  # fmt: skip
    found = checkpoint.found(dpo.train(config).dir)
    told = [(step, contest(Policy.from_pretrained(found[step], critic="none"))) for step in sorted(found)]
    return [_start(contest, trial), *({"step": step, "updates": step, **_told(said)} for step, said in told)]


def with_best_of(trial: Trial, name: str, judge: str) -> list[Point]:
    """The best of n answers of the SFT model; KL is log n - (n - 1) / n, and not measured."""
    contest = trial.contest(judge)
    scorer = Scorer(trial.task.text, contest.reward_model)
    found = []
    for n in trial.budget.best_of:
        sampling = Sampling(max_new_tokens=reviews.COMPLETION_TOKENS, seed=trial.seed)
        best = best_of(trial.start, trial.asked, scorer, n, sampling)
        answers = [trial.task.text.decode(r.response) for r in best.rollouts]
        gold = score_with(reviews.judge, best.rollouts, answers, trial.asked)
        found.append(
            {
                "step": n, "answers": n, "kl": best.kl, "gold": gold.double().mean().item(),
                "proxy": best.scores.amax(1).double().mean().item(), "win_rate": win_rate(gold, contest.theirs).rate,
                "distinct": distinct(best.rollouts),
                "eos_rate": sum(r.finished for r in best.rollouts) / len(best.rollouts),
                "length": sum(len(r.response) for r in best.rollouts) / len(best.rollouts),
            }
        )  # fmt: skip
    return found


def with_refresh(trial: Trial, name: str) -> list[Point]:
    """As many labels as the hackable reward model had: a third at first, the others for what the policy says later."""
    contest, rounds = trial.contest(HACKABLE), trial.budget.rounds
    bought = rows.rows(trial.task.path(f"{HACKABLE}.jsonl"))
    first, each = len(bought) // 3, (len(bought) - len(bought) // 3) // rounds
    labels = dict(trial.budget.labels)[HACKABLE]

    def label(policy: Policy, number: int) -> list[dict[str, Any]]:
        asked = data.prompts(reviews.prompts(each, trial.seed + 50 + number), trial.task.text, reviews.PROMPT_TOKENS)
        sampling = Sampling(max_new_tokens=reviews.COMPLETION_TOKENS, seed=trial.seed + 200 + number)
        return labeler.compare(
            policy, trial.task.text, asked, reviews.judge, sampling, num_responses=4, noise=labels.noise
        )

    steps = trial.budget.steps // rounds
    asked = trial.online(name) | {"steps": steps, "kl_coef": 0.0, "rollouts_per_step": trial.budget.answers}
    done = refresh.refresh(
        reward.Config(
            model=trial.task.path("empty_weak"), data=bought[:first], seed=trial.seed, epochs=labels.epochs,
            demonstrations=trial.task.path("demonstrations.jsonl"), batch_size=16, max_length=32, learning_rate=1e-3,
            schedule="cosine", output_dir=trial.task.path(name),
        ),
        ppo.Config(**asked | {"eval_every": 0}), label, rounds, trial.task.path(name),
    )  # fmt: skip
    told = [contest(Policy.from_pretrained(turn.policy, critic="none")) for turn in done]
    later = [
        {"step": steps * k, "answers": steps * k * trial.budget.answers, "labels": first + each * k, **_told(said)}
        for k, said in enumerate(told, 1)
    ]
    return [_start(contest, trial), *later]


def usual_length(*, completion_ids: Sequence[Sequence[int]], **columns: Any) -> list[float]:
    """A tenth off for every token that an answer is longer or shorter than the SFT model's usually are."""
    return [-0.1 * abs(len(ids) - USUAL_LENGTH) for ids in completion_ids]


def points(run: Run, contest: Contest, trial: Trial) -> list[Point]:
    """What was measured along a run, from the SFT model on."""
    later = []
    variances: list[float] = []  # explained, of every step since the last contest
    for line in run.metrics:
        if (seen := line.get("value/explained_variance")) is not None:
            variances.append(seen)
        if "eval/gold" not in line:
            continue
        step = line["step"]
        said = {key.removeprefix("eval/"): value for key, value in line.items() if key.startswith("eval/")}
        point = {"step": step, "answers": step * trial.budget.answers, "updates": step * 16, **_told(said)}
        if variances:
            point |= {"explained_variance": sum(variances) / len(variances)}
        later.append(point)
        variances = []
    return [_start(contest, trial), *later]


def _start(contest: Contest, trial: Trial) -> Point:
    return {"step": 0, "answers": 0, "updates": 0, **_told(contest(trial.start))}


def _told(said: Mapping[str, float]) -> Point:
    return {"proxy": said["reward"], **{name: said[name] for name in MEASURED}}


METHODS = {
    "ppo": Arm("PPO, kl_coef 0.05", partial(with_ppo, judge=TRUSTED, kl_coef=0.05)),
    "grpo": Arm("GRPO, beta 0.05", partial(with_grpo, judge=TRUSTED, beta=0.05)),
    "dpo": Arm("DPO, beta 0.1", partial(with_dpo, judge=TRUSTED)),
    "best_of": Arm("best of n", partial(with_best_of, judge=TRUSTED)),
}
UNBOUND = {
    "weak_ppo": Arm("PPO", partial(with_ppo, judge=HACKABLE)),
    "weak_grpo": Arm("GRPO", partial(with_grpo, judge=HACKABLE)),
    "weak_dpo": Arm("DPO, beta 0.1", partial(with_dpo, judge=HACKABLE)),
    "weak_best_of": Arm("best of n", partial(with_best_of, judge=HACKABLE)),
}
SWEEP = {"weak_ppo": Arm("0", UNBOUND["weak_ppo"].train)} | {
    f"weak_kl_{coef}": Arm(f"{coef:g}", partial(with_ppo, judge=HACKABLE, kl_coef=coef))
    for coef in (0.02, 0.05, 0.1, 0.2)
}
MITIGATIONS = {
    "weak_ppo": Arm("none", UNBOUND["weak_ppo"].train),
    "weak_kl_0.05": Arm("KL penalty, 0.05", SWEEP["weak_kl_0.05"].train),
    "weak_ensemble": Arm(
        "ensemble: lowest of three",
        partial(with_ppo, judge=HACKABLE, against=("weak", "weak_2", "weak_3"), ensemble="min"),
    ),
    "weak_larger": Arm("larger, random start", partial(with_ppo, judge="larger")),
    "weak_grown": Arm("larger, from SFT", partial(with_ppo, judge="grown")),
    "weak_refresh": Arm("refresh, equal labels", with_refresh),
    "weak_length": Arm("length term", partial(with_ppo, judge=HACKABLE, functions=(usual_length,))),
    "weak_diversity": Arm(
        "diversity term, weight 5",
        partial(with_ppo, judge=HACKABLE, functions=(group_diversity,), reward_weights=(1.0, 5.0)),
    ),
}  # fmt: skip
CRITICS = {
    "ppo": Arm("shared", METHODS["ppo"].train),
    "critic_detached": Arm("detached", partial(with_ppo, judge=TRUSTED, kl_coef=0.05, critic="detached")),
    "critic_branch": Arm(
        "branch (1 layer)", partial(with_ppo, judge=TRUSTED, kl_coef=0.05, critic="branch", branch_layers=1)
    ),
    "critic_separate": Arm("separate (SFT)", partial(with_ppo, judge=TRUSTED, kl_coef=0.05, critic="separate")),
    "critic_separate_rm": Arm(
        "separate (RM)",
        partial(with_ppo, judge=TRUSTED, kl_coef=0.05, critic="separate", value_init="reward_model"),
    ),
}
ARMS: dict[str, Arm] = METHODS | UNBOUND | SWEEP | MITIGATIONS | CRITICS  # in the order of measuring
