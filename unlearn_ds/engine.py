"""DeepSpeed, and only here: process groups, sharded loading, policy and reference engines, gathering, saving."""

from __future__ import annotations

import contextlib
import copy
import gc
import hashlib
import importlib
import io
import math
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.ops.op_builder import AsyncIOBuilder
from deepspeed.runtime import compiler
from deepspeed.utils import groups
from torch import nn
from transformers import PreTrainedModel, get_scheduler
from transformers.integrations import HfDeepSpeedConfig

from unlearn_ds import dist, ds_json, lora, machine, ranks
from unlearn_ds.config import EngineConfig, OptimConfig, UsageError
from unlearn_ds.model import PackedCausalLM
from unlearn_ds.optimizer import GuardedAdamW
from unlearn_ds.types import LossOutput, PackedBatch, ReferenceRows


class StepResult(NamedTuple):
    """``grad_norm``: global norm before clipping, inf or NaN when ``skipped``: then the weights are untouched."""

    grad_norm: float
    skipped: bool
    learning_rate: float


def start(config: EngineConfig) -> torch.device:
    """Join the process group (NCCL on GPUs, gloo on CPUs) and return this rank's device."""
    if not gc.isenabled():
        gc.freeze()
        gc.enable()
    dist.default_environment()
    ranks.choose_interface()
    accelerator = get_accelerator()
    if accelerator.device_name() != "cpu":
        # Before the first collective: init_distributed binds the group to this device but does not select it.
        accelerator.set_device(int(os.environ["LOCAL_RANK"]))
    if not dist.is_initialized():
        # Every rank would print that an op has been built, at every start.
        with dist.waiting(), contextlib.redirect_stdout(io.StringIO()):
            deepspeed.init_distributed(
                dist_backend=accelerator.communication_backend_name(),
                timeout=dist.timeout(config.timeout_minutes),
                verbose=False,
            )
        ranks.note_joined()
    if accelerator.device_name() == "cpu":
        _unname_shared_memory()
        machine.keep_freed_memory()
        return torch.device("cpu")
    return torch.device(accelerator.current_device_name())


def _unname_shared_memory() -> None:
    """Take away the name of this rank's buffer for DeepSpeed's all-reduce in shared memory.

    DeepSpeed 0.19.8 never does: every run on CPUs would leave 66 MiB a rank in /dev/shm until the machine is restarted,
    killed runs too. Once all ranks have opened it the buffer lives as long as they do.
    """
    dist.barrier()
    of_run = f"{os.getuid()}_{os.environ['MASTER_ADDR']}_{os.environ['MASTER_PORT']}_{os.environ['RANK']}"
    Path(f"/dev/shm/deepspeed_allreduce_buffer_{of_run}").unlink(missing_ok=True)


def _import_muon_uncompiled() -> None:
    """Import DeepSpeed's Muon without its decorators, which import torch's compiler: 2 s of every start.

    DeepSpeed 0.19.8 imports it to ask whether an optimizer is one. Ours never is. A release that has it elsewhere takes
    its time.
    """
    decorator = compiler.compile
    compiler.compile = lambda *_, **__: lambda function: function
    try:
        with contextlib.suppress(ImportError):
            importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    finally:
        compiler.compile = decorator


