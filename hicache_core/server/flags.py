"""Flags of the server: SGLang's names, and every setting of the cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import click

from hicache_core.config.flags import FiniteRange, config_flags, load_config
from hicache_core.engine.config import EngineConfig
from hicache_core.server.access import Keys
from hicache_core.server.settings import (
    DEFAULTS,
    DTYPES,
    OFFLOAD_FLAG,
    Disaggregation,
    ServerSettings,
    as_sglang_means,
)

Command = TypeVar("Command", bound=Callable[..., Any])

LOG_LEVELS = ("debug", "info", "warning", "error", "critical")
TRANSFER_BACKENDS = ("mooncake", "tcp")

MAX_PRIORITY = (1 << 31) - 1

_COUNT = click.IntRange(min=1)
_OPTIONS: tuple[Callable[[Any], Any], ...] = (
    click.option(
        "--model-path",
        "--model",
        required=True,
        help="A folder that transformers saved, a GGUF file, packaged weights (smollm2 or "
        "gemma3-270m), or the name of a model in the cache of Hugging Face's hub.",
    ),
    click.option(
        "--served-model-name",
        default="",
        help="Model name for clients. Default: a folder's path or the name on the hub, so that "
        "clients find the tokenizer; of other models their own name.",
    ),
    click.option(
        "--dtype",
        type=click.Choice(DTYPES),
        default="auto",
        show_default=True,
        help="Of weights and KV; auto is float32 on a CPU and bfloat16 on a GPU.",
    ),
    click.option(
        "--chat-template",
        default="",
        help="File with a Jinja template for chats. Default: the model's own.",
    ),
    click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on."),
    click.option(
        "--port",
        type=click.IntRange(0, 65535),
        default=30000,
        show_default=True,
        help="Port to listen on; 0 for any free port.",
    ),
    click.option(
        "--tp",
        "--tp-size",
        "--tensor-parallel-size",
        "tp",
        type=_COUNT,
        default=1,
        show_default=True,
        help="Number of processes that share the model; must divide its number of KV heads.",
    ),
    click.option(
        "--log-level",
        type=click.Choice(LOG_LEVELS, case_sensitive=False),
        default="info",
        show_default=True,
        help="Level of the log.",
    ),
    click.option(
        "--mem-fraction-static",
        type=float,
        default=DEFAULTS.mem_fraction_static,
        show_default=True,
        help="Share of a GPU's memory for weights and device tier.",
    ),
    click.option("--max-total-tokens", type=_COUNT, help="Size of the device tier in tokens."),
    click.option(
        "--context-length",
        type=_COUNT,
        help="Maximum number of tokens in prompt and answer together.",
    ),
    click.option(
        "--max-running-requests",
        type=_COUNT,
        default=DEFAULTS.max_running,
        show_default=True,
        help="Maximum number of requests computed at the same time.",
    ),
    click.option(
        "--max-queued-requests",
        type=_COUNT,
        default=DEFAULTS.max_waiting,
        show_default=True,
        help="Maximum number of queued requests; further ones get 503.",
    ),
    click.option(
        "--chunked-prefill-size",
        type=_COUNT,
        default=DEFAULTS.chunk_tokens,
        show_default=True,
        help="Prompt tokens computed in one step.",
    ),
    click.option(
        "--max-client-priority",
        type=click.IntRange(0, MAX_PRIORITY),
        help="Highest priority of requests without the admin key. Default: 0.",
    ),
    click.option(
        "--enable-priority-scheduling",
        is_flag=True,
        help="Let clients choose any priority, as in SGLang.",
    ),
    click.option(
        "--watchdog-timeout",
        type=FiniteRange(0, min_open=True),
        default=DEFAULTS.stall_timeout_s,
        show_default=True,
        help="If a request makes no progress for so many seconds, /health answers 503.",
    ),
    click.option("--enable-metrics", is_flag=True, help="Serve /metrics."),
    click.option("--enable-cache-report", is_flag=True, help="Report cached tokens in usage."),
    click.option(
        "--log-requests",
        is_flag=True,
        help="Log a line for each request that has ended: its tokens by tier and its times.",
    ),
    click.option(
        "--api-key",
        envvar="HICACHE_API_KEY",
        help="API key that clients must send. Prefer the environment variable HICACHE_API_KEY, "
        "since other users of this machine can see flags.",
    ),
    click.option(
        "--admin-api-key",
        envvar="HICACHE_ADMIN_API_KEY",
        help="API key for calls that change the cache. Environment: HICACHE_ADMIN_API_KEY.",
    ),
    click.option(
        "--shutdown-timeout",
        type=FiniteRange(0, 3600),
        default=20.0,
        show_default=True,
        help="Seconds for running requests when the server ends, and again for backups.",
    ),
    click.option(
        "--disaggregation-mode",
        type=click.Choice(("null", "prefill", "decode")),
        default="null",
        show_default=True,
        help="Run only prefill or only decode; null runs both.",
    ),
    click.option(
        "--disaggregation-transfer-backend",
        type=click.Choice(TRANSFER_BACKENDS),
        default="mooncake",
        show_default=True,
        help="How KV moves from prefill to decode servers.",
    ),
    click.option(
        "--disaggregation-bootstrap-port",
        type=click.IntRange(0, 65535),
        default=0,
        show_default=True,
        help="Port where a prefill server hands KV over; 0 for any free port (routers ask for it).",
    ),
    click.option(
        "--disaggregation-secret",
        envvar="HICACHE_DISAGGREGATION_SECRET",
        help="Secret that prefill and decode servers share to exchange KV. Prefer the environment "
        "variable HICACHE_DISAGGREGATION_SECRET.",
    ),
    click.option(
        "--disaggregation-ib-device",
        default="",
        help="RDMA devices separated by commas, such as mlx5_0,mlx5_1.",
    ),
    click.option(
        OFFLOAD_FLAG,
        is_flag=True,
        help="Let a decode server cache what it generates in its host and storage tiers.",
    ),
)


# Of SGLang's server: they choose how it computes, and change nothing of an answer or of the cache.
_SWITCHES = (
    "--trust-remote-code",
    "--disable-cuda-graph",
    "--skip-server-warmup",
)
_CHOICES = (
    "--attention-backend",
    "--cuda-graph-max-bs",
    "--decode-log-interval",
    "--sampling-backend",
    "--schedule-conservativeness",
)


def server_flags(command: Command) -> Command:
    """Decorates a click command with the flags of the server and of the cache."""
    command = config_flags(command)
    for option in reversed(_OPTIONS):
        command = option(command)
    for name in _SWITCHES:
        command = click.option(name, is_flag=True, hidden=True)(command)
    for name in _CHOICES:
        command = click.option(name, hidden=True)(command)
    return command


def settings_of(options: Mapping[str, Any]) -> ServerSettings:
    """The settings that a command with ``server_flags`` was given.

    Raises:
        ConfigError: a value is wrong.
    """
    disaggregation = Disaggregation(
        options["disaggregation_mode"],
        options["disaggregation_transfer_backend"],
        options["disaggregation_ib_device"],
        options["disaggregation_decode_enable_offload_kvcache"],
        options["disaggregation_bootstrap_port"],
    )
    return ServerSettings(
        model_path=options["model_path"],
        cache=as_sglang_means(load_config(options), offload=disaggregation.offload),
        engine=EngineConfig(
            max_running=options["max_running_requests"],
            max_waiting=options["max_queued_requests"],
            chunk_tokens=options["chunked_prefill_size"],
            device_tokens=options["max_total_tokens"],
            context_length=options["context_length"],
            mem_fraction_static=options["mem_fraction_static"],
            offload_stride=1 if disaggregation.offload else 0,
            stall_timeout_s=options["watchdog_timeout"],
        ),
        keys=Keys(
            options["api_key"] or None,
            options["admin_api_key"] or None,
            options["disaggregation_secret"] or None,
        ),
        host=options["host"],
        port=options["port"],
        tp=options["tp"],
        log_level=options["log_level"].lower(),
        served_model_name=options["served_model_name"],
        enable_metrics=options["enable_metrics"],
        enable_cache_report=options["enable_cache_report"],
        log_requests=options["log_requests"],
        shutdown_timeout_s=options["shutdown_timeout"],
        disaggregation=disaggregation,
        max_client_priority=_max_client_priority(options),
        dtype=options["dtype"],
        chat_template=options["chat_template"],
        without_effect=tuple(
            name
            for name in (*_SWITCHES, *_CHOICES)
            if options[name.removeprefix("--").replace("-", "_")]
        ),
    )


def _max_client_priority(options: Mapping[str, Any]) -> int:
    asked: int | None = options["max_client_priority"]
    if asked is not None:
        return asked
    return MAX_PRIORITY if options["enable_priority_scheduling"] else 0
