"""The command line: SGLang's names, their meaning here, and mistakes."""

from __future__ import annotations

import logging
import socket
from collections.abc import Sequence

import pytest
from click.testing import CliRunner

from hicache_core.cli.main import cli, main
from hicache_core.errors import ConfigError
from hicache_core.process.logs import forget_logged
from hicache_core.server.settings import notices
from tests.server.tiny import parsed

MODEL = ["--model-path", "tiny"]
EXTRA_FLAG = "--hicache-storage-backend-extra-config"
OFFLOAD = ["--disaggregation-mode", "decode", "--disaggregation-decode-enable-offload-kvcache"]


def refusal(flags: Sequence[str]) -> str:
    """What ``hicache serve`` says to flags that it does not take."""
    result = CliRunner().invoke(cli, ["serve", *flags])
    assert result.exit_code == 2
    return result.output


def test_defaults_are_loopback_and_the_device_tier() -> None:
    settings = parsed(MODEL)
    assert settings.host == "127.0.0.1"
    assert settings.cache.enable_hierarchical_cache is False
    assert list(notices(settings, "cpu")) == []


def test_every_flag_reaches_its_setting() -> None:
    flags = "--served-model-name x --port 0 --tp 2 --log-level INFO --mem-fraction-static 0.5"
    flags += " --max-total-tokens 99 --context-length 88 --max-running-requests 7"
    flags += " --max-queued-requests 6 --chunked-prefill-size 5 --enable-metrics"
    flags += " --enable-cache-report --api-key a --admin-api-key b --shutdown-timeout 3"
    flags += " --watchdog-timeout 9.5 --page-size 16 --enable-hierarchical-cache --hicache-ratio 3"
    settings = parsed([*MODEL, *flags.split()])
    assert (settings.served_model_name, settings.port, settings.tp) == ("x", 0, 2)
    assert (settings.log_level, settings.shutdown_timeout_s) == ("info", 3)
    assert (settings.enable_metrics, settings.enable_cache_report) == (True, True)
    assert (settings.keys.api, settings.keys.admin) == ("a", "b")
    engine = settings.engine
    assert (engine.device_tokens, engine.context_length, engine.max_running) == (99, 88, 7)
    assert (engine.max_waiting, engine.chunk_tokens, engine.mem_fraction_static) == (6, 5, 0.5)
    assert engine.stall_timeout_s == 9.5
    cache = settings.cache
    assert (cache.page_size, cache.hicache_ratio) == (16, 3)
    assert cache.enable_hierarchical_cache is True


def test_keys_come_from_the_environment_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HICACHE_API_KEY", "a")
    monkeypatch.setenv("HICACHE_ADMIN_API_KEY", "b")
    settings = parsed(MODEL)
    assert (settings.keys.api, settings.keys.admin) == ("a", "b")
    assert "'a'" not in repr(settings)


def test_the_secret_of_transfers_comes_from_the_environment_and_is_not_shown(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HICACHE_DISAGGREGATION_SECRET", "correct horse battery")
    settings = parsed([*MODEL, "--disaggregation-mode", "decode"])
    assert settings.keys.transfer == "correct horse battery"
    assert "horse" not in repr(settings)


def test_storage_without_the_hierarchical_cache_is_left_out_and_said_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    forget_logged()
    settings = parsed([*MODEL, "--hicache-storage-backend", "file"])
    said = list(notices(settings, "cpu"))
    for _ in range(2):
        settings.cache.resolve()
    said += [record.getMessage() for record in caplog.records]
    words = "asked for file, using none: storage needs enable_hierarchical_cache: true"
    assert [words in line for line in said] == [True]


def test_who_gives_a_size_is_told_nothing_of_the_ratio_that_nobody_asked_for(
    caplog: pytest.LogCaptureFixture,
) -> None:
    forget_logged()
    with caplog.at_level(logging.INFO, "hicache_core"):
        cache = parsed([*MODEL, "--enable-hierarchical-cache", "--hicache-size", "1"]).cache
        assert cache.resolve().in_force.hicache_ratio == 0
    assert caplog.records == []


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--hicache-storage-backend", "reddis"], "did you mean 'redis'"),
        (["--hicache-storage-backend", "file"], "file.path: this setting is required"),
        (
            [
                "--hicache-storage-backend",
                "memory",
                "--hicache-storage-backend-extra-config",
                '{"extra_backend_tag": "a"}',
            ],
            "extra_backend_tag: this setting exists in SGLang only; give each store a path",
        ),
        (["--kv-events-config", '{"publisher": "kafka"}'], "allowed: zmq, null"),
        (["--kv-events-config", '{"endpont": "x"}'], "endpont"),
    ],
)
def test_settings_are_checked_before_the_model_is_loaded(
    capsys: pytest.CaptureFixture[str], flags: list[str], said: str
) -> None:
    asked = ["serve", "--model-path", "/nowhere", "--port", "0", "--enable-hierarchical-cache"]
    with pytest.raises(SystemExit):
        main([*asked, *flags])
    error = capsys.readouterr().err
    assert said in error
    assert "/nowhere" not in error


