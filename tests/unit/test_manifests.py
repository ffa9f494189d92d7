"""Kubernetes manifests against the published schemas, and the flags in them against our own parser."""

from __future__ import annotations

import pytest
import yaml
from harness import REPOSITORY

from unlearn_ds import arguments

FOLDER = REPOSITORY / "launchers" / "k8s"


def documents(name):
    found = list(yaml.safe_load_all((FOLDER / name).read_text()))
    assert found
    return found


def flags_of(words):
    """The flags of train.py among the words of a command."""
    return dict(word.removeprefix("--").split("=", 1) for word in words if word.startswith("--"))


def fault(document, version):
    """What the schemas of a release of Kubernetes say against a document; None when nothing."""
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    try:
        kubernetes_validate.validate(document, version, strict=True)
    except kubernetes_validate.ValidationError as error:
        return error.message
    return None


@pytest.mark.parametrize("version", ["1.31", "1.37"])
def test_the_job_is_what_kubernetes_takes(version):
    assert [fault(document, version) for document in documents("job.yaml")] == [None, None]


def test_a_wrong_key_would_be_seen():
    _, job = documents("job.yaml")
    job["spec"]["completionmode"] = job["spec"].pop("completionMode")
    assert "completionmode" in fault(job, "1.37")


def test_the_trainjob_is_what_kubeflow_takes():
    models = pytest.importorskip("kubeflow_trainer_api.models")
    (document,) = documents("trainjob.yaml")
    # Its classes drop keys that they do not know: what comes back must be what went in.
    assert models.TrainerV1alpha1TrainJob.from_dict(document).to_dict() == document


def test_pods_meet_at_the_first_one_and_end_their_job_on_mistakes():
    service, job = documents("job.yaml")
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    variables = {entry["name"]: entry.get("value") for entry in container["env"]}
    assert service["metadata"]["name"] == pod["subdomain"] and service["spec"]["clusterIP"] == "None"
    assert variables["MASTER_ADDR"] == f"{job['metadata']['name']}-0.{pod['subdomain']}"
    assert int(variables["NNODES"]) == job["spec"]["completions"] == job["spec"]["parallelism"]
    assert int(variables["GPUS_PER_NODE"]) == container["resources"]["limits"]["nvidia.com/gpu"]
    (mistakes,) = (rule for rule in job["spec"]["podFailurePolicy"]["rules"] if rule["action"] == "FailJob")
    assert mistakes["onExitCodes"]["values"] == [2, 3]


def test_what_pods_write_to_is_mounted():
    _, job = documents("job.yaml")
    (trainjob,) = documents("trainjob.yaml")
    (patch,) = trainjob["spec"]["runtimePatches"]
    (node,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    pods = [job["spec"]["template"]["spec"], node["template"]["spec"]["template"]["spec"]]
    for pod in pods:
        (container,) = pod["containers"]
        mounted = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        assert mounted == {"shared": "/shared", "shm": "/dev/shm"}
        assert {volume["name"] for volume in pod["volumes"]} == set(mounted)
        assert pod["terminationGracePeriodSeconds"] == 900


def test_their_flags_are_flags_of_ours():
    _, job = documents("job.yaml")
    (trainjob,) = documents("trainjob.yaml")
    words = job["spec"]["template"]["spec"]["containers"][0]["command"]
    found = [flags_of(words), flags_of(trainjob["spec"]["trainer"]["args"])]
    assert found[0] == found[1] and found[0]["resume"] == "auto"
    assert arguments.parse(found[0]).scenario == "harmful"
