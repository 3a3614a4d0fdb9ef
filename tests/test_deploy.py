"""The files in deploy/: against the schemas of what reads them, and run, with stand-ins for the cluster."""

import contextlib
import csv
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import kubeflow_trainer_api.models as kubeflow
import pytest
import yaml

from tests.test_train import TINY

DEPLOY = Path(__file__).parent.parent / "deploy"
SBATCH = DEPLOY / "slurm" / "train.sbatch"
KINDS = {
    "PersistentVolumeClaim": kubeflow.IoK8sApiCoreV1PersistentVolumeClaim,
    "TrainingRuntime": kubeflow.TrainerV1alpha1TrainingRuntime,
    "TrainJob": kubeflow.TrainerV1alpha1TrainJob,
}


def documents(name):
    return list(yaml.safe_load_all((DEPLOY / "kubernetes" / name).read_text(encoding="utf-8")))


def check(model, tree):
    """Against a model of the API: its types, and no field that it doesn't know, for those it leaves out."""
    assert model.from_dict(tree).to_dict() == tree


def containers():
    """Pod template, container and environment of both kinds of job."""
    (job,) = documents("pytorchjob.yaml")
    runtime, train = documents("trainjob.yaml")
    first = job["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]
    other = runtime["spec"]["template"]["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]
    for template, more in ((first, {}), (other, train["spec"]["trainer"])):
        (container,) = template["spec"]["containers"]
        container = container | {"resources": more.get("resourcesPerNode") or container["resources"]}
        yield template, container, [*container["env"], *more.get("env", [])]


@pytest.mark.parametrize("name", ["volumes.yaml", "trainjob.yaml"])
def test_manifests_are_what_kubernetes_and_kubeflow_trainer_take(name):
    for tree in documents(name):
        check(KINDS[tree["kind"]], tree)
        with pytest.raises((AssertionError, ValueError)):
            check(KINDS[tree["kind"]], tree | {"spec": tree["spec"] | {"nodes": 2}})


def test_the_pytorchjob_is_what_the_training_operator_takes():
    """Its own fields are few; the names are those of kubeflow-training 1.9, whose models need the whole client."""
    (job,) = documents("pytorchjob.yaml")
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    spec = job["spec"]
    assert spec.keys() == {"elasticPolicy", "runPolicy", "pytorchReplicaSpecs"}
    assert spec["elasticPolicy"] == {"rdzvBackend": "c10d", "rdzvConf": [{"key": "join_timeout", "value": "1800"}]}
    assert spec["runPolicy"].keys() == {"backoffLimit", "cleanPodPolicy"}
    # Without a Master the operator sets torchrun's variables alone, and no RANK.
    assert spec["pytorchReplicaSpecs"].keys() == {"Worker"}
    worker = spec["pytorchReplicaSpecs"]["Worker"]
    assert worker.keys() == {"replicas", "restartPolicy", "template"}
    assert worker["restartPolicy"] == "OnFailure"
    check(kubeflow.IoK8sApiCoreV1PodTemplateSpec, worker["template"])
    assert worker["template"]["spec"]["containers"][0]["name"] == "pytorch"  # the one that the operator looks for


def test_manifests_agree_with_each_other_and_leave_time_to_save():
    claims = {claim["metadata"]["name"] for claim in documents("volumes.yaml")}
    runtime, train = documents("trainjob.yaml")
    assert train["spec"]["runtimeRef"]["name"] == runtime["metadata"]["name"]
    for template, container, env in containers():
        spec, volumes = template["spec"], {}
        for volume in spec["volumes"]:
            volumes[volume["name"]] = volume
        assert {mount["name"] for mount in container["volumeMounts"]} == volumes.keys()
        assert {each["persistentVolumeClaim"]["claimName"] for each in (volumes["data"], volumes["runs"])} == claims
        assert volumes["shm"]["emptyDir"]["medium"] == "Memory"
        values = {each["name"]: each["value"] for each in env}
        assert int(values["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) < spec["terminationGracePeriodSeconds"]
        assert spec["securityContext"]["runAsNonRoot"]
        processes = values.get("PROCESSES", str(train["spec"]["trainer"]["numProcPerNode"]))
        assert container["resources"]["limits"]["nvidia.com/gpu"] == processes


def test_a_pod_that_was_stopped_or_evicted_is_not_counted_as_failed():
    runtime, _ = documents("trainjob.yaml")
    job = runtime["spec"]["template"]["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert job["template"]["spec"]["restartPolicy"] == "Never"  # which podFailurePolicy asks for
    rules = job["podFailurePolicy"]["rules"]
    assert {rule["action"] for rule in rules} == {"Ignore"}
    assert rules[0]["onPodConditions"][0]["type"] == "DisruptionTarget"
    assert rules[1]["onExitCodes"] == {"containerName": "node", "operator": "In", "values": [143]}


@pytest.mark.skipif(sys.platform == "win32", reason="a POSIX shell")
def test_shell_is_clean(tmp_path):
    scripts = [SBATCH]
    for number, (_, container, _) in enumerate(containers()):
        text = next(word for word in container["command"] + container.get("args", []) if "exec detkit" in word)
        scripts.append(tmp_path / f"{number}.sh")
        scripts[-1].write_text(f"#!/bin/sh\n{text}", encoding="utf-8", newline="\n")
    places = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    shellcheck = shutil.which("shellcheck", path=places)
    assert shellcheck
    # SC2012: a run's folder may have any name in `ls`, which gives it as it is where its output is no terminal.
    done = subprocess.run([shellcheck, "--exclude=SC2012", *scripts], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


# What stands in for Slurm: srun runs the tasks on this machine and hands SIGTERM on to them, as Slurm does to a step.
SRUN = """
import os, signal, subprocess, sys
words = sys.argv[1:]
while words[0].startswith("-"):
    words.pop(0)
tasks = [subprocess.Popen(words, start_new_session=True) for _ in range(int(os.environ["SLURM_JOB_NUM_NODES"]))]
signal.signal(signal.SIGTERM, lambda *_: [task.terminate() for task in tasks])
open("srun.pid", "w").write(str(os.getpid()))
codes = [task.wait() for task in tasks]
sys.exit(max(code if code >= 0 else 128 - code for code in codes))
"""
SCONTROL = """
import sys
if sys.argv[1] == "requeue":
    open("requeued", "a").write(sys.argv[2] + "\\n")
else:
    print("localhost\\nlocalhost")
"""


def commands(folder):
    """A folder for PATH with stand-ins for Slurm's commands, and this detkit."""
    folder.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("detkit", "from detkit.cli import main\nmain()\n")):
        (folder / name).write_text(f"#!{sys.executable}\n{text}", encoding="utf-8")
        (folder / name).chmod(0o755)
    return folder


def free_number():
    """The number of a job whose port (train.sbatch) is free."""
    while True:
        number = random.randrange(10_000)
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", 20_000 + number)):
            return number


def wait_for(path, process, seconds=300):
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.05)


def settings(tmp_path, epochs):
    return [*TINY, f"train.epochs={epochs}", f"train.eval_every={epochs}", f"data.cache={tmp_path / 'cache'}"]


def epochs_done(run):
    with (run / "metrics.csv").open(encoding="utf-8") as file:
        return [int(row["epoch"]) for row in csv.DictReader(file)]


POSIX = pytest.mark.skipif(sys.platform != "linux", reason="Slurm and Kubernetes run on Linux")


def environment(tmp_path, **more):
    places = [str(commands(tmp_path / "bin")), os.environ["PATH"]]
    root = str(DEPLOY.parent)
    return os.environ | {"PATH": os.pathsep.join(places), "PYTHONPATH": root, "OMP_NUM_THREADS": "1"} | more


@POSIX
@pytest.mark.slow
def test_a_slurm_job_that_is_preempted_saves_its_state_is_requeued_and_goes_on_to_the_end(tmp_path):
    job = str(free_number())
    env = environment(tmp_path, SLURM_JOB_ID=job, SLURM_JOB_NUM_NODES="2", SLURM_JOB_NODELIST="node[1-2]")
    command = ["bash", str(SBATCH), "--config", "ssd_shelf.yaml", "--set", *settings(tmp_path, 6)]
    run = tmp_path / "runs" / f"slurm-{job}" / "ssd_shelf-1"

    def submit(**more):
        return subprocess.Popen(
            command, cwd=tmp_path, env=env | more, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    first = submit()
    wait_for(run / "metrics.csv", first)  # the first epoch is done
    os.kill(int((tmp_path / "srun.pid").read_text()), signal.SIGTERM)  # as Slurm does 180 s before the end
    out, err = first.communicate(timeout=300)
    assert first.returncode == 143, (out, err)
    assert "detkit: stopped; go on with" in err
    assert (tmp_path / "requeued").read_text().split() == [job]
    assert len(epochs_done(run)) < 6

    again = submit(SLURM_RESTART_COUNT="1")
    out, err = again.communicate(timeout=300)
    assert again.returncode == 0, (out, err)
    assert "2 processes" in out
    assert out.count("going on after step") == 1
    assert epochs_done(run) == [1, 2, 3, 4, 5, 6]
    assert [run] == list(run.parent.iterdir())
    assert (tmp_path / "requeued").read_text().split() == [job]


@POSIX
@pytest.mark.slow
def test_pods_that_are_evicted_or_lost_are_started_anew_and_the_job_goes_on(tmp_path):
    """Both manifests' commands, in the environment that their operators give."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    env = environment(tmp_path, RUNS=str(tmp_path / "runs"), PROCESSES="1", PET_NPROC_PER_NODE="1", PET_NNODES="2")
    env |= {"PET_RDZV_BACKEND": "c10d", "PET_RDZV_ENDPOINT": f"localhost:{port}"}
    env |= {"PET_MASTER_ADDR": "localhost", "PET_MASTER_PORT": str(port)}
    run = tmp_path / "runs" / "ssd_shelf-1"
    words = ["--config", "ssd_shelf.yaml", "--set", *settings(tmp_path, 12), "train.save_steps=1"]
    (_, operated, _), (_, trained, _) = containers()
    commands = ([*operated["command"], *operated["args"][:2], *words], [*trained["command"], *words])
    codes, logs = [], []

    def pod(number):
        logs.append((tmp_path / f"{len(logs)}.log").open("w+", encoding="utf-8"))
        process = subprocess.Popen(commands[number], cwd=tmp_path, env=env, stdout=logs[-1], stderr=logs[-1])
        while number == 0 and process.poll() is None:  # the first has the rendezvous, as its name says in a cluster
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            time.sleep(0.05)
        return process

    def written():
        return [Path(log.name).read_text(encoding="utf-8") for log in logs]

    def watch(pods, until):
        """As the operators do: start again what has ended with an error, until then."""
        deadline = time.monotonic() + 300
        while not until():
            for number, each in enumerate(pods):
                if each.poll():
                    codes.append(each.returncode)
                    pods[number] = pod(number)
            assert time.monotonic() < deadline, written()
            assert len(codes) < 20, written()
            time.sleep(0.1)

    def further():
        """Whether an epoch more is done than now."""
        before = len(epochs_done(run)) if (run / "metrics.csv").exists() else 0
        return lambda: (run / "metrics.csv").exists() and len(epochs_done(run)) > before

    pods = [pod(0), pod(1)]
    watch(pods, further())
    evicted = pods[1]
    evicted.terminate()
    watch(pods, lambda: evicted.poll() is not None and pods[1] is not evicted)
    assert evicted.returncode == 143
    watch(pods, further())
    assert codes[:2] == [143, 143], (codes, written())
    processes = Path(f"/proc/{pods[1].pid}/task/{pods[1].pid}/children").read_text().split()
    for process in (pods[1].pid, *map(int, processes)):  # its machine is gone
        os.kill(process, signal.SIGKILL)
    watch(pods, lambda: all(each.poll() == 0 for each in pods))
    assert epochs_done(run) == list(range(1, 13))
    assert [run] == list(run.parent.iterdir())
    assert sum(text.count("going on after step") for text in written()) == 2
