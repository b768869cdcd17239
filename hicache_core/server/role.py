"""The role of a rank: the half of a pair that a server's settings make of its engine, if any."""

from __future__ import annotations

from hicache_core.disaggregation.roles import Role, RoleSettings
from hicache_core.engine.engine import Engine
from hicache_core.engine.model import LoadedModel
from hicache_core.engine.scheduler import Scheduler
from hicache_core.engine.tensor_ranks import TensorRanks
from hicache_core.server.settings import ServerSettings, goes_over_rdma


def role_of(settings: ServerSettings, rank: int = 0) -> Role | None:
    """The half that a rank of a server is; None for one that does both.

    With a bootstrap port, rank n hands KV over n ports further on.

    Raises:
        ConfigError, PluginError: the transfer backend cannot be used.
    """
    asked = settings.disaggregation
    if asked.mode == "null":
        return None
    port = asked.bootstrap_port and asked.bootstrap_port + rank
    transfer: dict[str, object] = {"host": settings.host, "port": port}
    if settings.keys.transfer is not None:
        transfer["secret"] = settings.keys.transfer
    if asked.ib_device and goes_over_rdma(asked):
        transfer |= {"protocol": "rdma", "device_name": asked.ib_device}
    return Role(RoleSettings(asked.mode, asked.transfer_backend, transfer))


def make_engine(
    settings: ServerSettings,
    model: LoadedModel,
    role: Role | None,
    ranks: TensorRanks | None = None,
) -> Engine:
    """The engine of a rank, not open yet.

    Args:
        settings: of the server.
        model: the weights; with several ranks the engine cuts it.
        role: prefill or decode; None for both.
        ranks: the ranks of the server; None for a single one.
    """
    return Engine(
        model,
        settings.cache,
        settings.engine,
        ranks=ranks,
        make_scheduler=Scheduler if role is None else role.make_scheduler,
        moves_groups=role is not None and role.moves_groups,
    )
