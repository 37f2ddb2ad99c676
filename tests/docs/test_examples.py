"""The examples for clusters are what their own tools read, and start what there is."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch.distributed.run import get_args_parser

from softprompt.cli.arguments import spread
from tests.test_sentences import GROUP

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"


def started(words: list[str]) -> Any:
    """What ``torchrun`` reads of its words; softprompt's own are read by the command line."""
    found = get_args_parser().parse_args(words)
    assert (found.module, found.training_script) == (True, "softprompt")
    command, *arguments = found.training_script_args
    GROUP.commands[command].make_context(command, spread(GROUP, [command, *arguments])[1:])
    return found


def test_the_batch_script_starts_a_training_on_each_machine() -> None:
    path = EXAMPLES / "slurm.sh"
    bash = shutil.which("bash")
    assert bash is not None
    subprocess.run([bash, "-n", str(path)], check=True)
    text = path.read_text()
    asked = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)$", text, re.MULTILINE))
    assert (asked["nodes"], asked["ntasks-per-node"]) == ("2", "1")  # torchrun starts one process for each GPU
    line = text.replace("\\\n", " ").split("srun torchrun")[1].splitlines()[0]
    given = {"$SLURM_NNODES": asked["nodes"], "$SLURM_GPUS_ON_NODE": asked["gpus-per-node"], "$SLURM_JOB_ID": "7"}
    words = [given.get(word, word) for word in shlex.split(line)]
    found = started(words)
    assert (found.nnodes, found.nproc_per_node, found.rdzv_backend) == ("2", "8", "c10d")
    assert "--resume" in found.training_script_args  # a job that is queued again goes on


def test_the_job_set_starts_a_training_on_each_machine() -> None:
    found = yaml.safe_load((EXAMPLES / "jobset.yaml").read_text())
    [workers] = found["spec"]["replicatedJobs"]
    job = workers["template"]["spec"]
    pod = job["template"]["spec"]
    [container] = pod["containers"]
    command = [word.replace("$(JOB_COMPLETION_INDEX)", "1") for word in container["command"]]
    assert command[0] == "torchrun"
    asked = started(command[1:])
    assert int(asked.nnodes) == job["parallelism"] == job["completions"]
    assert int(asked.nproc_per_node) == container["resources"]["limits"]["nvidia.com/gpu"]
    assert asked.master_addr == f"{found['metadata']['name']}-{workers['name']}-0-0.{found['metadata']['name']}"
    assert asked.master_port == container["ports"][0]["containerPort"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    assert "--resume" in asked.training_script_args


def test_the_job_set_is_one_by_its_own_schema() -> None:
    models = pytest.importorskip("kubeflow_trainer_api.models")
    found = yaml.safe_load((EXAMPLES / "jobset.yaml").read_text())
    read = models.JobsetV1alpha2JobSet.from_dict(found)
    assert read.to_dict() == found  # it knows every field
