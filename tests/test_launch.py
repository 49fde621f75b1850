"""The files in launch/: each is valid for the program that reads it, starts `autoretouch`, and passes its status on."""

import copy
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jsonschema
import pytest
import yaml
from conftest import edited

from autoretouch_jax.runtime import starts
from autoretouch_jax.sweeps.report import as_python

LAUNCH = Path(__file__).parent.parent / "launch"
SCHEMAS = Path(__file__).parent / "schemas"  # JobSet v1alpha2 with Kubernetes 1.37's Job and Pod; SkyPilot 0.14.1's task
JOB = ("spec", "replicatedJobs", 0, "template", "spec")


def load(name: str):
    schema = json.loads((SCHEMAS / f"{name}.schema.json").read_text())
    return yaml.safe_load((LAUNCH / f"{name}.yaml").read_text()), jsonschema.Draft202012Validator(schema)


@pytest.mark.parametrize("name", ["jobset", "sky"])
def test_the_file_is_valid_against_its_schema(name):
    described, validator = load(name)
    assert [f"{error.json_path}: {error.message}" for error in validator.iter_errors(described)] == []


@pytest.mark.parametrize(
    ("name", "path", "key", "value"),
    [
        ("jobset", ("spec",), "failPolicy", {}),
        ("jobset", ("spec", "failurePolicy", "rules", 0), "action", "Fail"),
        ("jobset", JOB, "parallelism", "64"),
        ("jobset", (*JOB, "podFailurePolicy", "rules", 0, "onExitCodes"), "value", [75]),
        ("jobset", (*JOB, "template", "spec", "containers", 0), "arg", []),
        ("sky", (), "node", 2),
        ("sky", ("resources", "job_recovery"), "recover_on_exit_code", 75),
    ],
)
def test_the_schemas_refuse_what_is_misspelt(name, path, key, value):
    described, validator = load(name)
    place = described = copy.deepcopy(described)
    for step in path:
        place = place[step]
    place[key] = value
    assert list(validator.iter_errors(described))


def test_every_launcher_starts_autoretouch_requeues_on_75_and_explains_itself():
    for path in LAUNCH.iterdir():
        text = path.read_text()
        assert "How to:" in text.split("\n", 3)[0] + text.split("\n", 3)[1], path.name
        assert "autoretouch" in text, path.name
        if path.suffix in (".sbatch", ".yaml") or path.name == "tpu_vm.sh":
            assert "75" in text, path.name
        if path.suffix in (".sh", ".sbatch"):
            subprocess.run(["bash", "-n", str(path)], check=True)


