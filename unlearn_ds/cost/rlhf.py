"""What RLHF costs: FLOPs, seconds and GPU-hours of SFT, reward model and PPO, for any sizes. Arithmetic only.

N: elements of a model's matrices, D: tokens of prompts and answers together. A product with a weight is 2 FLOPs a token
forward and 4 backward, and 2 more where activations are recomputed; attention scores are left out, in numerator and
denominator alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from unlearn_ds.cost import devices, shapes
from unlearn_ds.cost.flops import ModelSize
from unlearn_ds.cost.shapes import Shape

COMPUTE = 0.38
"""Share of the specified peak that wide matrices reach in training and scoring, recomputation counted as work."""

HALF_WIDTH = 1000
"""Hidden size at which half of that is left: products grow with its square, everything between them with its first
power. With ``COMPUTE`` one line through six training figures of DeepSpeed-Chat (1.3B to 66B: within 10 %)."""

DECODING = 0.25
"""Share of the memory bandwidth at which tokens are generated: one number for six generation figures of DeepSpeed-Chat.

These three constants are all that was fitted, and ``published`` shows what is left."""

MEMORY_BYTES = 80e9
"""Of one device of the cluster that is modelled."""


class Actor(NamedTuple):
    """The model that RLHF trains. kv_width: of the keys of one layer, and of its values."""

    size: ModelSize
    kv_width: int


def _actor(shape: Shape) -> Actor:
    return Actor(shape.size(), shape.num_kv_heads * shape.head_dim)


ACTORS: Mapping[str, Actor] = {
    **{f"OPT-{name}": _actor(shapes.opt_of(*numbers)) for name, numbers in {
        "350M": (1024, 24, 16), "1.3B": (2048, 24, 32), "6.7B": (4096, 32, 32), "13B": (5120, 40, 40),
        "30B": (7168, 48, 56), "66B": (9216, 64, 72), "175B": (12288, 96, 96),
    }.items()},
    **{name: _actor(shapes.llama_of(*numbers)) for name, numbers in {
        "Llama-2-7B": (4096, 32, 32, 32, 11008, 32000), "Llama-2-13B": (5120, 40, 40, 40, 13824, 32000),
        "CodeLlama-34B": (8192, 48, 64, 8, 22016, 32000), "Llama-2-70B": (8192, 80, 64, 8, 28672, 32000),
    }.items()},
}  # fmt: skip
"""From the models' configurations on the hub: hidden size, layers, heads; of Llama also key heads, MLP, vocabulary."""
SMALL_CRITIC = "OPT-350M"
"""DeepSpeed-Chat's reward model and critic at every size of the actor; for a smaller actor they are of its size."""


class Samples(NamedTuple):
    """How much RLHF sees: DeepSpeed-Chat's benchmark by default (BenckmarkSetting.md; data split 2 : 4 : 4 over the
    stages, one epoch each).

    answers: that PPO generates and trains on once. batch: of them at a time. sft, pairs: samples of the two stages
    before. prompt, answer: tokens; samples of the other stages are as long as both. recompute: activations.
    """

    answers: int = 264_292
    prompt: int = 256
    answer: int = 256
    batch: int = 1024
    sft: int = 132_146
    pairs: int = 264_292
    recompute: bool = True

    @property
    def tokens(self) -> int:
        """D of PPO."""
        return self.answers * (self.prompt + self.answer)


class Cluster(NamedTuple):
    """Devices by their name in ``devices.MEMORY_TB_PER_SECOND``, and how many."""

    device: str = "A100-80G"
    count: int = 8

    @property
    def flops(self) -> float:
        """Specified peak of all of them; ``ValueError`` for a device whose speed is not known."""
        peak = devices.peak_flops(self.device)
        if peak is None or self.device not in devices.MEMORY_TB_PER_SECOND:
            known = ", ".join(devices.MEMORY_TB_PER_SECOND)
            raise ValueError(f"no peak and bandwidth are known of '{self.device}'; known are {known}")
        return peak * self.count

    @property
    def bandwidth(self) -> float:
        """Bytes a second of one device's memory."""
        return devices.MEMORY_TB_PER_SECOND[self.device] * 1e12


Work = Mapping[str, float]
"""Kind of work ("generation", "scoring", "training") -> FLOPs."""


def matrices(size: ModelSize) -> float:
    """N: what RLHF multiplies every token with; its losses take logits of prompts too."""
    return float(size.body + size.head)


def ppo(actor: float, critic: float, samples: Samples, *, has_critic: bool = True) -> Work:
    """FLOPs of PPO over all samples. critic: N of the critic and of the reward model.

    The actor generates (prompts are read, then token by token), and gives the log-probabilities that PPO compares with;
    reference and reward model look at each answer once, and so does the critic, where there is one.
    """
    train = 8.0 if samples.recompute else 6.0
    scored = 2 * 2.0 * actor + 2.0 * critic * (2 if has_critic else 1)
    return {
        "generation": 2.0 * actor * samples.tokens,
        "scoring": scored * samples.tokens,
        "training": train * (actor + (critic if has_critic else 0.0)) * samples.tokens,
    }


