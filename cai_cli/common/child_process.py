"""Child processes that end with this one."""

import ctypes
import signal
import subprocess
import sys


def wait_for(child: subprocess.Popen[bytes]) -> int:
    """The exit code of a child process, once it has ended. An interrupt of this process terminates it first."""
    try:
        return child.wait()
    except BaseException:
        child.send_signal(signal.SIGTERM)
        child.wait()
        raise


def die_with_parent() -> None:
    """Terminate this process when its parent is killed (Linux only; elsewhere the lock still protects the output)."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)
