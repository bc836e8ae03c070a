"""Ranks that ``torchrun`` starts again must not meet the addresses, nor believe the notes, of those before them."""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping, MutableMapping

from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from nemo_eaft.launch import START, several_machines

OWN_STORES = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
"""Environment variable of ``torchrun``, 2.4 and later: 1 gives each start of the ranks a store of its own."""


def check_store(environment: Mapping[str, str] = os.environ) -> None:
    """Refuse restarts on several machines with one store for all of them: torchrun's c10d rendezvous has one unless
    :data:`OWN_STORES` is set, its static rendezvous (the default) always.

    Its address is that of the first start, which a machine that came later never learns; and ranks that are started
    again find the addresses of those before them, as :func:`store_of_this_attempt` says.

    Raises:
        ValueError: naming what makes it work.
    """
    restarts = environment.get("TORCHELASTIC_MAX_RESTARTS", "0")
    if restarts == "0" or not several_machines(environment) or not _uses_agent_store(environment):
        return
    without = "without it ranks that are started again wait for those before them"
    if environment.get(OWN_STORES) == "1":
        # elastic/rendezvous/static_tcp_rendezvous.py, torch 2.13: use_agent_store is True whatever is set.
        raise ValueError(
            f"torchrun --max-restarts={restarts} on several machines needs --rdzv-backend=c10d, with --rdzv-id and "
            f"--rdzv-endpoint as in examples/torchrun.sh; this is static rendezvous, torchrun's default: {without}"
        )
    raise ValueError(
        f"torchrun --max-restarts={restarts} on several machines needs --rdzv-backend=c10d and {OWN_STORES}=1 in the "
        f"environment of each torchrun (examples/torchrun.sh has both): {without}"
    )


def name_this_start(environment: MutableMapping[str, str] = os.environ) -> None:
    """Give this start of the ranks a name that the next one will not have, in the environment variable START.

    Where torchrun on several machines is told a port, as its static rendezvous is, nothing else in the environment of
    the ranks differs between two starts of it. The first rank to ask leaves the name in the store that all of them are
    going to meet in, which begins and ends with torchrun on the first machine. Every rank of a job calls it, before it
    reads or writes what :func:`nemo_eaft.launch.job_identity` marks. A start that has a store of its own has its port.

    Raises:
        torch.distributed.DistNetworkError: the store cannot be reached.
    """
    environment.pop(START, None)
    if not several_machines(environment) or not _uses_agent_store(environment):
        return
    store = TCPStore(environment["MASTER_ADDR"], int(environment["MASTER_PORT"]), is_master=False)
    # Sets it where it is not set, in one step; then what is there.
    environment[START] = store.compare_set("nemo_eaft/start", "", uuid.uuid4().hex).decode()


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