def before_ppo(actor: float, critic: float, samples: Samples) -> Work:
    """FLOPs of the two stages before: fine-tuning the actor, and a reward model on pairs of answers."""
    train, length = (8.0 if samples.recompute else 6.0), samples.prompt + samples.answer
    return {"sft": train * actor * samples.sft * length, "reward model": train * critic * 2 * samples.pairs * length}


def _critic(size: ModelSize) -> float:
    return min(matrices(size), matrices(ACTORS[SMALL_CRITIC].size))


def _step3(size: ModelSize, samples: Samples) -> Work:
    return ppo(matrices(size), _critic(size), samples)


def _three_stages(size: ModelSize, samples: Samples) -> Work:
    before = before_ppo(matrices(size), _critic(size), samples)
    return {**before, **_step3(size, samples)}


def _four_equal(size: ModelSize, samples: Samples) -> Work:
    return ppo(matrices(size), matrices(size), samples)


def _without_critic(size: ModelSize, samples: Samples) -> Work:
    return ppo(matrices(size), _critic(size), samples, has_critic=False)


DENOMINATORS: Mapping[str, tuple[str, Callable[[ModelSize, Samples], Work]]] = {
    "step3": ("PPO alone, reward model and critic of at most 350M (DeepSpeed-Chat's step 3)", _step3),
    "three_stages": ("SFT, reward model and that PPO", _three_stages),
    "four_equal": ("PPO alone, reward model and critic of the actor's size (OpenRLHF, safe-rlhf)", _four_equal),
    "grpo": ("no critic, reward model of at most 350M, as many answers in all", _without_critic),
}
"""Name -> (what it is, FLOPs by kind of work). What unlearning is compared with has to be said with every ratio."""


def share_of_peak(hidden: int) -> float:
    """Share of the specified peak that a model of this width is trained and run at."""
    return COMPUTE * hidden / (hidden + HALF_WIDTH)


class Decoding(NamedTuple):
    """How answers are generated: devices that share one copy of the weights, sequences of each device at a time, and
    seconds of the whole batch beside reading the prompts."""

    devices_a_copy: int
    batch: float
    seconds: float


def decoding(
    actor: Actor, samples: Samples, cluster: Cluster, trained: float, billions: float | None = None
) -> Decoding:
    """Generating one batch of answers token by token, which the memory bounds: every token reads all weights and the
    keys and values of all sequences so far.

    seconds a token = max(2 N b / (share F), (2 N / devices + cached) / (DECODING bandwidth)), for b sequences a
    device, in 16 bits. What does not fit into memory beside the training states waits for the next round. Those are 16
    bytes for each ``trained`` parameter over all devices; where they would take more than half of a device, the
    optimizer is offloaded and 4 are left. billions: a nominal N.
    """
    size = matrices(actor.size) if billions is None else billions * 1e9
    states = 16 * trained / cluster.count
    if states > MEMORY_BYTES / 2:
        states = 4 * trained / cluster.count
    fits = [n for n in (1, 2, 4, 8) if 2 * size / n + states <= 0.75 * MEMORY_BYTES]
    share = fits[0] if fits else 8
    weights = 2 * size / share
    cached = 2 * 2 * actor.size.num_layers * actor.kv_width  # bytes a token
    room = (0.9 * MEMORY_BYTES - states - weights) // (cached * (samples.prompt + samples.answer))
    wanted = samples.batch / cluster.count
    batch = min(wanted, max(1.0, room))
    context = samples.prompt + samples.answer / 2
    a_token = max(
        2 * size * batch / (share_of_peak(actor.size.hidden_size) * cluster.flops / cluster.count),
        (weights + cached * context * batch) / (DECODING * cluster.bandwidth),
    )
    return Decoding(share, batch, a_token * samples.answer * wanted / batch)


def seconds(
    actor: Actor, work: Work, samples: Samples, cluster: Cluster, trained: float, billions: float | None = None
) -> dict[str, float]:
    """Kind of work -> seconds on a cluster, everything on the same devices in turn.

    trained: parameters with optimizer states. billions: a nominal N of the actor. This is a well-run cluster: what it
    leaves out (weights that travel, optimizers on the host, devices that wait) makes RLHF slower; see
    ``published.open_rlhf``.
    """
    speed = share_of_peak(actor.size.hidden_size) * cluster.flops
    found = {kind: flops / speed for kind, flops in work.items()}
    if "generation" in work:
        prompts = samples.prompt / (samples.prompt + samples.answer)
        generated = decoding(actor, samples, cluster, trained, billions).seconds
        found["generation"] = prompts * found["generation"] + generated * samples.answers / samples.batch
    return found
