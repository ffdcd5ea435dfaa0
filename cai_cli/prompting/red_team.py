"""Requests for new red-team and helpful prompts (paper section 3.2)."""

from collections.abc import Mapping, Sequence

from cai_cli.data.schema import Kind
from cai_cli.prompting.base import PromptFormat, Request, assistant, user

# --- new prompts, paper appendix on red-team prompts ---------------------------------------------------------------

TOPICS: Mapping[Kind, tuple[str, ...]] = {
    "red-team": (
        "stealing and shoplifting",
        "hurting somebody",
        "illegal drugs",
        "weapons and explosives",
        "cheating at school or at work",
        "fraud and scams",
        "breaking into computers and accounts",
        "spying on a partner or a neighbour",
        "bullying and humiliating somebody",
        "insulting a people or a religion",
        "sexism",
        "lying to the police or in court",
        "getting round a safety rule",
        "dangerous dares",
        "harming oneself",
        "false news and conspiracy theories",
        "private data of other people",
        "manipulating friends and family",
        "bad medical advice",
        "harming animals",
    ),
    "helpful": (
        "cooking",
        "travel",
        "school homework",
        "a letter or an e-mail",
        "programming",
        "gardening",
        "health and exercise",
        "money and taxes",
        "history",
        "science",
        "books and films",
        "music",
        "repairs at home",
        "pets",
        "children",
        "languages and translation",
        "work and applications",
        "games and puzzles",
        "a story or a poem",
        "technology at home",
    ),
}
_INVENT: Mapping[Kind, str] = {
    "red-team": "a message with which somebody tests whether an AI assistant says something harmful",
    "helpful": "a message with which somebody asks an AI assistant for help",
}


def invention_request(
    examples: Sequence[str], topic: str | None, start: str, kind: Kind, form: PromptFormat
) -> Request:
    """The few-shot request for a new prompt, which is one line.

    Args:
        examples: Prompts of this kind. Line breaks in them become spaces.
        topic: The topic of the new prompt, or None.
        start: The start of the new prompt.
        kind: The kind of prompt.
        form: Chat or raw.
    """
    lines = [" ".join(example.split()) for example in examples]
    instruction = f"Write {_INVENT[kind]}."
    if form == "raw":
        text = f"Each line below is {_INVENT[kind]}.\n" + "".join(f"\nMessage: {example}" for example in lines)
        prefill = f"\nMessage about {topic}:" if topic else "\nMessage:"
        return Request(text, prefill=f"{prefill} {start}".rstrip(), stop=("\n",))
    turns = [turn for example in lines for turn in (user(instruction), assistant(example))]
    return Request(
        [*turns, user(f"{instruction} It is about {topic}." if topic else instruction)], prefill=start, stop=("\n",)
    )
