"""The functions of NVIDIA's driver that share device memory between processes, by ctypes.

Every argument has its type: without one ctypes passes a Python number as 32 bits. All calls use the context
that is current in this thread, so the caller makes the GPU's own context current first.
"""

import ctypes
from typing import Any

LIBRARY = "libcuda.so.1"
ADDRESS = ctypes.c_uint64
FILE_DESCRIPTOR = 1
"""CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR."""
_LAZY_PEER_ACCESS = 1
_ON_DEVICE = 1
_READ_WRITE = 3
_RECOMMENDED = 1


class DriverError(OSError):
    """A failed call of the driver; the text has the call and the driver's name of the error."""


class _IpcHandle(ctypes.Structure):
    _fields_ = (("reserved", ctypes.c_char * 64),)


class _Location(ctypes.Structure):
    _fields_ = (("type", ctypes.c_int), ("id", ctypes.c_int))


class _Properties(ctypes.Structure):
    """CUmemAllocationProp."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("handles", ctypes.c_int),
        ("location", _Location),
        ("win32", ctypes.c_void_p),
        ("compression", ctypes.c_ubyte),
        ("rdma", ctypes.c_ubyte),
        ("usage", ctypes.c_ushort),
        ("reserved", ctypes.c_ubyte * 4),
    )


class _Access(ctypes.Structure):
    _fields_ = (("location", _Location), ("flags", ctypes.c_int))


class Driver:
    """The driver library; :class:`DriverError` where there is none or a call fails."""

    def __init__(self) -> None:
        try:
            self._library: Any = ctypes.CDLL(LIBRARY)
        except OSError as error:
            raise DriverError(f"{LIBRARY}: {error}") from None

    def allocate(self, nbytes: int) -> int:
        """Return the address of new device memory."""
        address = ADDRESS()
        self._call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(nbytes))
        return address.value

    def free(self, address: int) -> None:
        """Free what :meth:`allocate` gave."""
        self._call("cuMemFree_v2", ADDRESS(address))

    def copy(self, target: int, source: int, nbytes: int, stream: int) -> None:
        """Copy device memory on ``stream``, by a copy engine; one of the addresses may be a peer's."""
        self._call(
            "cuMemcpyDtoDAsync_v2",
            ADDRESS(target),
            ADDRESS(source),
            ctypes.c_size_t(nbytes),
            ctypes.c_void_p(stream),
        )

    def export_ipc(self, address: int) -> bytes:
        """Return the 64 bytes by which another process opens memory of :meth:`allocate`."""
        handle = _IpcHandle()
        self._call("cuIpcGetMemHandle", ctypes.byref(handle), ADDRESS(address))
        return bytes(bytearray(handle))

    def open_ipc(self, handle: bytes) -> int:
        """Return the address here of another process's memory."""
        address = ADDRESS()
        self._call(
            "cuIpcOpenMemHandle_v2",
            ctypes.byref(address),
            _IpcHandle.from_buffer_copy(handle),
            ctypes.c_uint(_LAZY_PEER_ACCESS),
        )
        return address.value

    def close_ipc(self, address: int) -> None:
        """Close what :meth:`open_ipc` gave."""
        self._call("cuIpcCloseMemHandle", ADDRESS(address))

    def granularity(self, device: int) -> int:
        """Return the bytes that shareable memory on ``device`` comes in."""
        size, properties = ctypes.c_size_t(), _shareable(device)
        self._call(
            "cuMemGetAllocationGranularity",
            ctypes.byref(size),
            ctypes.byref(properties),
            ctypes.c_int(_RECOMMENDED),
        )
        return size.value

    def create(self, nbytes: int, device: int) -> int:
        """Return a handle of new memory on ``device``; ``nbytes``: a multiple of its granularity."""
        handle, properties = ADDRESS(), _shareable(device)
        self._call(
            "cuMemCreate", ctypes.byref(handle), ctypes.c_size_t(nbytes), ctypes.byref(properties), ADDRESS(0)
        )
        return handle.value

    def export_descriptor(self, handle: int) -> int:
        """Return a file descriptor of :meth:`create`'s memory, which the caller closes."""
        descriptor = ctypes.c_int()
        self._call(
            "cuMemExportToShareableHandle",
            ctypes.byref(descriptor),
            ADDRESS(handle),
            ctypes.c_int(FILE_DESCRIPTOR),
            ADDRESS(0),
        )
        return descriptor.value

    def import_descriptor(self, descriptor: int) -> int:
        """Return a handle of the memory behind ``descriptor``, which may be closed afterwards."""
        handle = ADDRESS()
        self._call(
            "cuMemImportFromShareableHandle",
            ctypes.byref(handle),
            ctypes.c_void_p(descriptor),
            ctypes.c_int(FILE_DESCRIPTOR),
        )
        return handle.value

    def release(self, handle: int) -> None:
        """Give up a handle; the memory goes once nobody maps it."""
        self._call("cuMemRelease", ADDRESS(handle))

    def reserve(self, nbytes: int) -> int:
        """Return the first of ``nbytes`` free addresses."""
        address = ADDRESS()
        size, alignment = ctypes.c_size_t(nbytes), ctypes.c_size_t(0)
        self._call("cuMemAddressReserve", ctypes.byref(address), size, alignment, ADDRESS(0), ADDRESS(0))
        return address.value

    def map(self, address: int, nbytes: int, handle: int) -> None:
        """Map the memory of ``handle`` at reserved addresses."""
        size, offset = ctypes.c_size_t(nbytes), ctypes.c_size_t(0)
        self._call("cuMemMap", ADDRESS(address), size, offset, ADDRESS(handle), ADDRESS(0))

    def allow(self, address: int, nbytes: int, device: int) -> None:
        """Let ``device`` read and write what is mapped."""
        access = _Access(_Location(_ON_DEVICE, device), _READ_WRITE)
        size, number = ctypes.c_size_t(nbytes), ctypes.c_size_t(1)
        self._call("cuMemSetAccess", ADDRESS(address), size, ctypes.byref(access), number)

    def unmap(self, address: int, nbytes: int) -> None:
        """Undo :meth:`map`."""
        self._call("cuMemUnmap", ADDRESS(address), ctypes.c_size_t(nbytes))

    def free_addresses(self, address: int, nbytes: int) -> None:
        """Undo :meth:`reserve`."""
        self._call("cuMemAddressFree", ADDRESS(address), ctypes.c_size_t(nbytes))

    def _call(self, name: str, *arguments: Any) -> None:
        code = getattr(self._library, name)(*arguments)
        if code:
            text = ctypes.c_char_p()
            self._library.cuGetErrorName(ctypes.c_int(code), ctypes.byref(text))
            raise DriverError(f"{name} returned {code} {text.value.decode() if text.value else ''}".rstrip())


def _shareable(device: int) -> _Properties:
    """Plain memory on ``device`` that file descriptors share; no multicast."""
    return _Properties(type=1, handles=FILE_DESCRIPTOR, location=_Location(_ON_DEVICE, device))
