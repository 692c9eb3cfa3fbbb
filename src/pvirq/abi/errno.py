"""Errno values as hypercalls return them (xen/include/public/errno.h), and the exception that carries one."""

from enum import IntEnum


class Errno(IntEnum):
    """Xen's own errno numbers. They equal Linux's for x86, which the guests rely on."""

    EPERM = 1
    ENOENT = 2
    ESRCH = 3
    EINTR = 4
    EIO = 5
    ENXIO = 6
    E2BIG = 7
    ENOEXEC = 8
    EBADF = 9
    ECHILD = 10
    EAGAIN = 11
    ENOMEM = 12
    EACCES = 13
    EFAULT = 14
    EBUSY = 16
    EEXIST = 17
    EXDEV = 18
    ENODEV = 19
    ENOTDIR = 20
    EISDIR = 21
    EINVAL = 22
    ENFILE = 23
    EMFILE = 24
    ENOSPC = 28
    EROFS = 30
    EMLINK = 31
    EDOM = 33
    ERANGE = 34
    EDEADLK = 35
    ENAMETOOLONG = 36
    ENOLCK = 37
    ENOSYS = 38
    ENOTEMPTY = 39
    ENODATA = 61
    ETIME = 62
    EBADMSG = 74
    EOVERFLOW = 75
    EILSEQ = 84
    EUSERS = 87
    EOPNOTSUPP = 95
    EADDRINUSE = 98
    EADDRNOTAVAIL = 99
    ENOBUFS = 105
    EISCONN = 106
    ENOTCONN = 107
    ETIMEDOUT = 110
    ECONNREFUSED = 111


class XenError(Exception):
    """An operation failed as Xen fails it; `errno` is what the caller would have got, negated.

    Raised by `pvirq.xen` and the drivers for anything that a guest's arguments can provoke. The hypercall
    layer turns it into -errno in the guest's RAX; modelled domains and tests see the exception.
    """

    def __init__(self, errno: int, why: str = "") -> None:
        self.errno = Errno(errno)
        self.why = why
        super().__init__(self.errno.name + (f": {why}" if why else ""))
