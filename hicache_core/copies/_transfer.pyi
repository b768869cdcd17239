"""The native module of ``transfer.native``; its source is _transfer.c."""

from array import array

def copy_rows(
    plans: bytes | memoryview,
    device_pages: array[int],
    n_device_pages: int,
    host_pages: array[int],
    n_host_pages: int,
    to_host: bool,
    /,
) -> None: ...
