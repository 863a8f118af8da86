"""What tells processes of each other."""

import socket


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def with_flags(index: int, port: int) -> tuple[list[str], dict[str, str]]:
    """Flags, and variables of the environment, for one of two processes."""
    return [f"--coordinator=127.0.0.1:{port}", "--num_processes=2", f"--process_id={index}"], {}
