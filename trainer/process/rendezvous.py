"""Rendezvous of the ranks of one node: a store that listens only on 127.0.0.1.

torch's own store listens on every interface, even if the ranks are given 127.0.0.1, and trusts every client, although
it holds the addresses at which ranks look for each other. torch accepts an already listening socket
(`master_listen_fd`), and torchrun accepts further kinds of rendezvous (entry points of the group `torchrun.handlers`):

    torchrun --rdzv-backend=loopback --nproc-per-node=2 -m trainer ...                a port that is free
    torchrun --rdzv-backend=loopback --rdzv-conf=port=29500 --nproc-per-node=2 ...    this port

One kernel call finds and binds the port, so no other program can take it in between.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

HOST = "127.0.0.1"
SOCKET_VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


def local_store(port: int, timeout: timedelta) -> TCPStore:
    """A store that only this machine can reach. port: 0 for a free one. Raises OSError if it is taken."""
    with socket.socket() as listener:
        # As torch does: closed connections in TIME_WAIT do not block the port, another listener does.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((HOST, port))
        listener.listen(socket.SOMAXCONN)
        port = listener.getsockname()[1]
        return TCPStore(
            HOST, port, is_master=True, timeout=timeout, wait_for_workers=False, master_listen_fd=listener.detach()
        )


def create(parameters: Any) -> Any:
    """For torchrun: its static rendezvous of one node, with such a store. The agent holds it, its ranks are clients.

    parameters: RendezvousParameters. Raises ValueError for several nodes.
    """
    # torch imports this module while it imports the package that contains these names.
    from torch.distributed.elastic.rendezvous.static_tcp_rendezvous import StaticTCPRendezvous

    class LoopbackRendezvous(StaticTCPRendezvous):
        def get_backend(self) -> str:
            return "loopback"

        def next_rendezvous(self) -> Any:
            if not self._store:
                store = local_store(self.master_port, self.timeout)
                self._store, self.master_port = store, store.port
            return super().next_rendezvous()

    if parameters.max_nodes != 1:
        raise ValueError("--rdzv-backend=loopback: for one node; several meet at --master-addr and --master-port")
    port, timeout = (int(parameters.config.get(name, default)) for name, default in (("port", 0), ("timeout", 600)))
    return LoopbackRendezvous(HOST, port, 0, 1, parameters.run_id, timeout)


def handler() -> Callable[[Any], Any]:
    """The entry point."""
    return create


def stay_on_this_machine() -> None:
    """For the ranks of one node: their own sockets use the loopback interface too, unless the user names another.

    Call it before the process group is made.
    """
    names = {name for _, name in socket.if_nameindex()}
    loopback = next((name for name in ("lo", "lo0") if name in names), None)
    for name in SOCKET_VARIABLES:
        if loopback is not None:
            os.environ.setdefault(name, loopback)
