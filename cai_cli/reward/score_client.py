"""Requests scores from a preference model behind an address (`--pm-url`).

The protocol is documented in docs/preference_models.md. The answers of vLLM's classification endpoint are read too.
Failures are treated as those of other servers (`engines.openai_client`): a request that the server refuses concerns its
conversations, any other failure ends the run, and a missing score is never replaced by a number.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import BaseModel, Field, ValidationError

from cai_cli.common.errors import CaiError, RowError
from cai_cli.engines.base import Server
from cai_cli.engines.openai_client import Client
from cai_cli.engines.openai_response import ServerResponse

if TYPE_CHECKING:
    from openai import AsyncOpenAI

KEY_VARIABLE = "PM_API_KEY"

# What a server scores: token ids, or the messages of a conversation.
Item = list[int] | list[dict[str, str]]


# A score is a number of JSON, not a truth value or a text, and finite in float32, in which rewards are computed.
_FLOAT32_MAX = 3.4e38
Score = Annotated[float, Field(strict=True, ge=-_FLOAT32_MAX, le=_FLOAT32_MAX)]


class ClassProbabilities(BaseModel):
    """One item of an answer of vLLM. `probs` holds the logit of the only class, because no activation is applied."""

    index: int
    probs: list[Score]


class ScoreResponse(ServerResponse):
    """The body of an answer: `scores`, or `data` as vLLM sends it."""

    model: Any = None  # servers may call the model as they like
    choices: Any = None
    usage: Any = None
    scores: list[Score] | None = None
    data: list[ClassProbabilities] | None = None

    @property
    def classes(self) -> int:
        """The most numbers that vLLM sends for one item: 1 for a preference model, 0 where it sends none."""
        return max((len(item.probs) for item in self.data or []), default=0)

    def values(self, count: int) -> list[float] | None:
        """One score for each of `count` items, in their order, or None where the answer has others."""
        if self.scores is not None:
            return self.scores if len(self.scores) == count else None
        by_index = {item.index: item.probs for item in self.data or []}
        if len(self.data or []) != count or set(by_index) != set(range(count)):
            return None
        return [by_index[i][0] for i in range(count)] if all(len(p) == 1 for p in by_index.values()) else None


class ScoreClient(Client):
    """Sends requests for scores to one address, from any number of threads."""

    key_variable = KEY_VARIABLE
    address_option = "--pm-url"
    timeout_option = ""
    hints: ClassVar[Mapping[int, str]] = {
        401: f"set {KEY_VARIABLE} to a key of this server",
        403: f"the key in {KEY_VARIABLE} may not use this model",
        404: "--pm-url is the whole address, such as http://localhost:8000/classify, and --pm is the name that the "
        "server knows",
    }

    def __init__(self, name: str, url: str, batch_size: int) -> None:
        """Check the address and the key; no request is sent.

        Args:
            name: The model's name in the requests.
            url: The address that requests are sent to.
            batch_size: Items in one request.

        Raises:
            UsageError: The address or the key is not valid, or the address contains a secret.
        """
        super().__init__(name, Server(url))
        self.batch_size = batch_size

    def scores(self, items: Sequence[Item]) -> list[float | RowError]:
        """One score (a logit) for each item, in order, or the reason why the server refused it.

        Raises:
            CaiError: The server is unreachable, refuses every request, or its answer has another form.
        """
        batches = [items[start : start + self.batch_size] for start in range(0, len(items), self.batch_size)]
        return [score for scores in self.run_all(self._scores, batches) for score in scores]

    async def _scores(self, items: Sequence[Item]) -> list[float | RowError]:
        try:
            response = await self.request("", {"input": list(items), "use_activation": False})
        except RowError as error:
            if len(items) == 1:
                return [error]
            return [(await self._scores([item]))[0] for item in items]
        values = response.values(len(items)) if isinstance(response, ScoreResponse) else None
        if isinstance(response, ScoreResponse) and response.classes > 1:
            raise CaiError(
                f"{self.base_url}: the model is a classifier of {response.classes} labels, not a preference model, "
                "which has one output",
                hint="serve a reward model with one output (num_labels 1)",
                code="wrong-model-kind",
            )
        if values is None:
            raise CaiError(
                f"{self.base_url}: the answer does not have one score for each of the {len(items):,} conversations",
                hint="docs/preference_models.md describes the protocol; a classifier must have one class",
                code="wrong-answer",
            )
        return list(values)

    async def _send(self, client: "AsyncOpenAI", path: str, body: dict[str, Any]) -> Any:
        post: Any = client.post
        raw = {"headers": {"X-Stainless-Raw-Response": "true"}}  # what `with_raw_response` of the openai client sends
        return await post(self.base_url, cast_to=object, body=body, options=raw)

    def _read(self, content: bytes) -> ScoreResponse:
        try:
            return ScoreResponse.model_validate_json(content)
        except ValidationError:
            hint = "docs/preference_models.md describes the protocol"
            raise self._malformed(content, "holds no scores", hint, transient=False) from None

    def _count(self, response: ServerResponse) -> None:
        self._answered += 1
