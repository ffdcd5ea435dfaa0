"""What training holds on each GPU, as arithmetic over a model's shape and the settings of a trainer.

AdamW keeps two numbers for each trained one. Activations are traced (`activations`), and the head is computed as TRL
does it: on a GPU in tiles of 4,096 tokens by 32,768 words, on a CPU as whole logits (`cpu_logprobs`). Rows count with
the length of the longest.
"""

from dataclasses import dataclass, fields, replace

from cai_cli.training.activations import BYTES, ModelShape, Pass, activations
from cai_cli.training.config import TrainingConfig

GIB = 2**30
TILE_TOKENS, TILE_WORDS = 4096, 32768  # trl/kernels/chunked_logprob.py
FOUR_BIT = 0.5 + 1 / 64 + 4 / (64 * 256)  # bytes of a weight in bitsandbytes' NF4 with doubly quantised constants
EIGHT_BIT = 1 + 4 / 256  # bytes of a number of the optimiser in blocks of 256
COPIES_OF_LOGITS = 4  # logits, log-probabilities, probabilities and their product, in float32 (`cpu_logprobs`)


@dataclass(frozen=True)
class Workload:
    """What a stage does with its model, as far as memory depends on it.

    Attributes:
        length: Tokens of the longest sequence.
        sequences: Sequences in each row of a batch: 1, or 2 for pairs.
        scored: Tokens of a sequence whose log-probabilities are computed; 0 for a model with a scalar head.
        replies: Replies that a process generates at once; 0 where none are.
        reference: Whether a frozen copy of the start model is loaded, unless adapters are trained.
        preference_models: The preference models on the same device.
        engine_share: Share of the GPU's memory that vLLM takes in the process of the trainer while it generates.
    """

    length: int
    sequences: int = 1
    scored: int = 0
    replies: int = 0
    reference: bool = False
    preference_models: tuple[ModelShape, ...] = ()
    engine_share: float = 0.0


