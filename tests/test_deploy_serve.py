"""What serves models in deploy/: against the schemas of what reads it, and the commands in it against the server's."""

import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import kubernetes_validate
import pytest
import yaml
from compose_spec import PyCompose
from typer.testing import CliRunner

from detkit import cli
from detkit.serve.gate import OPEN
from detkit.serve.settings import Settings

ROOT = Path(__file__).parent.parent
SERVE, KUBERNETES = ROOT / "deploy" / "serve", ROOT / "deploy" / "kubernetes"
DOCKERFILES = (SERVE / "Dockerfile", SERVE / "Dockerfile.cuda")


def documents(path):
    return list(yaml.safe_load_all(path.read_text(encoding="utf-8")))


def instructions(path):
    """A Dockerfile's last stage: instruction -> its text."""
    text = re.sub(r"\\\n", " ", path.read_text(encoding="utf-8"))
    stage = re.split(r"^FROM ", text, flags=re.MULTILINE)[-1]
    return dict(re.findall(r"^([A-Z]+) (.*)$", stage, flags=re.MULTILINE))


def understood(words):
    """Raise where `detkit serve` does not know an option."""
    done = CliRunner().invoke(cli.app, ["serve", *words, "--help"])
    assert done.exit_code == 0, done.output
    known = set(re.findall(r"--[a-z-]+", CliRunner(env={"COLUMNS": "200"}).invoke(cli.app, ["serve", "--help"]).output))
    assert {word for word in words if word.startswith("--")} <= known, known


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_dockerfiles_are_clean_and_run_the_server_as_nobody(path):
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([hadolint, path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    last = instructions(path)
    assert re.fullmatch(r"[1-9]\d+:[1-9]\d+", last["USER"])
    assert "/health/ready" in last["HEALTHCHECK"]
    assert "/health/ready" in OPEN  # without a token
    words = yaml.safe_load(last["ENTRYPOINT"])
    assert words[:2] == ["detkit", "serve"]
    understood([*words[2:], *yaml.safe_load(last["CMD"])])


def test_images_have_what_they_are_built_from_and_no_torch():
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text("utf-8").splitlines() if line.startswith("!")}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    needed = {*wheel["packages"], *wheel["force-include"], "pyproject.toml", project["project"]["readme"], "LICENSE"}
    assert needed <= kept
    extras = project["project"]["optional-dependencies"]
    for path in DOCKERFILES:
        text = path.read_text("utf-8")
        copied = {
            word for line in re.findall(r"^COPY (?!--)(.*)", text, re.MULTILINE) for word in shlex.split(line)[:-1]
        }
        assert needed | {"constraints.txt"} <= copied <= kept
        (chosen,) = re.findall(r"'\.\[(.*)\]'", text)
        wanted = [one for extra in chosen.split(",") for one in extras[extra]]
        assert not [one for one in wanted if re.match(r"(torch|detkit\[(train|data|dev|all))", one)]


def test_compose():
    text = (SERVE / "compose.yaml").read_text(encoding="utf-8").replace("${MODELS:-./models}", "./models")
    tree = yaml.safe_load(text)
    described = {name: value for name, value in tree.items() if not name.startswith("x-")}
    PyCompose.from_yaml(yaml.safe_dump(described))
    with pytest.raises(Exception, match=r"."):
        PyCompose.from_yaml(yaml.safe_dump(described | {"services": {"serve": {"imagge": "x"}}}))
    for name in ("serve", "serve-cuda"):
        one = tree["services"][name]
        assert (SERVE / one["build"]["context"] / one["build"]["dockerfile"]).is_file()
        assert one["read_only"]
        assert one["cap_drop"] == ["ALL"]
        assert all(port.startswith("127.0.0.1:") for port in one["ports"])
        drain = Settings(models=("x",)).drain
        assert int(one["stop_grace_period"].removesuffix("s")) > drain
    (scrape,) = documents(SERVE / "prometheus.yaml")[0]["scrape_configs"]
    assert scrape["static_configs"] == [{"targets": ["serve:8000"]}]
    assert any(volume.startswith("./prometheus.yaml:") for volume in tree["services"]["prometheus"]["volumes"])


def test_the_deployment_is_what_kubernetes_takes():
    found = documents(KUBERNETES / "serve.yaml")
    assert [one["kind"] for one in found] == [
        "Deployment", "Service", "HorizontalPodAutoscaler", "PodDisruptionBudget", "PersistentVolumeClaim"
    ]  # fmt: skip
    for tree in found:
        kubernetes_validate.validate(tree, "1.33", strict=True)
        with pytest.raises(kubernetes_validate.ValidationError):
            kubernetes_validate.validate(tree | {"spec": tree["spec"] | {"nodes": 2}}, "1.33", strict=True)


def test_the_deployment_s_parts_agree():
    deployment, service, scaler, budget, claim = documents(KUBERNETES / "serve.yaml")
    template = deployment["spec"]["template"]
    labels = template["metadata"]["labels"]
    for selector in (
        deployment["spec"]["selector"]["matchLabels"],
        service["spec"]["selector"],
        budget["spec"]["selector"]["matchLabels"],
    ):
        assert selector == labels
    assert scaler["spec"]["scaleTargetRef"]["name"] == deployment["metadata"]["name"]
    assert scaler["spec"]["minReplicas"] >= budget["spec"]["minAvailable"] + 1
    spec = template["spec"]
    (container,) = spec["containers"]
    names = {port["name"] for port in container["ports"]}
    assert {port["targetPort"] for port in service["spec"]["ports"]} <= names
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"]["path"] in OPEN
        assert container[probe]["httpGet"]["port"] in names
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in spec["volumes"]}
    assert spec["volumes"][0]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    understood(container["args"])
    assert spec["securityContext"]["runAsNonRoot"]
    assert container["securityContext"]["readOnlyRootFilesystem"]
    wait = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert spec["terminationGracePeriodSeconds"] > wait + Settings(models=("x",)).drain


def test_the_inference_services_are_what_kserve_takes():
    """KServe's own fields are few; their names are those of kserve 0.21's models, which need the whole client. The rest
    are a pod's."""
    own, triton = documents(KUBERNETES / "inferenceservice.yaml")
    for tree in (own, triton):
        assert (tree["apiVersion"], tree["kind"]) == ("serving.kserve.io/v1beta1", "InferenceService")
        assert tree["spec"].keys() == {"predictor"}
    kserve = {"minReplicas", "maxReplicas", "scaleMetric", "scaleTarget", "timeout", "model"}
    pod = {name: value for name, value in own["spec"]["predictor"].items() if name not in kserve}
    tree = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": pod}
    kubernetes_validate.validate(tree, "1.33", strict=True)
    (container,) = pod["containers"]
    assert container["name"] == "kserve-container"
    understood(container["args"])
    port = container["args"][container["args"].index("--port") + 1]
    assert str(container["ports"][0]["containerPort"]) == port == str(container["readinessProbe"]["httpGet"]["port"])
    assert container["readinessProbe"]["httpGet"]["path"] in OPEN
    model = triton["spec"]["predictor"]["model"]
    assert model.keys() == {"modelFormat", "protocolVersion", "storageUri", "resources"}
    claim = documents(KUBERNETES / "serve.yaml")[-1]["metadata"]["name"]
    assert model["storageUri"] == f"pvc://{claim}/triton"
    assert container["env"] == [{"name": "STORAGE_URI", "value": f"pvc://{claim}"}]
