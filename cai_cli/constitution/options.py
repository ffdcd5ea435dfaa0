"""The options by which a stage chooses its constitution."""

from cai_cli.runtime.config import Effect, Group, Option, StageConfig, option


class ConstitutionOptions(StageConfig):
    """Which principles and few-shot examples are used."""

    constitution: str | None = option(
        None,
        "YAML file of principles; by default the shipped one.",
        Option(Effect.HASHED, Group.PRINCIPLES, reads_file=True),
    )
    few_shot: str | None = option(
        None,
        "YAML file of few-shot examples, or none; by default those of the constitution.",
        Option(Effect.HASHED, Group.PRINCIPLES, reads_file=True),
    )
    principles: str | None = option(
        None, "Use only these principle ids, separated by commas.", Option(group=Group.PRINCIPLES)
    )
    max_principles: int | None = option(
        None, "Use only the first K principles (paper section 3.4).", Option(group=Group.PRINCIPLES), ge=1
    )