@dataclass(frozen=True)
class Sharding:
    """What several processes divide among them, by the stages of ZeRO.

    Attributes:
        processes: Number of processes.
        stage: 0: nothing; 1: the optimiser's state; 2: gradients too; 3, and FSDP: weights too.
        offloads: Whether weights or the optimiser's state are kept in the memory of the CPU.
    """

    processes: int = 1
    stage: int = 0
    offloads: bool = False

    def share(self, stage: int) -> float:
        """The share of each process in what is divided from this stage on."""
        return 1 / self.processes if self.stage >= stage else 1.0


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on one device, by what they are for. At the peak gradients and activations are there, or rollouts.

    Attributes:
        weights: Of the model to train, with its adapters.
        gradients: Of the trained weights; where every pass is a step, activations make room for them.
        optimizer: State of AdamW.
        activations: Beside gradients, at the most during forward and backward pass.
        rollouts: KV cache of the replies, or vLLM's share.
        reference: The frozen copy of the start model.
        preference_models: Of the reward and of the monitor.
        communication: Layers gathered from other processes, or buckets of gradients.
        traced: Whether activations could be traced; they are 0 where not.
    """

    weights: float
    gradients: float
    optimizer: float
    activations: float
    rollouts: float
    reference: float
    preference_models: float
    communication: float
    traced: bool = True

    @property
    def parts(self) -> dict[str, float]:
        """The parts that are there at the peak, by name."""
        sizes = {field.name.replace("_", " "): getattr(self, field.name) for field in fields(self)[:-1]}
        training = self.gradients + self.activations + self.communication
        for absent in ("gradients", "activations", "communication") if self.rollouts > training else ("rollouts",):
            del sizes[absent]
        return {name: size for name, size in sizes.items() if size}

    @property
    def held(self) -> float:
        """What is there all the time: weights, optimiser and the other models."""
        return self.weights + self.optimizer + self.reference + self.preference_models

    @property
    def peak(self) -> float:
        """The most that is there at once."""
        return sum(self.parts.values())

    def __str__(self) -> str:
        """The arithmetic, in GiB, as `15.0 weights + 0.2 gradients + ... = 30.1 GiB`."""
        parts = " + ".join(f"{size / GIB:.1f} {name}" for name, size in self.parts.items() if size >= 0.05 * GIB)
        unknown = "" if self.traced else " (activations not known for this type of model)"
        return f"{parts or '0.0 weights'} = {self.peak / GIB:.1f} GiB{unknown}"


def plan(
    shape: ModelShape, training: TrainingConfig, work: Workload, sharding: Sharding, device_bytes: float = 0.0
) -> MemoryPlan:
    """What one process holds on its device.

    Args:
        shape: The model to train.
        training: The settings of the trainer.
        work: What the stage does with the model.
        sharding: What the processes divide.
        device_bytes: Memory of the device, of which vLLM takes a share.
    """
    static = held(shape, training, work, sharding)
    rows = training.batch_size * work.sequences
    kept = activations(shape, _pass(training, rows, work.length))
    one_layer = activations(replace(shape, layers=1), _pass(training, rows, work.length))
    if not kept or not one_layer or not training.trains:
        return replace(static, traced=not training.trains)
    head = _head(shape, training, rows * work.scored)
    passes = max(kept.kept + head, kept.peak)
    if training.gradient_accumulation == 1:  # no gradients during the forward pass, no activations at the end
        passes = max(passes - static.gradients, max(one_layer.kept + head, one_layer.peak))
    return replace(static, activations=passes, rollouts=_rollouts(shape, training, work, device_bytes))


def held(shape: ModelShape, training: TrainingConfig, work: Workload, sharding: Sharding) -> MemoryPlan:
    """As `plan`, without activations and rollouts, which take longer to compute."""
    size = BYTES[training.trained_dtype]
    total = shape.parameters if work.scored else shape.backbone + shape.hidden
    adapters = shape.adapter_width * training.lora_rank if training.lora_rank is not None else 0
    trained = adapters or total
    trained_size = (2 if training.quantize else 4) if adapters else size  # TRL trains QLoRA's adapters in bfloat16
    weights = total * size + adapters * trained_size
    if training.quantize:
        weights -= shape.linear * (size - FOUR_BIT)
    state = {"adamw": trained_size, "adamw-8bit": EIGHT_BIT}.get(training.optimizer, 0)  # 0: paged to the CPU
    gradients = trained * trained_size
    frozen = BYTES[training.frozen_dtype]
    scorers = sum(model.backbone + model.hidden for model in work.preference_models)
    plan_of_all = MemoryPlan(
        weights=weights * sharding.share(3),
        gradients=gradients * sharding.share(2),
        optimizer=2 * trained * state * sharding.share(1),
        activations=0.0,
        rollouts=0.0,
        reference=shape.parameters * frozen * sharding.share(3) if work.reference and not adapters else 0.0,
        preference_models=scorers * frozen,
        communication=_communication(shape, training, work, gradients, sharding),
    )
    return replace(plan_of_all, weights=0.0, optimizer=0.0) if sharding.offloads else plan_of_all


def _pass(training: TrainingConfig, rows: int, length: int) -> Pass:
    return Pass(
        rows=rows,
        length=length,
        weights=training.trained_dtype,
        precision=training.precision,
        lora_rank=training.lora_rank,
        checkpointing=training.checkpoints_activations,
        attention=training.attention,
    )


def _head(shape: ModelShape, training: TrainingConfig, tokens: int) -> float:
    """Bytes that the log-probabilities of so many tokens take beside the activations of the layers."""
    if not tokens:
        return 0.0
    if training.device == "cpu":
        return COPIES_OF_LOGITS * 4 * float(tokens) * shape.vocabulary
    size = BYTES[training.precision]
    hidden = tokens * shape.hidden * (BYTES[training.trained_dtype] + 4)  # the scored positions, and their gradient
    tile = min(tokens, TILE_TOKENS) * TILE_WORDS * size
    weight = min(shape.vocabulary, TILE_WORDS) * shape.hidden * size
    gradient = 4 * shape.vocabulary * shape.hidden if training.lora_rank is None else 0
    return float(hidden + tile + weight + gradient)


def _rollouts(shape: ModelShape, training: TrainingConfig, work: Workload, device_bytes: float) -> float:
    if work.engine_share:
        return work.engine_share * device_bytes
    cache = work.replies * work.length * shape.kv_values * BYTES[training.precision]
    return cache + work.replies * shape.vocabulary * 4 * 3.0  # logits, probabilities and their sum


def _communication(
    shape: ModelShape, training: TrainingConfig, work: Workload, gradients: float, sharding: Sharding
) -> float:
    """Bytes for what processes exchange: DDP's buckets hold every gradient again; with sharded weights, two layers are
    gathered at once, the embedding and the head stay gathered, and TRL gathers the head once more."""
    if sharding.processes == 1:
        return 0.0
    if sharding.stage < 3:
        return gradients if sharding.stage == 0 else 0.0
    size = BYTES[training.precision]
    layer = shape.layer * (FOUR_BIT if training.quantize else size)
    outside = (shape.parameters - shape.layers * shape.layer) * size
    layer_gradient = 0 if training.lora_rank is not None else shape.layer * size
    head = shape.vocabulary * shape.hidden * BYTES[training.trained_dtype] if work.scored else 0
    return 2 * layer + max(0, outside) + layer_gradient + head