def test_flags_of_sglang_that_change_nothing_are_taken_and_said() -> None:
    settings = parsed([*MODEL, "--trust-remote-code", "--attention-backend", "triton"])
    said = "\n".join(notices(settings, "cpu"))
    assert "--trust-remote-code is taken" in said
    assert "--attention-backend is taken" in said


def test_what_clients_may_ask_for_of_priority_is_set_by_the_operator() -> None:
    assert parsed(MODEL).max_client_priority == 0
    assert parsed([*MODEL, "--max-client-priority", "7"]).max_client_priority == 7
    assert parsed([*MODEL, "--enable-priority-scheduling"]).max_client_priority == (1 << 31) - 1


def test_a_decode_server_that_offloads_has_host_and_storage() -> None:
    settings = parsed([*MODEL, *OFFLOAD, "--hicache-storage-backend", "file"])
    assert settings.cache.enable_hierarchical_cache is True
    assert settings.cache.resolve().in_force.hicache_storage_backend == "file"
    assert settings.engine.offload_stride > 0
    assert settings.cache.hicache_host_retention == "free_once_stored"
    assert parsed(MODEL).cache.hicache_host_retention == "keep"
    kept = parsed([*MODEL, *OFFLOAD, "--hicache-host-retention", "keep"]).cache
    assert (kept.hicache_host_retention, kept.enable_hierarchical_cache) == ("keep", True)


def test_a_setting_keeps_its_source_where_the_server_adds_its_own_defaults(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HICACHE_RATIO", "3")
    sources = parsed([*MODEL, "--page-size", "16"]).cache.sources
    assert sources["page_size"] == "flag --page-size"
    assert sources["hicache_ratio"] == "environment HICACHE_RATIO"
    assert sources["enable_hierarchical_cache"] == "default of hicache serve"
    assert sources["hicache_io_backend"] == "default"
    offloads = parsed([*MODEL, *OFFLOAD, "--page-size", "16"]).cache.sources
    assert offloads["page_size"] == "flag --page-size"
    assert offloads["hicache_host_retention"] == f"flag {OFFLOAD[-1]}"


def test_size_zero_means_the_ratio() -> None:
    flags = [*MODEL, "--enable-hierarchical-cache", "--hicache-size", "0", "--hicache-ratio", "2"]
    in_force = parsed(flags).cache.resolve().in_force
    assert (in_force.hicache_size, in_force.hicache_ratio) == (0, 2)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--disaggregation-ib-device", "mlx5_0,mlx5_1"], "mlx5_0,mlx5_1 has no effect"),
        (["--mem-fraction-static", "0.5"], "--max-total-tokens"),
        (["--host", "0.0.0.0"], "no --api-key"),
        (["--host", "0.0.0.0", "--disaggregation-mode", "prefill"], "no --disaggregation-secret"),
        (["--host", "0.0.0.0", "--disaggregation-mode", "decode"], "no --disaggregation-secret"),
    ],
)
def test_what_has_no_effect_or_is_open_is_said_at_start(flags: list[str], said: str) -> None:
    assert said in "\n".join(notices(parsed([*MODEL, *flags]), "cpu"))


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--page-sise", "8"], "--page-size"),
        (["--enable-hierachical-cache"], "--enable-hierarchical-cache"),
        (["--disaggregation-mod", "prefill"], "--disaggregation-mode"),
        (["--tp", "0"], "--tp"),
        (["--port", "70000"], "--port"),
        (["--log-level", "loud"], "--log-level"),
        (["--disaggregation-mode", "both"], "prefill"),
    ],
)
def test_a_wrong_flag_is_refused_and_the_nearest_is_named(flags: list[str], said: str) -> None:
    assert said in refusal([*MODEL, *flags])


def test_the_model_must_be_named() -> None:
    assert "--model-path" in refusal([])


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--mem-fraction-static", "1.5"], "mem_fraction_static"),
        (["--disaggregation-ib-device", "mlx5 0"], "device names"),
        (["--disaggregation-decode-enable-offload-kvcache"], "decode server"),
        (["--hicache-mem-layout", "page"], "page_first"),
        (["--hicache-storage-backend-extra-config", "{"], "JSON"),
    ],
)
def test_a_wrong_value_is_a_config_error(flags: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parsed([*MODEL, *flags])


def test_a_model_that_is_not_there_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["serve", "--model-path", "/nowhere", "--port", "0"])
    assert "no folder and no GGUF file" in capsys.readouterr().err


def test_a_port_that_is_taken_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        with pytest.raises(SystemExit):
            main(["serve", "--model-path", "/nowhere", "--port", port])
    assert "cannot listen" in capsys.readouterr().err
