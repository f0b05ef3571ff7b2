"""The manifests for GKE, and the container's first process."""

import json
import math
from pathlib import Path
import re
import signal
import subprocess

from helpers import Process
import pytest
import yaml

IMAGE = "us-docker.pkg.dev/project/topklm/topklm:1"
FLAGS = ("--config=configs/small.py", "--workdir=gs://bucket/run")
TPU = ("--tpu=v5e", "--topology=16x16")
GPU = ("--gpu=nvidia-h100-80gb", "--nodes=4")


@pytest.fixture
def submit(tree, stage):
    def run(*arguments: str, flags=FLAGS, image=IMAGE, name="first") -> Process:
        command = [tree / "launch/gke/submit.sh", "--name", name, "--image", image, *arguments, "--", *flags]
        process = Process(list(map(str, command)), env=stage.environment, stdin=subprocess.DEVNULL)
        process.finish()
        return process

    return run


@pytest.fixture
def manifest(submit):
    def render(*arguments: str, **options):
        process = submit(*arguments, "--dry-run", **options)
        assert process.exit_code == 0, process.errors
        assert "@" not in re.sub(r"^#.*", "", process.output)
        return yaml.safe_load(process.output)

    return render


def job(manifest):
    (group,) = manifest["spec"]["replicatedJobs"]
    return group["template"]["spec"]


def pod(manifest):
    return job(manifest)["template"]["spec"]


def trainer(manifest):
    (container,) = pod(manifest)["containers"]
    return container


def expanded_by_kubernetes(text: str, variables: dict[str, str]) -> str:
    """Fills in `args` as Kubernetes does: $(NAME) of known variables is replaced, $$ is one dollar."""
    return re.sub(
        r"\$\$|\$\((\w+)\)",
        lambda m: "$" if m[0] == "$$" else variables.get(m[1], m[0]),
        text,
    )


@pytest.mark.parametrize(
    ("tpu", "topology", "options", "machines", "accelerator"),
    [
        ("v5e", "16x16", [], 64, "tpu-v5-lite-podslice"),
        ("v5e", "2x4", ["--chips-per-node=8"], 1, "tpu-v5-lite-podslice"),
        ("v5e", "2x4", [], 2, "tpu-v5-lite-podslice"),
        ("v6e", "1x1", [], 1, "tpu-v6e-slice"),
        ("v5p", "4x4x8", ["--slices=3"], 32, "tpu-v5p-slice"),
    ],
)
def test_there_are_as_many_pods_as_the_topology_has_machines(
    manifest, tpu, topology, options, machines, accelerator
):
    rendered = manifest("--tpu", tpu, "--topology", topology, *options)
    assert job(rendered)["completions"] == job(rendered)["parallelism"] == machines
    chips = trainer(rendered)["resources"]["limits"]["google.com/tpu"]
    assert machines * chips == math.prod(map(int, topology.split("x")))
    assert pod(rendered)["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": accelerator,
        "cloud.google.com/gke-tpu-topology": topology,
    }
    assert rendered["spec"]["replicatedJobs"][0]["replicas"] == (3 if options == ["--slices=3"] else 1)


