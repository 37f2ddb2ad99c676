"""How several soft prompts answer together."""

from __future__ import annotations

from softprompt.errors import ConfigError

VOTES = ("mean", "majority")


def chosen_vote(vote: str | None, *, labels: bool) -> str:
    """How an ensemble votes: ``vote``, or by default the mean for labels and the majority for free text.

    Raises:
        ConfigError: there is no such vote, or no mean of free text.
    """
    if vote is not None and vote not in VOTES:
        raise ConfigError(f"The vote must be one of {', '.join(VOTES)}, not {vote!r}; choose one.")
    if vote == "mean" and not labels:
        raise ConfigError("Free text has no mean, so its vote is the majority; leave the vote out.")
    return vote or ("mean" if labels else "majority")