@contextlib.contextmanager
def sharded_loading(ds_config: dict[str, Any]) -> Iterator[None]:
    """Inside, ``from_pretrained`` keeps only this rank's partition of each weight when the configuration is ZeRO-3.

    transformers holds the configuration by a weak reference, so it must live as long as the loading.
    """
    if ds_json.stage(ds_config) != 3:
        yield
        return
    registered = HfDeepSpeedConfig({**ds_config, "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1})
    try:
        yield
    finally:
        del registered


class Policy:
    """The model being trained, on a DeepSpeed engine.

    folder: where this rank's optimizer states or weights lie on disk, removed when the engine is gone."""

    def __init__(
        self, model: PackedCausalLM, values: dict[str, Any], optim: OptimConfig,
        folder: tempfile.TemporaryDirectory[str] | None = None,
    ):  # fmt: skip
        self.model, self.stage, self._folder = model, ds_json.stage(values), folder
        self.adapted = lora.layers(model.causal_lm)
        ds_config = ds_json.for_policy(values, optim, model.config.hidden_size)
        trained = [p for p in model.parameters() if p.requires_grad]
        # Fused also where states are offloaded: on CPUs torch's fused step takes as long as DeepSpeedCPUAdam's (0.06 to
        # 0.09 s for 50M parameters on a core of an EPYC; unfused 0.4 to 0.6 s), which would have to be compiled first.
        optimizer = GuardedAdamW(
            trained, lr=optim.learning_rate, betas=(optim.adam_beta1, optim.adam_beta2), eps=optim.adam_epsilon,
            weight_decay=optim.weight_decay, fused=True,
        )  # fmt: skip
        if self.stage == 0 and not ds_json.is_bf16(values):
            # The engine would clip without looking, and an infinite norm turns every gradient into NaN.
            optimizer.clip_norm = optim.gradient_clipping or math.inf
            ds_config["gradient_clipping"] = 0.0
        scheduler = get_scheduler(
            {"constant": "constant_with_warmup"}.get(optim.schedule, optim.schedule), optimizer,
            num_warmup_steps=round(optim.warmup_ratio * optim.max_steps), num_training_steps=optim.max_steps,
        )  # fmt: skip
        _import_muon_uncompiled()
        self.engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, lr_scheduler=scheduler, config=ds_config, dist_init_required=False
        )
        self.engine.train()

    def loss(self, batch: PackedBatch, reference: ReferenceRows | PackedBatch | None) -> LossOutput:
        """One packed forward that ends in the fused loss. reference: see ``PackedCausalLM``."""
        return LossOutput(*self.engine(batch, reference))

    def hidden_rows(self, batch: PackedBatch) -> torch.Tensor:
        """Final hidden states at the response rows without adapters, [N, H], and without gradients."""
        with torch.no_grad(), lora.switched_off(self.model):
            return self.engine(batch, hidden_only=True)

    def backward(self, loss: torch.Tensor) -> None:
        """Accumulate gradients. Micro-batches add up: the loss already carries its share of the global batch."""
        # A tensor of its own: where DeepSpeed 0.19.8 does not scale the loss (stage 0 in fp32) it divides the gradient
        # of the very tensor that a forward returned by the accumulation steps all the same.
        self.engine.backward(loss.clone(), scale_wrt_gas=False)

    def step(self) -> StepResult:
        """Close a micro-batch; after the last of a step, clip, update and advance the schedule.

        A step whose gradient norm is not finite on any rank is dropped by every rank.
        """
        learning_rate = self.engine.optimizer.param_groups[0]["lr"]
        before, closes = self.engine.skipped_steps, self.engine.is_gradient_accumulation_boundary()
        self.engine.step()
        # Looking at it waits for the device, and between the micro-batches of a step it is the last step's.
        norm = self.engine.get_global_grad_norm() if closes else None
        return StepResult(float(norm) if norm is not None else 0.0, self.engine.skipped_steps > before, learning_rate)

    def full_weight(self, parameter: nn.Parameter) -> torch.Tensor:
        """A whole copy of one parameter on this rank."""
        with self._gathered([parameter]):
            return parameter.detach().clone()

    @contextlib.contextmanager
    def evaluation_model(self, gather: str = "auto") -> Iterator[tuple[PackedCausalLM, bool]]:
        """The model for evaluation, and whether all ranks must call it in step.

        Under ZeRO-3 with ``gather`` "always" each rank holds a whole copy in the compute precision for the time being,
        and evaluates its own prompts at its own pace; with "never" weights stay sharded and are gathered layer by
        layer. "auto" gathers where the copy takes at most half of the free memory of every rank. With LoRA there is a
        copy at every stage, with the adapters merged in: what is measured is what a merged export holds.
        """
        direct = self.stage != 3 and not self.adapted
        if direct or gather == "never" or (gather == "auto" and not self._copy_fits()):
            self.engine.eval()
            yield self.model, self.stage == 3
            self.engine.train()
            return
        yield self._whole_copy().eval(), False

    def _copy_fits(self) -> bool:
        numel = [p.ds_numel if self.stage == 3 else p.numel() for p in self.model.parameters()]
        num_bytes = sum(numel) * torch.finfo(self.model.causal_lm.dtype).bits // 8
        sharing = dist.local_world_size() if self.model.device.type == "cpu" else 1
        free = get_accelerator().available_memory() / sharing
        return all(dist.gather_objects(num_bytes <= free / 2))

    def _whole_copy(self) -> PackedCausalLM:
        source, whole = self.model.causal_lm, self.empty_copy()
        whole.to_empty(device=self.model.device)
        with torch.no_grad():
            targets = dict(whole.named_parameters(remove_duplicate=False))
            for name, weight in self._plain_weights():
                targets[name].data = weight
            for name, buffer in source.named_buffers():
                whole.get_buffer(name).data = buffer.detach().clone()
        whole.tie_weights()
        return PackedCausalLM(whole, self.model.attention_name, self.model.loss_options)

    def empty_copy(self) -> PreTrainedModel:
        """The Hugging Face model without adapters and without memory for its weights."""
        source = self.model.causal_lm
        with torch.device("meta"):
            empty = type(source)(copy.deepcopy(source.config))
        empty.generation_config = source.generation_config
        return empty

    def _plain_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Name in the Hugging Face model and whole copy of each weight, adapters merged in. Every rank takes part."""
        merged = {f"{name}.base_layer.weight": layer for name, layer in self.adapted.items()}
        for name, parameter in self.model.causal_lm.named_parameters():
            if name in merged:
                with self._gathered([parameter, *lora.adapter_parameters(merged[name])]):
                    weight = lora.merged_weight(merged[name])
                yield lora.plain_name(name), weight
            elif not lora.is_adapter(name):
                yield lora.plain_name(name), self.full_weight(parameter)

    def _gathered(self, parameters: list[nn.Parameter]) -> contextlib.AbstractContextManager:
        return deepspeed.zero.GatheredParameters(parameters) if self.stage == 3 else contextlib.nullcontext()

    def consolidated_state_dict(self) -> dict[str, torch.Tensor] | None:
        """All weights in compute precision under the names of the Hugging Face model, on the main rank only.

        Adapters are merged in."""
        if self.adapted:
            return self._on_main(self._plain_weights())
        state = self.engine._consolidated_16bit_state_dict() if self.stage == 3 else self.model.state_dict()
        if not dist.is_main():
            return None
        return {name.removeprefix("causal_lm."): tensor.cpu() for name, tensor in state.items()}

    def adapter_state_dict(self) -> dict[str, torch.Tensor] | None:
        """The adapters' weights under their names in the Hugging Face model, on the main rank only."""
        parameters = self.model.causal_lm.named_parameters()
        return self._on_main((name, self.full_weight(p)) for name, p in parameters if lora.is_adapter(name))

    def _on_main(self, weights: Iterator[tuple[str, torch.Tensor]]) -> dict[str, torch.Tensor] | None:
        main = dist.is_main()
        kept = {name: weight.cpu() for name, weight in weights if main}
        return kept if main else None

    def save_checkpoint(self, folder: Path, tag: str, state: dict[str, Any]) -> None:
        """Write trained weights, optimizer, schedule and ``state``; every rank takes part.

        Frozen weights stay out: a run with LoRA finds them where it started from, and knows them by their digest.
        """
        self.engine.save_checkpoint(
            str(folder), tag=tag, client_state={**state, "frozen": self._frozen_digest()}, save_latest=False,
            exclude_frozen_parameters=True,
        )  # fmt: skip

    def load_checkpoint(self, folder: Path, tag: str) -> dict[str, Any]:
        """Restore what ``save_checkpoint`` wrote and return its ``state``.

        Raises ``UsageError`` when the frozen weights are not those of the run that wrote it.
        """
        path, state = self.engine.load_checkpoint(str(folder), tag=tag, load_module_strict=not self.adapted)
        if path is None:
            raise ValueError(f"{folder / tag} holds no checkpoint of this configuration")
        if state["frozen"] != self._frozen_digest():
            raise UsageError(
                f"--resume auto: the adapters in {folder / tag} belong to other weights than this model's: it has "
                "changed since the run was started."
            )
        return state

    def _frozen_digest(self) -> str | None:
        return self.weights_digest() if self.adapted else None

    def weights_digest(self) -> str:
        """Short name of the present weights without adapters, the same for every number of ranks."""
        local = []
        for name, parameter in self.model.named_parameters():
            if lora.is_adapter(name):
                continue
            part = parameter.ds_tensor if self.stage == 3 else parameter
            share = 1 if self.stage == 3 else dist.world_size()
            wide = part.detach().double()
            local += [float(wide.sum()) / share, float((wide * wide).sum()) / share]
        rounded = [f"{value:.8e}" for value in dist.sums(local, self.model.device)]
        return hashlib.sha256(" ".join(rounded).encode()).hexdigest()[:16]

    def close(self) -> None:
        """Free the engine: optimizer, buffers and weights. The policy is of no use afterwards."""
        self.engine.destroy()
        # Hooks that ZeRO hangs on autograd's accumulators keep its optimizer alive beyond any garbage collection.
        for holder in (self.engine.optimizer, self.engine):
            vars(holder).clear()
        for parameter in self.model.parameters():
            parameter.grad = parameter.ds_tensor = None
        self.model, self.adapted = None, {}
        if groups._ZERO_PARAM_INTRA_PARALLEL_GROUP is not None:
            # DeepSpeed 0.19.8 makes hpZ's group when a model is loaded and refuses to make it for a second one.
            torch.distributed.destroy_process_group(groups._ZERO_PARAM_INTRA_PARALLEL_GROUP)
            groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None
        gc.collect()
        get_accelerator().empty_cache()


class ReferenceEngine:
    """The frozen reference on a ZeRO-3 engine of its own, without optimizer.

    folder: where this rank's weights lie on disk, removed when the engine is gone."""

    def __init__(
        self, model: PackedCausalLM, ds_config: dict[str, Any], folder: tempfile.TemporaryDirectory[str] | None = None
    ):
        self._folder = folder
        model.requires_grad_(False)
        self.engine, *_ = deepspeed.initialize(model=model, config=ds_config, dist_init_required=False)
        self.engine.eval()

    def hidden_rows(self, batch: PackedBatch) -> torch.Tensor:
        """Final hidden states at the response rows, [N, H]."""
        with torch.no_grad():
            return self.engine(batch, hidden_only=True)


def check_async_io() -> None:
    """Build, once, and load what DeepSpeed reads and writes disks with; ``UsageError`` on all ranks where it cannot."""
    builder, error = AsyncIOBuilder(), None
    try:
        if builder.is_compatible():
            builder.load(verbose=False)
        else:
            error = "libaio and its headers are missing"
    except (RuntimeError, OSError, ImportError) as problem:  # the compiler, or the linker at load
        error = str(problem).strip().splitlines()[0]
    error = next((e for e in dist.gather_objects(error) if e), None)
    if error:
        raise UsageError(
            f"--reference nvme and optimizers on disk need DeepSpeed's async_io, which cannot be built here: {error}. "
            "Install libaio with its headers and a C++ compiler (apt-get install libaio-dev g++, or dnf install "
            "libaio-devel gcc-c++), or take --reference offload and --ds_config zero3_offload."
        )


_COLLECTIVES = (
    "all_reduce", "all_reduce_coalesced", "inference_all_reduce", "reduce", "reduce_scatter", "reduce_scatter_tensor",
    "broadcast", "all_gather", "all_gather_into_tensor", "all_gather_coalesced", "all_gather_object", "all_to_all",
    "all_to_all_single",
)  # fmt: skip


def communication_points() -> list[tuple[Any, str]]:
    """(object, name) of every function that a collective goes through: DeepSpeed's backend, which keeps functions of
    torch that it took when it was made, and torch's module for our own. The first may call the second."""
    backend = deepspeed.comm.comm.cdb
    owners = ((backend, dir(backend)), (torch.distributed, dir(torch.distributed)))
    return [(owner, name) for owner, names in owners if owner is not None for name in _COLLECTIVES if name in names]


def synchronize() -> None:
    """Wait for the device."""
    get_accelerator().synchronize()


def peak_memory_bytes(device: torch.device) -> int:
    """Largest device memory so far; on a CPU the largest resident size of the process."""
    return host_memory_bytes() if device.type == "cpu" else get_accelerator().max_memory_allocated()


def host_memory_bytes() -> int:
    """Largest resident size of the process so far."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def device_name() -> str:
    """Name of the device as its maker gives it; "cpu" without an accelerator."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else get_accelerator().device_name()


def versions() -> dict[str, str]:
    return {"deepspeed": deepspeed.__version__, "accelerator": get_accelerator().device_name()}
