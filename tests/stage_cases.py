"""The command lines of the data stages."""

from conftest import Cai

ALL = ("--model", "scripted:script.jsonl")


WORDS = {
    "sample": ("sample", "prompts.jsonl", *ALL, "-n", "2"),
    "critique": ("critique", "samples.jsonl", *ALL),
    "revise": ("revise", "critiques.jsonl", *ALL),
    "critique-revise": ("critique-revise", "samples.jsonl", *ALL, "--rounds", "2"),
    "label-prefs": ("label-prefs", "samples.jsonl", *ALL, "--one-order"),
}


def prepare(stage: str, cai: Cai) -> tuple[str, ...]:
    if stage == "revise":
        assert cai(*WORDS["critique"], "-o", "critiques.jsonl").code == 0
    return WORDS[stage]
