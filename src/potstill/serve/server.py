"""Loads a model, listens on a socket, and serves until an interrupt."""

import contextlib
import errno
import logging
import socket
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from potstill.core.device import resolve_device, resolve_dtype
from potstill.core.errors import MissingDependency, UsageError
from potstill.decode.drafters.registry import make_speculation
from potstill.decode.generation_config import describe_settings, log_unused_settings, read_sampling_defaults
from potstill.models.load import LoadedModel, load_model
from potstill.serve.auto_size import AutoSize
from potstill.serve.options import ServeOptions

if TYPE_CHECKING:
    from potstill.serve.worker import EngineWorker

log = logging.getLogger("potstill")
GRACE_SECONDS = 3.0  # for answers that are being generated when the server is stopped
CLOSE_SECONDS = 5  # for connections after that
KEEP_ALIVE_SECONDS = 75  # that a connection may be idle; a client that reuses one must not find it closing
MAX_CONNECTIONS = 1000
BACKLOG = 128
LOOPBACK = ("127.0.0.1", "localhost", "::1")


def serve(
    model: str,
    options: ServeOptions | None = None,
    *,
    api_key: str | None = None,
    on_load: Callable[[LoadedModel], object] = lambda _: None,
    on_ready: Callable[[str], object] = print,
) -> None:
    """Serve `model` until an interrupt; `on_ready` receives the URL once the server listens. Port 0 takes a free port.

    `on_load` receives the loaded model before anything uses it.

    Raises: MissingDependency, NotFound; UsageError if the server cannot listen at this address.
    """
    options = options or ServeOptions()
    with explain_missing_dependency():
        import uvicorn

        from potstill.serve.app import create_app
    with open_socket(options.host, options.port) as server_socket:
        loaded = load_model(model, allow_pickle=options.allow_pickle, trust_remote_code=options.trust_remote_code)
        on_load(loaded)
        device = resolve_device(options.device)
        loaded.move_to(device, resolve_dtype(options.dtype, device_type=str(device)))
        app = create_app(
            loaded,
            name=model,
            limits=options.limits,
            sampling_defaults={} if options.ignore_generation_config else choose_sampling_defaults(loaded),
            api_key=api_key,
            allowed_hosts=(options.host, *options.allowed_host),
            speculate=partial(
                make_speculation,
                tokenizer=loaded.tokenizer,
                options=options.drafts,
                load_options={"allow_pickle": options.allow_pickle, "trust_remote_code": options.trust_remote_code},
            ),
            auto_size=AutoSize(token_seconds=options.token_seconds) if options.size == "auto" else None,
        )
        warn_if_open(options.host, api_key)
        config = uvicorn.Config(
            app,
            log_level="critical",
            limit_concurrency=MAX_CONNECTIONS,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=CLOSE_SECONDS,
            server_header=False,
        )
        on_ready(listen(server_socket, options.host))
        make_server(config, app.state.served.worker).run(sockets=[server_socket])


def make_server(config: Any, worker: "EngineWorker") -> Any:
    """A uvicorn server that lets running answers end, or cuts them, before it closes their connections."""
    import uvicorn

    class DrainingServer(uvicorn.Server):
        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            await worker.drain(GRACE_SECONDS)
            await super().shutdown(sockets)

    return DrainingServer(config)


def choose_sampling_defaults(loaded: LoadedModel) -> dict[str, float]:
    """The sampling defaults of the model's generation config, named on stderr with what is not used."""
    defaults = read_sampling_defaults(loaded.model)
    log_unused_settings(loaded.model, loaded.name)
    if defaults:
        log.warning(
            "note: requests that sample and say nothing else use %s of the generation config of %s; "
            "--ignore-generation-config drops them",
            describe_settings(defaults),
            loaded.name,
        )
    return defaults


def warn_if_open(host: str, api_key: str | None) -> None:
    """Name the risk of an address beyond this machine without a key."""
    if host not in LOOPBACK and not api_key:
        log.warning("note: everyone who can reach %s may use this server; --api-key sets a key", host)


@contextlib.contextmanager
def explain_missing_dependency() -> Iterator[None]:
    """Turn a failed import into the command that installs the package.

    Raises: MissingDependency.
    """
    try:
        yield
    except ImportError as error:
        raise MissingDependency(f"{error.name} is not installed; run: pip install 'potstill[serve]'") from error


def open_socket(host: str, port: int) -> socket.socket:
    """A socket that has this address; clients are refused until it listens.

    Raises: UsageError if the port is out of range or taken, or the address is not of this machine.
    """
    if not 0 <= port < 2**16:
        raise UsageError(f"--port {port} is not a port; choose one from 0 to {2**16 - 1}")
    server_socket = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        server_socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server_socket.bind((host, port))
    except OSError as error:
        server_socket.close()
        raise explain_address(host, port, error) from error
    return server_socket


def listen(server_socket: socket.socket, host: str) -> str:
    """Lets clients connect; returns the URL of the server.

    Raises: UsageError if another process listens at this address since.
    """
    port = server_socket.getsockname()[1]
    try:
        server_socket.listen(BACKLOG)
    except OSError as error:
        raise explain_address(host, port, error) from error
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"


def explain_address(host: str, port: int, error: OSError) -> UsageError:
    """The error of an address at which the server cannot listen."""
    if error.errno == errno.EADDRINUSE:
        return UsageError(f"port {port} of {host} is in use; stop the program that uses it, or choose another --port")
    return UsageError(f"cannot listen at {host}:{port} ({error}); choose another --host or --port")