def test_a_mistake_fails_the_job_at_once_and_all_else_restarts_it(manifest):
    rendered = manifest(*TPU, "--max-restarts=7")
    (rule,) = job(rendered)["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob"
    assert rule["onExitCodes"] == {
        "containerName": trainer(rendered)["name"],
        "operator": "In",
        "values": [2],
    }
    assert rendered["spec"]["failurePolicy"] == {
        "maxRestarts": 7,
        "rules": [{"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}],
    }
    assert job(rendered)["backoffLimit"] == 0
    assert job(rendered)["completionMode"] == "Indexed"
    assert pod(rendered)["restartPolicy"] == "Never"  # which podFailurePolicy demands
    assert pod(rendered)["terminationGracePeriodSeconds"] >= 300


def test_gpu_pods_are_told_their_place(manifest):
    rendered = manifest(*GPU)
    assert "annotations" not in rendered["metadata"]
    assert job(rendered)["completions"] == 4
    assert trainer(rendered)["resources"]["limits"] == {"nvidia.com/gpu": 8}
    assert pod(rendered)["nodeSelector"] == {"cloud.google.com/gke-accelerator": "nvidia-h100-80gb"}
    variables = {v["name"]: v.get("value") or v["valueFrom"] for v in trainer(rendered)["env"]}
    group = rendered["spec"]["replicatedJobs"][0]["name"]
    assert (
        variables["TOPKLM_COORDINATOR"]
        == f"first-{group}-0-0.{rendered['spec']['network']['subdomain']}:8476"
    )
    assert variables["TOPKLM_PROCESS_COUNT"] == "4"
    index = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    assert variables["TOPKLM_PROCESS_ID"] == {"fieldRef": {"fieldPath": index}}


def test_spot_reservations_data_and_accounts_are_filled_in(manifest):
    spot = manifest(*TPU, "--spot", "--data-bucket=texts", "--service-account=trainer")
    assert pod(spot)["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
    assert "cloud.google.com/gke-spot" in {t["key"] for t in pod(spot)["tolerations"]}
    assert pod(spot)["serviceAccountName"] == "trainer"
    assert job(spot)["template"]["metadata"]["annotations"] == {"gke-gcsfuse/volumes": "true"}
    mounts = {mount["name"]: mount["mountPath"] for mount in trainer(spot)["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod(spot)["volumes"]}
    assert mounts == {"shared-memory": "/dev/shm", "data": "/data"}
    assert set(volumes) == set(mounts)
    assert volumes["data"]["csi"]["volumeAttributes"]["bucketName"] == "texts"
    reserved = manifest(*GPU, "--reservation=ours")
    assert pod(reserved)["nodeSelector"]["cloud.google.com/reservation-name"] == "ours"


@pytest.mark.parametrize("devices", [TPU, GPU], ids=["tpu", "gpu"])
def test_the_command_and_variables_arrive_unharmed(manifest, devices):
    odd = ['--a=it\'s "$HOME" $(HOME) $$ \\n & \\ `id`', "--b=line\nline\ttab", "--c=@NAME@ {x: [1, #]}"]
    value = "x $(A) \"'\\ &"
    rendered = manifest(*devices, f"--env=A={value}", "--env", "B=", flags=(*FLAGS, *odd))
    known = {"HOME": "/root", "A": "no"}
    assert [expanded_by_kubernetes(a, known) for a in trainer(rendered)["args"]] == [*FLAGS, *odd]
    variables = {v["name"]: v.get("value") for v in trainer(rendered)["env"]}
    assert expanded_by_kubernetes(variables["A"], known) == value
    assert variables["B"] == ""


def test_the_manifest_goes_to_kubectl(submit, stage):
    process = submit(*TPU, "--namespace=team")
    assert process.exit_code == 0, process.errors
    (call,) = stage.calls("kubectl")
    assert call["argv"] == ["create", "--namespace=team", "--filename=-"]
    (sent,) = stage.calls("manifest")
    assert yaml.safe_load(sent["text"])["metadata"]["name"] == "first"
    assert "kubectl logs" in process.output


def test_a_refusal_of_kubectl_is_passed_on(submit, stage):
    stage.set(kubectl=1)
    process = submit(*TPU)
    assert process.exit_code == 1
    assert "kubectl delete jobset first" in process.errors


@pytest.mark.parametrize(
    ("arguments", "options", "said"),
    [
        ([], {}, "no devices"),
        ([*TPU, *GPU], {}, "choose one"),
        (["--tpu=v5e", "--topology=3x5"], {}, "--topology 3x5"),
        (["--tpu=v5e"], {}, "--topology missing"),
        (["--tpu=v5p", "--topology=16x16"], {}, "--topology 16x16"),
        (["--tpu=v5p", "--topology=1x1x6"], {}, "no whole number of machines"),
        (["--tpu=v9", "--topology=2x2"], {}, "--tpu v9"),
        ([*TPU, "--chips-per-node=8"], {}, "--chips-per-node 8"),
        ([*TPU, "--nodes=3"], {}, "--nodes"),
        (["--gpu=h100"], {}, "--nodes missing"),
        ([*GPU, "--slices=2"], {}, "--slices"),
        ([*TPU, "--spot", "--reservation=r"], {}, "choose one"),
        ([*TPU, "--env=A-B=1"], {}, "--env A-B=1"),
        ([*TPU, "--max-restarts=many"], {}, "--max-restarts many"),
        ([*TPU, "--data-bucket=gs://b"], {}, "gs://b"),
        (TPU, {"name": "A_run"}, "--name A_run"),
        (TPU, {"name": "x" * 41}, "--name"),
        (TPU, {"image": "a b"}, "--image a b"),
        (TPU, {"flags": ()}, "trainer flags"),
        (TPU, {"flags": ("--workdir=runs/here",)}, "--workdir=runs/here"),
        (TPU, {"flags": ("--config=x",)}, "--workdir=missing"),
    ],
)
def test_mistakes_are_one_line_with_exit_code_2(submit, stage, arguments, options, said):
    process = submit(*arguments, **options)
    assert process.exit_code == 2
    (line,) = process.errors.splitlines()
    assert line.startswith("error: ")
    assert said in line
    assert not stage.calls("kubectl")


# --- in the container ---


@pytest.fixture
def entrypoint(tree, stage):
    (stage.bin / "python").write_text((stage.bin / "uv").read_text())
    (stage.bin / "python").chmod(0o755)
    command = ["bash", str(tree / "launch/gke/entrypoint.sh"), "--config=a b"]
    return lambda: Process(command, env=stage.environment)


@pytest.mark.parametrize(("script", "code"), [("finish", 0), ("exit 2", 2), ("exit 75", 75), ("exit 1", 1)])
def test_the_containers_exit_code_is_the_trainers(entrypoint, stage, script, code):
    stage.set(trainer=[script])
    assert entrypoint().finish() == code
    assert [call["argv"] for call in stage.calls("trainer")] == [["-u", "-m", "topklm.main", "--config=a b"]]


def test_a_container_that_is_told_to_end_saves_and_is_not_taken_for_finished(entrypoint, stage):
    stage.set(trainer=["train"])
    container = entrypoint()
    container.wait_for_line("training")
    container.signal(signal.SIGTERM)
    assert container.finish() == 75
    assert "SIGTERM: stopped after step 7" in container.output


def test_the_image_holds_what_the_trainer_needs():
    folder = Path(__file__).parents[2] / "launch/gke"
    dockerfile = (folder / "Dockerfile").read_text()
    copied = set(re.findall(r"^COPY (.*) \S+$", dockerfile, flags=re.MULTILINE))
    words = {word for line in copied for word in line.split()}
    sent = {line[1:] for line in (folder / "Dockerfile.dockerignore").read_text().split() if line[0] == "!"}
    assert words == sent
    assert all((folder.parents[1] / word).exists() for word in words)
    entry = json.loads(re.search(r"^ENTRYPOINT (.*)$", dockerfile, flags=re.MULTILINE)[1])
    assert (folder.parents[1] / entry[-1]).exists()
