"""Print every setting: the value asked for, its source, and the value in force."""

from __future__ import annotations

import json

import click

from hicache_core.build.config_schema import config_schema
from hicache_core.build.settings_check import check_settings
from hicache_core.cli._columns import columns
from hicache_core.config.flags import config_flags, default_text, load_config
from hicache_core.config.redact import masked
from hicache_core.config.settings import HiCacheConfig, ResolvedConfig


@click.command("config")
@config_flags
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option(
    "--schema",
    is_flag=True,
    help="Print the JSON schema of a configuration file instead, with the settings of the storage "
    "backend if one is named.",
)
def command(*, as_json: bool, schema: bool, **options: object) -> None:
    """Print each setting: the value asked for, its source, and the value in force.

    Secrets are masked. The exit status is 2 if the storage backend is not installed or refuses
    its settings, or if those of KV events are wrong.
    """
    config = load_config(options)
    if schema:
        click.echo(json.dumps(config_schema(config.hicache_storage_backend), indent=2))
        return
    resolved = config.resolve()
    report = _report(resolved)
    if as_json:
        reasons = [str(change) for change in resolved.adjustments]
        click.echo(json.dumps({"settings": report, "adjustments": reasons}, indent=2, default=str))
    else:
        rows = [
            (key, _cell(row["asked"]), str(row["source"]), _cell(row["in_force"]))
            for key, row in report.items()
        ]
        click.echo(columns([("SETTING", "ASKED", "SOURCE", "IN FORCE"), *rows]))
        for change in resolved.refused:
            click.echo(str(change))
    check_settings(resolved.in_force)


def _report(resolved: ResolvedConfig) -> dict[str, dict[str, object]]:
    asked, in_force = resolved.asked, resolved.in_force
    return {
        key: {
            "asked": masked(getattr(asked, key)),
            "source": asked.sources[key],
            "in_force": masked(getattr(in_force, key)),
        }
        for key in HiCacheConfig.model_fields
    }


def _cell(value: object) -> str:
    return json.dumps(value, default=str) if isinstance(value, dict) else default_text(value)
