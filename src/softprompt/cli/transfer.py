"""``softprompt transfer``: a training that starts from the soft prompt of another task, the best in a short trial."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from softprompt.drawing.words import simple_table
from softprompt.errors import ArtifactError, ConfigError
from softprompt.model.frozen import FrozenLM
from softprompt.soft_prompts.metadata import start_length
from softprompt.soft_prompts.soft_prompt import SoftPrompt
from softprompt.soft_prompts.store import Store
from softprompt.tasks.task import Task
from softprompt.terminal.console import notices, stderr
from softprompt.text.template import Template
from softprompt.tuning.config import TrainConfig
from softprompt.tuning.job import Job
from softprompt.tuning.transfer import Trial, find_start


@dataclass(frozen=True)
class Search:
    """Where to look for a start.

    Attributes:
        sources: names or paths; empty: all of the store that were tuned on the base model.
        steps: of the trial.
    """

    sources: Sequence[str]
    steps: int

    def find(
        self,
        lm: FrozenLM,
        job: Job,
        config: TrainConfig,
    ) -> Trial:
        """The best start, and what was compared, which is said on stderr.

        Args:
            lm: the base model.
            job: what is to be learned, on it.
            config: the settings as the user gave them.

        Raises:
            ConfigError: no source fits, or one that was named does not.
            SoftPromptError: as for ``find_start``.
        """
        sources = self._sources(lm, config)
        first = next(iter(sources.values()))
        length = start_length(first, first.num_virtual_tokens)
        config = replace(config, num_virtual_tokens=length)
        assert isinstance(job.template, Template), "the job is on a base model"
        window, ahead = config.max_length or lm.window, config.decoder_virtual_tokens
        task = Task(lm, job.template, job.verbalizer, length, window, decoder_virtual_tokens=ahead)
        with notices() as notice:
            found = find_start(
                task,
                job.rows,
                job.validation,
                config,
                sources,
                steps=self.steps,
                told=lambda step: notice(f"trial of {len(sources) + 1} starts: step {step} of {self.steps}"),
            )
        _say(found)
        return found

    def _sources(self, lm: FrozenLM, config: TrainConfig) -> dict[str, SoftPrompt]:
        """The soft prompts to try, all of one length."""
        store = Store()
        kind = config.parametrisation == "prefix"
        if self.sources:
            named = {name: store.load(name) for name in self.sources}
            first = next(iter(named.values()))
            length = config.num_virtual_tokens or start_length(first, first.num_virtual_tokens)
            for name, one in named.items():
                Task.of(lm, one)
                if one.num_virtual_tokens not in (0, length) or (one.parametrisation == "prefix") != kind:
                    raise ConfigError(
                        f"Expected sources of {length} virtual tokens, learned as this training learns, found {name!r} "
                        f"with {one.num_virtual_tokens} ({one.parametrisation}); leave it out."
                    )
            return named
        found: dict[str, SoftPrompt] = {}
        for entry in store.entries():
            header = entry.header
            if isinstance(header, ArtifactError) or header.base_fingerprint != lm.fingerprint:
                continue
            if (header.parametrisation == "prefix") == kind:
                found[entry.name] = store.load(entry.name)
        lengths = Counter(start_length(one, one.num_virtual_tokens) for one in found.values())
        wanted = config.num_virtual_tokens or max(lengths, key=lambda length: (lengths[length], length), default=0)
        fitting = {name: one for name, one in found.items() if one.num_virtual_tokens in (0, wanted)}
        if not fitting:
            of_length = f" of {wanted} virtual tokens" if wanted else ""
            raise ConfigError(
                f"Expected soft prompts of {lm.name}{of_length} in {store.home} to start from, found none; train one "
                f"on another task, name some with --sources, or use `softprompt train`."
            )
        if left_out := sorted(set(found) - set(fitting)):
            stderr.print(f"left out, since they do not have {wanted} virtual tokens: {', '.join(left_out)}")
        return fitting


def _say(found: Trial) -> None:
    table = simple_table("start", ">similarity", f">{found.metric}", ">gain", ">95 % interval")
    for one in found.candidates:
        likeness = "" if one.similarity is None else f"{one.similarity:.3f}"
        gain, interval = "", ""
        if one.gain is not None:
            gain, interval = f"{one.gain[0]:+.3f}", f"{one.gain[1]:+.3f} to {one.gain[2]:+.3f}"
        table.add_row(one.name, likeness, f"{one.value:.3f}", gain, interval)
    stderr.print(f"after {found.steps} steps of each, on {found.rows:,} validation rows not used to choose:")
    stderr.print(table)
    best = found.candidates[0]
    surely = "" if best.gain is None or best.gain[1] > 0 else "; its gain there is not beyond chance"
    stderr.print(f"the training starts from {best.name}{surely}")
