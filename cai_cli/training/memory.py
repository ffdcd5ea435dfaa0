"""How much memory training takes on each device, computed from a model's shape and the settings of a trainer.

AdamW keeps two numbers for each trained one. Activations are traced (`activations`), and the head is computed as TRL
does it: on a GPU in tiles of 4,096 tokens by 32,768 words, on a CPU as whole logits (`cpu_logprobs`). Rows count with
the length of the longest.
"""

from dataclasses import dataclass, fields, replace

from cai_cli.models.loading import auto_dtype
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
        scorer_parameters: Parameters of the preference models on the same device.
        scorer_dtype: Their precision, "auto" or torch's name.
        engine_share: Share of the GPU's memory that vLLM takes in the process of the trainer while it generates.
        engine_gpus: GPUs among which vLLM divides the weights.
    """

    length: int
    sequences: int = 1
    scored: int = 0
    replies: int = 0
    reference: bool = False
    scorer_parameters: int = 0
    scorer_dtype: str = "auto"
    engine_share: float = 0.0
    engine_gpus: int = 1


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
    """Bytes on one device, by what they are for. The peak is in a training step (with gradients and activations), or
    while replies are sampled (with rollouts).

    Attributes:
        weights: Of the model to train, with its adapters.
        gradients: Of the trained weights; where every pass is a step, activations make room for them.
        optimizer: State of AdamW.
        activations: The most during the forward and backward pass, gradients not included.
        rollouts: KV cache of the replies, and sharded weights that are gathered to sample them; or vLLM's share.
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
        """The parts in memory at the peak, by name."""
        sizes = {field.name.replace("_", " "): getattr(self, field.name) for field in fields(self)[:-1]}
        training = self.gradients + self.activations + self.communication
        for absent in ("gradients", "activations", "communication") if self.rollouts > training else ("rollouts",):
            del sizes[absent]
        return {name: size for name, size in sizes.items() if size}

    @property
    def held(self) -> float:
        """What is in memory all the time: weights, optimiser and the other models."""
        return self.weights + self.optimizer + self.reference + self.preference_models

    @property
    def peak(self) -> float:
        """The most that is in memory at once."""
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
    static = static_plan(shape, training, work, sharding)
    rows = training.batch_size * work.sequences
    one_pass = _pass(training, rows, work.length, sharding)
    kept, one_layer = activations(shape, one_pass), activations(replace(shape, layers=1), one_pass)
    if not kept or not one_layer or not training.trains:
        return replace(static, traced=not training.trains)
    head = _head(shape, training, rows * work.scored)
    passes = max(kept.kept + head, kept.peak)
    if training.gradient_accumulation == 1:  # no gradients during the forward pass, no activations at the end
        passes = max(passes - static.gradients, one_layer.kept + head, one_layer.peak)
    return replace(static, activations=passes, rollouts=_rollouts(shape, training, work, sharding, device_bytes))


def static_plan(shape: ModelShape, training: TrainingConfig, work: Workload, sharding: Sharding) -> MemoryPlan:
    """As `plan`, without activations and rollouts, which take longer to compute."""
    size = BYTES[training.trained_dtype]
    total = shape.parameters if work.scored else shape.scorer
    adapters = shape.adapter_width * training.lora_rank if training.lora_rank is not None else 0
    trained = (adapters or total) if training.trains else 0
    trained_size = (2 if training.quantize else 4) if adapters else size  # TRL trains QLoRA's adapters in bfloat16
    weights = float(total * size + adapters * trained_size)
    if training.quantize:
        weights -= shape.linear * (size - FOUR_BIT)
    state = {"adamw": trained_size, "adamw-8bit": EIGHT_BIT}.get(training.optimizer, 0)  # 0: paged to the CPU
    gradients = trained * trained_size
    frozen = BYTES[training.frozen_dtype]
    scorer_size = BYTES[auto_dtype(training.device) if work.scorer_dtype == "auto" else work.scorer_dtype]
    plan_of_all = MemoryPlan(
        weights=weights * sharding.share(3),
        gradients=gradients * sharding.share(2),
        optimizer=2 * trained * state * sharding.share(1),
        activations=0.0,
        rollouts=0.0,
        reference=shape.parameters * frozen * sharding.share(3) if work.reference and not adapters else 0.0,
        preference_models=float(work.scorer_parameters * scorer_size),
        communication=_communication(shape, training, work, gradients, sharding),
    )
    return replace(plan_of_all, weights=0.0, optimizer=0.0) if sharding.offloads else plan_of_all


def _pass(training: TrainingConfig, rows: int, length: int, sharding: Sharding) -> Pass:
    return Pass(
        rows=rows,
        length=length,
        # Sharded weights are gathered in the precision of the computation; others autocast copies.
        weights=training.precision if sharding.stage == 3 else training.trained_dtype,
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


def _rollouts(
    shape: ModelShape, training: TrainingConfig, work: Workload, sharding: Sharding, device_bytes: float
) -> float:
    if not work.replies:
        return 0.0
    size = BYTES[training.precision]
    # Also with vLLM the local engine samples the replies of the checks, and both models score them.
    whole = 2 if work.reference and training.lora_rank is None else 1
    gathered = whole * shape.parameters * size if sharding.stage == 3 else 0
    cache = work.replies * work.length * shape.kv_values * size
    logits = work.replies * shape.vocabulary * 4 * 3.0  # with probabilities and their sums
    engine = max(work.engine_share * device_bytes, 2 * shape.parameters / work.engine_gpus) if work.engine_share else 0
    return max(engine, gathered + cache + logits)


def _communication(
    shape: ModelShape, training: TrainingConfig, work: Workload, gradients: float, sharding: Sharding
) -> float:
    """Bytes for what processes exchange: DDP's buckets hold every gradient again; with sharded weights, two layers and
    the head are gathered at once (the head stays so until its backward pass), and a layer's gradients."""
    if sharding.processes == 1:
        return 0.0
    if sharding.stage < 3:
        return gradients if sharding.stage == 0 else 0.0
    size = BYTES[training.precision]
    layer = shape.layer * (FOUR_BIT if training.quantize else size)
    layer_gradient = 0 if training.lora_rank is not None else shape.layer * size
    return 2 * layer + layer_gradient + (shape.vocabulary * shape.hidden * size if work.scored else 0)
