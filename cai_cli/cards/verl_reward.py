"""The reward function that verl loads (`reward.custom_reward_function.path`): it requests rewards from
`cai serve-reward`.

`cai export --for verl` copies this file beside the data. It needs only the standard library, so verl's workers need no
`cai`.
"""

import json
import time
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

ATTEMPTS = 6
SECONDS = 180  # for one attempt


def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: str,
    extra_info: dict[str, Any] | None = None,
    url: str = "http://127.0.0.1:8009",
    **_: Any,
) -> dict[str, float]:
    """Return the reward of a reply.

    Args:
        data_source: Not used.
        solution_str: The reply, decoded without special tokens.
        ground_truth: Not used.
        extra_info: That of the row; `messages` holds the prompt.
        url: The address of `cai serve-reward`.

    Raises:
        RuntimeError: The server refuses the reply or does not answer; a missing reward never becomes a number.
    """
    messages = json.loads((extra_info or {})["messages"])
    conversation = [*messages, {"role": "assistant", "content": solution_str}]
    body = json.dumps({"model": "", "input": [conversation]}).encode()
    reason = ""
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(2 ** (attempt - 1) / 2)
        try:
            with urlopen(Request(url, body, {"Content-Type": "application/json"}), timeout=SECONDS) as answer:  # noqa: S310 - the user's URL  # nosec B310
                return {"score": float(json.load(answer)["scores"][0])}
        except HTTPError as error:
            reason = f"HTTP {error.code}: {error.read(500).decode(errors='replace')}"
            if error.code < 500:
                break
        except (URLError, OSError) as error:
            reason = str(error)
    raise RuntimeError(f"{url}: no reward: {reason}")
