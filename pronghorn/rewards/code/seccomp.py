"""The system calls that untrusted code may not make, as a classic BPF program for seccomp.

The second wall behind the namespaces: what widens the kernel's surface (namespaces, mounts, tracing, BPF, io_uring,
keys), memory that no limit counts (memfd, System V), sockets other than local ones, and new processes where only one is
allowed. Source: seccomp(2), linux/filter.h, and the kernel's syscall tables.
"""

from __future__ import annotations

import errno
import platform
import struct

from .errors import SandboxError

_AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_LD, _JEQ, _JGE, _JSET, _RET = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _ERRNO, _KILL = 0x7FFF0000, 0x00050000, 0x80000000
_NR, _ARCH, _ARG0 = 0, 4, 16  # offsets in struct seccomp_data; the low half of an argument comes first
_CLONE_THREAD, _CLONE_NEW_ANYTHING = 0x00010000, 0x7E020080
_AF_UNIX = 1
_X32 = 0x40000000

# name: (x86_64, aarch64). From 424 on the numbers are the same everywhere.
_DENIED: dict[str, tuple[int, int]] = {
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "kcmp": (312, 272),
    "pidfd_open": (434, 434), "pidfd_getfd": (438, 438), "process_madvise": (440, 440),
    "unshare": (272, 97), "setns": (308, 268), "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41),
    "chroot": (161, 51), "open_tree": (428, 428), "move_mount": (429, 429), "fsopen": (430, 430),
    "fsconfig": (431, 431), "fsmount": (432, 432), "fspick": (433, 433), "mount_setattr": (442, 442),
    "name_to_handle_at": (303, 264), "open_by_handle_at": (304, 265), "quotactl": (179, 60), "swapon": (167, 224),
    "swapoff": (168, 225), "acct": (163, 89), "reboot": (169, 142), "sethostname": (170, 161),
    "setdomainname": (171, 162), "init_module": (175, 105), "delete_module": (176, 106), "finit_module": (313, 273),
    "kexec_load": (246, 104), "kexec_file_load": (320, 294), "syslog": (103, 116), "bpf": (321, 280),
    "perf_event_open": (298, 241), "userfaultfd": (323, 282), "add_key": (248, 217), "request_key": (249, 218),
    "keyctl": (250, 219), "io_uring_setup": (425, 425), "io_uring_enter": (426, 426), "io_uring_register": (427, 427),
    "memfd_create": (319, 279), "memfd_secret": (447, 447), "shmget": (29, 194), "shmat": (30, 196),
    "msgget": (68, 186), "semget": (64, 190), "mq_open": (240, 180), "personality": (135, 92), "seccomp": (317, 277),
    "fanotify_init": (300, 262), "lookup_dcookie": (212, 18), "move_pages": (279, 239), "migrate_pages": (256, 238),
    "mbind": (237, 235), "set_mempolicy": (238, 237), "clock_settime": (227, 112), "settimeofday": (164, 170),
    "adjtimex": (159, 171), "clock_adjtime": (305, 266), "vhangup": (153, 58), "io_setup": (206, 0),
}  # fmt: skip
_FORK = {"fork": 57, "vfork": 58}  # x86_64 alone has them
_CLONE, _CLONE3, _SOCKET = {"x86_64": 56, "aarch64": 220}, 435, {"x86_64": 41, "aarch64": 198}


def program(processes: int) -> bytes:
    """The filter as an array of `struct sock_filter` (8 bytes each, little endian).

    Refused calls fail with EPERM, `clone3` with ENOSYS (its flags lie in memory, where a filter cannot look; libraries
    then call `clone`). A call of another architecture's table kills the program.

    Raises:
        SandboxError: neither x86_64 nor aarch64.
    """
    machine = platform.machine()
    if machine not in _AUDIT_ARCH:
        raise SandboxError(
            f"no seccomp filter for the processor architecture {machine!r} (x86_64 and aarch64 have one)"
        )
    x86 = machine == "x86_64"
    denied = {numbers[0 if x86 else 1] for numbers in _DENIED.values()}
    if x86 and processes == 1:
        denied |= set(_FORK.values())
    lines = [(_LD, 0, 0, _ARCH), (_JEQ, 1, 0, _AUDIT_ARCH[machine]), (_RET, 0, 0, _KILL), (_LD, 0, 0, _NR)]
    if x86:
        lines += [(_JGE, 0, 1, _X32), (_RET, 0, 0, _KILL)]
    for number in sorted(denied):
        lines += [(_JEQ, 0, 1, number), (_RET, 0, 0, _ERRNO | errno.EPERM)]
    lines += [(_JEQ, 0, 1, _CLONE3), (_RET, 0, 0, _ERRNO | errno.ENOSYS)]
    refuse, allow = (_RET, 0, 0, _ERRNO | errno.EPERM), (_RET, 0, 0, _ALLOW)
    # clone: with one process only threads, with more no namespaces
    test = (_JSET, 0, 1, _CLONE_THREAD) if processes == 1 else (_JSET, 1, 0, _CLONE_NEW_ANYTHING)
    lines += [(_JEQ, 0, 4, _CLONE[machine]), (_LD, 0, 0, _ARG0), test, allow, refuse]
    lines += [(_JEQ, 0, 4, _SOCKET[machine]), (_LD, 0, 0, _ARG0), (_JEQ, 0, 1, _AF_UNIX), allow, refuse]
    return b"".join(struct.pack("<HBBI", *line) for line in [*lines, allow])
