"""What others have published of RLHF's cost, and how far the model of ``rlhf`` is from it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from unlearn_ds.cost.rlhf import ACTORS, SMALL_CRITIC, Cluster, Samples, before_ppo, matrices, ppo, seconds


class DeepSpeedChat(NamedTuple):
    """One size of DeepSpeed-Chat's step 3 on A100-80G: TFLOP/s of a device while it generates, while it trains, and of
    both ("effective"), on so many devices; and the hours of the benchmark where they stand for the same devices."""

    model: str
    billions: float
    devices: int
    generation: float
    training: float
    effective: float
    hours: float | None


# DeepSpeed, blogs/deepspeed-chat (2023): figure 6, and tables 1 and 2 of hours. 30B and 66B have hours only for other
# numbers of devices (8 and 64).
# fmt: off
DEEPSPEED_CHAT: Sequence[DeepSpeedChat] = (
    DeepSpeedChat("OPT-1.3B",   1.3,  8, 23.8,  62.9, 43.4,  1.4),
    DeepSpeedChat("OPT-6.7B",   6.7,  8, 32.9, 100.7, 71.2,  4.1),
    DeepSpeedChat("OPT-13B",   13.0,  8, 33.0,  97.3, 67.1,  9.0),
    DeepSpeedChat("OPT-30B",   30.0, 32, 48.2, 103.6, 82.0, None),
    DeepSpeedChat("OPT-66B",   66.0, 16, 29.3, 110.4, 67.8, None),
    DeepSpeedChat("OPT-175B", 175.0, 64, 25.4,  74.4, 52.8, 20.0),
)
# fmt: on


class OpenRlhf(NamedTuple):
    """Seconds for 1024 prompts on A800-80G, four models of one size, prompts and answers of up to 1024 tokens."""

    model: str
    billions: float
    devices: int
    deepspeed_chat: float
    open_rlhf: float


# OpenRLHF's README from v0.3.0 on ("optimized DSChat" against OpenRLHF), which calls it outdated by now.
OPEN_RLHF: Sequence[OpenRlhf] = (
    OpenRlhf("Llama-2-7B", 6.7, 16, 855.09, 471.11),
    OpenRlhf("Llama-2-13B", 13.0, 32, 1528.93, 608.93),
    OpenRlhf("CodeLlama-34B", 34.0, 32, 3634.98, 1526.4),
    OpenRlhf("Llama-2-70B", 69.0, 32, 10407.0, 4488.53),
)

STAGES_13B = {"sft": 2.5, "reward model": 0.25, "ppo": 10.8}
"""Hours of the three stages of OPT-13B on 8 A100-40G (DeepSpeed-Chat)."""


class Residual(NamedTuple):
    """A published figure beside what the model gives."""

    what: str
    published: float
    modelled: float

    @property
    def error(self) -> float:
        return self.modelled / self.published - 1


def accounting() -> list[Residual]:
    """Effective TFLOP/s of a device from the published hours: 10 N D / (hours x devices).

    No constant of ours is in it: it shows that FLOPs and tokens are counted as DeepSpeed-Chat counts them, generation
    and training of the actor with recomputation.
    """
    return [
        Residual(f"{row.model} on {row.devices}, effective TFLOP/s from its hours", row.effective,
                 10e-3 * row.billions * Samples().tokens / (row.hours * 3600 * row.devices))
        for row in DEEPSPEED_CHAT if row.hours is not None
    ]  # fmt: skip


def phases() -> list[Residual]:
    """TFLOP/s of a device in each phase of step 3, from sizes, data sheets and three constants (see ``rlhf``).

    Counted as their meter counts: 2 N D over the time of generation alone, 8 N D over that of training actor and
    critic, and both over the two together; it calls that "an approximation", without the reward model's forward.
    """
    found, critic = [], matrices(ACTORS[SMALL_CRITIC].size)
    for row in DEEPSPEED_CHAT:
        actor, cluster, samples = row.billions * 1e9, Cluster("A100-80G", row.devices), Samples()
        work = ppo(actor, critic, samples)
        took = seconds(ACTORS[row.model], work, samples, cluster, actor, row.billions)
        generate, train = took["generation"], took["training"]
        for what, published, flops, time in (
            ("generation", row.generation, 2 * actor * samples.tokens, generate),
            ("training", row.training, 8 * actor * samples.tokens, train),
            ("effective", row.effective, 10 * actor * samples.tokens, generate + train),
        ):
            name = f"{row.model} on {row.devices}, {what} TFLOP/s"
            found.append(Residual(name, published, flops / time / row.devices / 1e12))
    return found


def stages() -> list[Residual]:
    """Shares of the three stages of OPT-13B in its hours."""
    samples, cluster, actor = Samples(), Cluster("A100-80G", 8), 13e9
    critic = matrices(ACTORS[SMALL_CRITIC].size)
    work = {**before_ppo(actor, critic, samples), **ppo(actor, critic, samples)}
    took = seconds(ACTORS["OPT-13B"], work, samples, cluster, actor, 13.0)
    modelled = {"sft": took["sft"], "reward model": took["reward model"]}
    modelled["ppo"] = sum(took.values()) - sum(modelled.values())
    published, whole = sum(STAGES_13B.values()), sum(took.values())
    return [
        Residual(f"OPT-13B on 8, share of {name} in the hours", hours / published, modelled[name] / whole)
        for name, hours in STAGES_13B.items()
    ]


def open_rlhf() -> list[Residual]:
    """Seconds for 1024 prompts of OpenRLHF, all answers taken as long as they may be.

    The model is a floor here: those runs offload their optimizers to the host, and spread the models over devices that
    wait for each other.
    """
    found = []
    for row in OPEN_RLHF:
        samples = Samples(answers=1024, prompt=1024, answer=1024)
        size = row.billions * 1e9
        took = seconds(
            ACTORS[row.model], ppo(size, size, samples), samples, Cluster("A800", row.devices),
            2 * size, row.billions,
        )  # fmt: skip
        found.append(Residual(f"{row.model} on {row.devices}, seconds", row.open_rlhf, sum(took.values())))
    return found
