"""System calls that no program in a sandbox needs, refused: what holds memory that no process is charged for, what
reaches beyond the namespaces, and what opens kernels up.

A classic BPF program as bubblewrap takes it: see seccomp(2) and linux/filter.h.
"""

import errno
import platform
import struct

_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
"""BPF_LD|W|ABS, and jumps with a constant."""
_NUMBER_AT, _MACHINE_AT, _ARGUMENT_AT = 0, 4, 16
"""In struct seccomp_data."""
_ALLOW, _ERRNO, _KILL = 0x7FFF0000, 0x00050000, 0x80000000
_NEW_NAMESPACES = 0x7E020080
"""CLONE_NEWNS, _NEWCGROUP, _NEWUTS, _NEWIPC, _NEWUSER, _NEWPID, _NEWNET and _NEWTIME."""
_X32 = 0x40000000
FAMILIES = (1, 2, 10, 16)
"""Sockets may be AF_UNIX, AF_INET, AF_INET6, AF_NETLINK: those that a network namespace confines; AF_VSOCK is not."""
_SAME_EVERYWHERE = {
    "io_uring_setup": 425, "io_uring_enter": 426, "io_uring_register": 427, "open_tree": 428, "move_mount": 429,
    "fsopen": 430, "fsconfig": 431, "fsmount": 432, "mount_setattr": 442, "memfd_secret": 447,
}  # fmt: skip
_MACHINES: dict[str, tuple[int, dict[str, int]]] = {
    "x86_64": (
        0xC000003E,
        {"clone": 56, "socket": 41, "memfd_create": 319, "shmget": 29, "msgget": 68, "semget": 64, "mq_open": 240,
         "ptrace": 101, "process_vm_readv": 310, "process_vm_writev": 311, "mount": 165, "umount2": 166,
         "pivot_root": 155, "unshare": 272, "setns": 308, "add_key": 248, "request_key": 249, "keyctl": 250,
         "bpf": 321, "perf_event_open": 298, "userfaultfd": 323},
    ),
    "aarch64": (
        0xC00000B7,
        {"clone": 220, "socket": 198, "memfd_create": 279, "shmget": 194, "msgget": 186, "semget": 190, "mq_open": 180,
         "ptrace": 117, "process_vm_readv": 270, "process_vm_writev": 271, "mount": 40, "umount2": 39,
         "pivot_root": 41, "unshare": 97, "setns": 268, "add_key": 217, "request_key": 218, "keyctl": 219,
         "bpf": 280, "perf_event_open": 241, "userfaultfd": 282},
    ),
}  # fmt: skip
_CLONE3 = 435
"""Its flags are in memory, which no filter sees; without it the C library takes clone."""
MACHINES = tuple(_MACHINES)


def program(machine: str = platform.machine()) -> bytes:
    """For a machine of `MACHINES`; KeyError for another."""
    architecture, numbers = _MACHINES[machine]
    refused = {name: number for name, number in (_SAME_EVERYWHERE | numbers).items() if name not in ("clone", "socket")}
    no, unknown, allow = (_step(_RETURN, what) for what in (_ERRNO | errno.EPERM, _ERRNO | errno.ENOSYS, _ALLOW))
    steps = [_step(_LOAD, _MACHINE_AT), _step(_EQUAL, architecture, 1, 0), _step(_RETURN, _KILL)]
    steps += [_step(_LOAD, _NUMBER_AT), _step(_AT_LEAST, _X32, 0, 1), unknown]
    steps += [_step(_EQUAL, _CLONE3, 0, 1), unknown]
    for number in refused.values():
        steps += [_step(_EQUAL, number, 0, 1), no]
    steps += [_step(_EQUAL, numbers["clone"], 0, 4), _step(_LOAD, _ARGUMENT_AT)]
    steps += [_step(_ANY_BIT, _NEW_NAMESPACES, 0, 1), no, allow]
    steps += [_step(_EQUAL, numbers["socket"], 1, 0), allow, _step(_LOAD, _ARGUMENT_AT)]
    for family in FAMILIES:
        steps += [_step(_EQUAL, family, 0, 1), allow]
    return b"".join([*steps, no])


def _step(code: int, constant: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, if_true, if_false, constant)
