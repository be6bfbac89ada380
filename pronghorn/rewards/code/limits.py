"""What untrusted code may use."""

from __future__ import annotations

from dataclasses import dataclass, fields

from ...config.errors import ConfigError

MIB = 2**20


@dataclass(frozen=True)
class Limits:
    """Limits of one run in the sandbox.

    Attributes:
        seconds: wall time, its start-up of about 0.1 s included.
        cpu_seconds: processor time of each process, in whole seconds.
        memory_mb: address space of each process; the whole program's memory where `processes` is 1.
        processes: how many may exist at once. At 1 nothing can be started, and up to 32 threads run; above 1 it counts
            processes and threads together.
        file_mb: size of one file.
        disk_mb: all files together; they lie in memory, and go when the program ends.
        files: open files of a process, and files and folders that may exist.
        output_kb: stdout and stderr, each; a program that writes more is ended.
    """

    seconds: float = 10.0
    cpu_seconds: int = 5
    memory_mb: int = 256
    processes: int = 1
    file_mb: int = 8
    disk_mb: int = 16
    files: int = 64
    output_kb: int = 64

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not value > 0 or (field.name != "seconds" and value != int(value)):
                number = "seconds above 0" if field.name == "seconds" else "a whole number above 0"
                raise ConfigError(f"Limits: {field.name}={value} is out of range; give {number}")
