"""What a process may give up before it begins: functions for `prepare` of `processes.start`."""

from __future__ import annotations

import ctypes
import os
import resource

DAC_CAPABILITIES = (1, 2)  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH: with them root may read and write everything
PR_CAPBSET_DROP = 24
CAPABILITY_VERSION_3 = 0x20080522
LARGEST_FILE_BYTES = 8 * 1024


def drop_dac() -> None:
    """Takes root's right to ignore file modes, so that chmod means something. Others have none to lose."""
    if os.geteuid() != 0:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION_3, 0)
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; twice, of 32 capabilities each
    assert libc.capget(header, sets) == 0
    for capability in DAC_CAPABILITIES:
        libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)  # or an exec gives them back
        for place in range(3):
            sets[place] &= ~(1 << capability)
    assert libc.capset(header, sets) == 0


def limit_file_size() -> None:
    """No file may grow beyond `LARGEST_FILE_BYTES`."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (LARGEST_FILE_BYTES, LARGEST_FILE_BYTES))