def test_every_launcher_that_starts_again_says_when_to_give_up():
    for name in ("local.sh", "slurm.sbatch", "sweep.sbatch", "tpu_vm.sh", "jobset.yaml", "sky.yaml"):
        assert re.search(r"AUTORETOUCH_GIVE_UP(=3|:-3|, value: \"3\")", (LAUNCH / name).read_text()), name
    described, _ = load("jobset")
    pod = described["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    assert {"name": starts.VARIABLE, "value": "3"} in pod["containers"][0]["env"]


def test_the_dockerfile_installs_the_extras_that_exist():
    import tomllib

    text = (LAUNCH / "Dockerfile").read_text()
    project = tomllib.loads((LAUNCH.parent / "pyproject.toml").read_text())["project"]
    for extra in ("cuda12", "cuda13", "tpu"):
        assert extra in text
        assert extra in project["optional-dependencies"]
    assert 'ENTRYPOINT ["autoretouch"]' in text  # exec form: signals reach the program


@pytest.fixture
def run_files(small_config, tmp_path) -> tuple[Path, dict[str, str]]:
    """A config of a long run, and an environment whose `autoretouch` is this one."""
    config = edited(small_config, train={"steps": 100_000, "checkpoint_every": 4}, parallel={"devices": 0, "timeout": 30})
    (tmp_path / "long.py").write_text(as_python(config, "A long run."))
    (tmp_path / "bin").mkdir()
    command = tmp_path / "bin" / "autoretouch"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m autoretouch_jax.cli "$@"\n')
    command.chmod(0o755)
    return tmp_path, os.environ | {"PATH": f"{command.parent}:{os.environ['PATH']}", "FAKE": "2"}


def steps_saved(workdir: Path) -> list[int]:
    return sorted(int(path.name) for path in workdir.glob("checkpoints/*") if path.name.isdigit())


def wait_for(condition, what: str, seconds: float = 240):
    until = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < until, what
        time.sleep(0.2)
    return found


def test_local_starts_one_run_of_several_processes_and_hands_on_signal_and_status(run_files):
    folder, environment = run_files
    workdir = folder / "run"
    command = ["bash", str(LAUNCH / "local.sh"), "2", str(folder / "long.py"), "--workdir", str(workdir)]
    started = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wait_for(lambda: steps_saved(workdir), "a first checkpoint")
    started.send_signal(signal.SIGTERM)
    said, _ = started.communicate(timeout=120)
    assert started.returncode == 75, said
    assert "4 cpu device(s) of 2 process(es)" in said
    assert f"stopped at step {steps_saved(workdir)[-1]} " in said


# Stands for a run of several processes. Each start writes a line, and ends with the next of STATUSES.
STARTED = """#!/bin/sh
echo "$JAX_PROCESS_ID $JAX_COORDINATOR_ADDRESS $AUTORETOUCH_GIVE_UP" >> calls
trap 'exit 75' TERM
set -- $STATUSES
shift "$(($(grep -c "^$JAX_PROCESS_ID " calls) - 1))"
[ "$1" = wait ] && { touch waiting; while true; do sleep 0.1; done; }
exit "$1"
"""


@pytest.mark.parametrize(
    ("statuses", "flags", "started", "status"),
    [
        ("75 75 0", [], 3, 0),
        ("75 2", [], 2, 2),
        ("1", [], 1, 1),
        ("130", [], 1, 130),
        ("75", ["--max-time", "1h"], 1, 75),
    ],
)
def test_local_starts_again_on_75_alone(tmp_path, statuses, flags, started, status):
    ended = local(tmp_path, statuses, flags)
    ended.wait(timeout=60)
    assert ended.returncode == status
    calls = [line.split() for line in (tmp_path / "calls").read_text().splitlines()]
    assert [sum(call[0] == process for call in calls) for process in "01"] == [started, started]
    assert len({call[1] for call in calls}) == started, "a new port for every start"
    assert {call[2] for call in calls} == {"3"}


def test_local_does_not_start_again_when_it_was_stopped_itself(tmp_path):
    ended = local(tmp_path, "75 wait wait", [])
    wait_for((tmp_path / "waiting").exists, "the second start")
    time.sleep(0.5)  # both processes
    ended.send_signal(signal.SIGTERM)
    assert ended.wait(timeout=60) == 75
    assert len((tmp_path / "calls").read_text().splitlines()) == 4


def local(folder: Path, statuses: str, flags: list[str]) -> subprocess.Popen:
    """`launch/local.sh 2`, with the stand-in."""
    (folder / "autoretouch").write_text(STARTED)
    (folder / "autoretouch").chmod(0o755)
    environment = os.environ | {"PATH": f"{folder}:{os.environ['PATH']}", "STATUSES": statuses}
    environment.pop("JAX_COORDINATOR_ADDRESS", None)
    return subprocess.Popen(["bash", str(LAUNCH / "local.sh"), "2", "CONFIG", *flags], env=environment, cwd=folder)


GCLOUD = """#!/bin/bash
# A slice that is made when asked for, is lost once, and whose run stops once with a checkpoint before it ends.
echo "$3 $4" >> calls
case "$3 $4" in
  "queued-resources describe") cat state 2>/dev/null; exit 0 ;;
  "queued-resources create") echo ACTIVE > state ;;
  "queued-resources delete") rm state ;;
  "tpu-vm ssh")
    runs=$(grep -c ssh calls)
    if [ "$runs" = 1 ]; then exit 75; fi
    if [ "$runs" = 2 ]; then echo SUSPENDED > state; exit 1; fi
    exit "$LAST" ;;
esac
"""


@pytest.mark.parametrize("last", [0, 2])
def test_a_tpu_pod_is_asked_for_started_again_and_made_anew_when_lost(tmp_path, last):
    """With a stand-in for gcloud, because there is no TPU here."""
    (tmp_path / "gcloud").write_text(GCLOUD)
    (tmp_path / "gcloud").chmod(0o755)
    given = {"TPU": "a", "ZONE": "z", "TYPE": "v5litepod-256", "IMAGE": "i", "PAUSE": "0", "LAST": str(last)}
    environment = os.environ | given | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = ["bash", str(LAUNCH / "tpu_vm.sh"), "CONFIG", "--workdir", "gs://bucket/run"]
    assert subprocess.run(command, env=environment, cwd=tmp_path, timeout=60, check=False).returncode == last
    calls = [line.split()[1] for line in (tmp_path / "calls").read_text().splitlines()]
    assert [call for call in calls if call != "describe"] == ["create", "ssh", "ssh", "delete", "create", "ssh"]


@pytest.mark.skipif(not shutil.which("slurmctld") or os.geteuid() != 0, reason="needs slurm-wlm, munge and root")
def test_slurm_runs_two_tasks_stops_them_with_a_checkpoint_and_starts_them_again(run_files):
    folder, environment = run_files
    node, home, workdir = Path(__file__).parent / "slurm_node.sh", folder / "slurm", folder / "run"
    environment |= {"SLURM_CONF": str(home / "slurm.conf"), "JAX_PLATFORMS": "cpu"}
    environment["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"

    def slurm(*words: str) -> str:
        return subprocess.run(words, env=environment, check=True, capture_output=True, text=True, cwd=folder).stdout

    slurm("bash", str(node), "up", str(home))
    try:
        given = ["--nodes=1", "--ntasks-per-node=2", "--gpus-per-node=0", "--cpus-per-task=1", "--parsable"]
        job = slurm("sbatch", *given, str(LAUNCH / "slurm.sbatch"), "long.py", "--workdir", str(workdir)).strip()
        log = folder / f"autoretouch-{job}.log"
        wait_for(lambda: steps_saved(workdir), "a first checkpoint")
        slurm("scancel", "--signal=TERM", job)
        wait_for(lambda: "stopped at step" in log.read_text(), "the end of the first run")
        stopped = steps_saved(workdir)[-1]
        wait_for(lambda: "PENDING" in slurm("squeue", "-h", "-j", job, "-o", "%T"), "the job in the queue again")
        slurm("scontrol", "update", f"JobId={job}", "StartTime=now")
        wait_for(lambda: steps_saved(workdir)[-1] > stopped, "a checkpoint of the second run")
        assert "4 cpu device(s) of 2 process(es)" in log.read_text()
        assert f"steps {stopped} →" in log.read_text()
        slurm("scancel", job)
        wait_for(lambda: not slurm("squeue", "-h", "-j", job, "-o", "%T"), "the end of the job")
    finally:
        subprocess.run(["bash", str(node), "down", str(home)], env=environment, check=False)
