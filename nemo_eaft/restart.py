"""Ranks that ``torchrun --max-restarts`` starts again must not meet the addresses of their dead predecessors."""

from __future__ import annotations

import os
from collections.abc import Mapping

from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from nemo_eaft.launch import several_machines

OWN_STORES = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
"""Environment variable of ``torchrun``, 2.4 and later: 1 gives each start of the ranks a store of its own."""


def check_store(environment: Mapping[str, str] = os.environ) -> None:
    """Refuse restarts on several machines with one store for all of them.

    Its address is that of the first start, which a machine that came later never learns; and ranks that are started
    again find the addresses of those before them, as :func:`store_of_this_attempt` says.

    Raises:
        ValueError: naming the variable that makes it work.
    """
    restarts = environment.get("TORCHELASTIC_MAX_RESTARTS", "0")
    if restarts == "0" or not several_machines(environment) or not _uses_agent_store(environment):
        return
    raise ValueError(
        f"torchrun --max-restarts={restarts} on several machines needs {OWN_STORES}=1 in the environment of each "
        f"torchrun (examples/torchrun.sh sets it): without it ranks that are started again wait for those before them"
    )


def store_of_this_attempt(environment: Mapping[str, str] = os.environ) -> Store | None:
    """The store for ``init_process_group`` of ranks that were started again; None leaves torch its own.

    torch 2.13 keeps one store for all attempts of an agent (elastic/rendezvous/dynamic_rendezvous.py,
    ``_shared_tcp_store_server``) and no longer sets them apart (distributed/rendezvous.py, ``_create_c10d_store``: "a
    new TCPStore for every retry", which is not so). A rank that is there before rank 0 then reads the addresses of the
    last attempt and waits for processes that are gone. A prefix per attempt keeps them apart.

    On one machine only: several count their restarts each for itself, so the number is no common name there, and
    :func:`check_store` asks for another way.
    """
    attempt = environment.get("TORCHELASTIC_RESTART_COUNT", "0")
    if attempt == "0" or several_machines(environment) or not _uses_agent_store(environment):
        return None
    address, port = environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
    return PrefixStore(f"nemo_eaft/attempt_{attempt}", TCPStore(address, port, is_master=False))


def _uses_agent_store(environment: Mapping[str, str]) -> bool:
    return environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
