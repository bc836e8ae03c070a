"""Ranks that ``torchrun --max-restarts`` starts again must not meet the addresses of their dead predecessors."""

from __future__ import annotations

import os
from collections.abc import Mapping

from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]


def store_of_this_attempt(environment: Mapping[str, str] = os.environ) -> Store | None:
    """The store for ``init_process_group`` of ranks that were started again; None leaves torch its own.

    torch 2.13 keeps one store for all attempts of an agent (elastic/rendezvous/dynamic_rendezvous.py,
    ``_shared_tcp_store_server``) and no longer sets them apart (distributed/rendezvous.py, ``_create_c10d_store``: "a
    new TCPStore for every retry", which is not so). A rank that is there before rank 0 then reads the addresses of the
    last attempt and waits for processes that are gone. A prefix per attempt keeps them apart.

    On one machine only: several count their restarts each for itself, so the number is no common name there.
    """
    attempt = environment.get("TORCHELASTIC_RESTART_COUNT", "0")
    one_machine = environment.get("LOCAL_WORLD_SIZE", "") == environment.get("WORLD_SIZE", "?")
    if attempt == "0" or not one_machine or environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    address, port = environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
    return PrefixStore(f"nemo_eaft/attempt_{attempt}", TCPStore(address, port, is_master=False))
