# cython: embedsignature=True, embedsignature.format=clinic, binding=False, auto_pickle=False
"""The binding of csvfast.h: argument checks, buffers in, GIL out; no logic.

Shape: this file holds what all parts share (buffers, numbers, errors, kernels); the objects stand in

    _core_secret.pxi   Secret
    _core_sm3.pxi      sm3, hmac_sm3, sm3_many, sm3_blocks, sm3_kdf, WorkerPool
    _core_sha256.pxi   sha256_layer: digests and MAC of a container image's layer in one pass
    _core_sm4.pxi      SM4XTS, SM4CTR, SM4GCM
    _core_sm2.pxi      SM2PublicKey, SM2PrivateKey, sm2_verify_many
    _core_memory.pxi   Engine, the base of csvfast.memory.EncryptedMemory
    _core_cache.pxi    Cache, the base of csvfast.memory.CacheModel
    _core_stop.pxi     BlockStop, for csvfast.machine.emulator

Buffers: any C-contiguous object of the buffer protocol is taken as its bytes. The GIL is released while C works on
GIL_BYTES or more; below that, giving it up and getting it back costs more than the work.

Free-threading: not declared. The counters that guard close() and the lazily made locks lean on the GIL.
"""

cimport cython
from cpython.buffer cimport (
    PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_FillInfo, PyBuffer_Release, PyObject_CheckBuffer,
)
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from cpython.exc cimport PyErr_Clear, PyErr_Occurred
from cpython.mem cimport PyMem_Free, PyMem_Malloc
from cpython.pythread cimport (
    NOWAIT_LOCK, WAIT_LOCK, PyThread_acquire_lock, PyThread_allocate_lock, PyThread_free_lock, PyThread_release_lock,
    PyThread_type_lock,
)
from libc.errno cimport errno
from libc.string cimport memcpy

import os

from csvfast import errors

cdef extern from "Python.h":
    # Declared without "except" so that a refusal costs no exception state on the good path.
    int PyObject_GetBuffer(object obj, Py_buffer *view, int flags)
    unsigned long long PyLong_AsUnsignedLongLong(object number)
    int PyLong_CheckExact(object number)
    object PyNumber_Index(object number)

cdef extern from "unistd.h" nogil:
    int getentropy(void *buffer, size_t length)

cdef extern from "sys/mman.h" nogil:
    """
    #ifdef MADV_HUGEPAGE
    static void csvf__want_huge_pages(char *start, char *end) { (void)madvise(start, (size_t)(end - start), MADV_HUGEPAGE); }
    #else
    static void csvf__want_huge_pages(char *start, char *end) { (void)start; (void)end; }
    #endif
    """
    void csvf__want_huge_pages(char *start, char *end)

cdef enum:
    GIL_BYTES = 1024
    HUGE_PAGE = 2 << 20
    HUGE_BYTES = 8 << 20  # from here on, faulting new memory in by 4 KiB costs more than encrypting it

cdef uint8_t NO_BYTES[1]  # what an absent optional buffer points at


# ---- Buffers -------------------------------------------------------------------------------------------------------

cdef object _buffer_error(object obj, str name, bint writable):
    """The exception for an object that did not give the buffer asked of it."""
    PyErr_Clear()
    kind = type(obj).__name__
    if not PyObject_CheckBuffer(obj):
        return errors.BufferTypeError(f"{name} must be a bytes-like object, not {kind}")
    try:
        view = memoryview(obj)
    except errors.CsvfastError as problem:  # one of our own objects, which knows better
        return problem
    except Exception as problem:
        return errors.BufferTypeError(f"{name}: the {kind} gives no buffer ({problem})")
    if not view.c_contiguous:
        return errors.NonContiguousBufferError(
            f"{name} must be C-contiguous; this {kind} has shape {view.shape} and strides {view.strides}")
    if writable and view.readonly:
        return errors.ReadOnlyBufferError(f"{name} must be writable; this {kind} is read-only")
    return errors.BufferTypeError(f"{name}: the {kind} gives no plain buffer of bytes")


cdef int _acquire(object obj, Py_buffer *view, bint writable, str name) except -1:
    if PyObject_GetBuffer(obj, view, PyBUF_WRITABLE if writable else PyBUF_SIMPLE) != 0:
        raise _buffer_error(obj, name, writable)
    return 0


cdef void _prefer_huge_pages(char *data, Py_ssize_t length) noexcept:
    """Advice for the whole huge pages inside a block just allocated and not touched yet; a refusal changes nothing."""
    cdef size_t start = (<size_t>data + HUGE_PAGE - 1) // HUGE_PAGE * HUGE_PAGE
    cdef size_t end = (<size_t>data + length) // HUGE_PAGE * HUGE_PAGE
    if start < end:
        csvf__want_huge_pages(<char *>start, <char *>end)


@cython.final
@cython.freelist(8)
cdef class _Output:
    """The destination of a transform: the caller's buffer, or new bytes that nobody else can see yet."""

    cdef Py_buffer view
    cdef bint held
    cdef object result
    cdef uint8_t *data

    @staticmethod
    cdef _Output make(object out, Py_ssize_t length):
        cdef _Output self = _Output.__new__(_Output)
        if out is None:
            # Not zeroed: every byte is written before the object leaves this module, or the object is dropped.
            self.result = PyBytes_FromStringAndSize(NULL, length)
            self.data = <uint8_t *>PyBytes_AS_STRING(self.result)
            if length >= HUGE_BYTES:
                _prefer_huge_pages(<char *>self.data, length)
            return self
        _acquire(out, &self.view, True, "out")
        self.held = True
        if self.view.len != length:
            raise errors.LengthError(f"out has {self.view.len} bytes; expected {length}, the length of the data")
        self.result = out
        self.data = <uint8_t *>self.view.buf
        return self

    def __dealloc__(self):
        if self.held:
            PyBuffer_Release(&self.view)


# ---- Numbers -------------------------------------------------------------------------------------------------------

cdef uint64_t _unsigned(object number, str name, object kind) except? 0xFFFFFFFFFFFFFFFE:
    """A Python integer as an unsigned 64-bit number; `kind` is the exception when it does not fit."""
    cdef unsigned long long value
    if not PyLong_CheckExact(number):
        try:
            number = PyNumber_Index(number)
        except TypeError:
            raise TypeError(f"{name} must be an integer, not {type(number).__name__}") from None
    value = PyLong_AsUnsignedLongLong(number)
    if value == <unsigned long long>-1 and PyErr_Occurred() != NULL:
        PyErr_Clear()
        # Python refuses to write out integers of thousands of digits.
        shown = f"{number}" if number.bit_length() <= 256 else f"of {number.bit_length()} bits"
        raise kind(f"{name} {shown} is out of range; expected 0 .. 2**64 - 1")
    return value


cdef uint32_t _asid(object number) except? 0xFFFFFFFE:
    cdef uint64_t value = _unsigned(number, "ASID", errors.AsidError)
    if value > 65535:
        raise errors.AsidError(f"ASID {value} is out of range; expected 0 .. 65535")
    return <uint32_t>value


cdef Py_ssize_t _length(object number, str name) except -1:
    cdef uint64_t value = _unsigned(number, name, errors.LengthError)
    if value > <uint64_t>PY_SSIZE_T_MAX:
        raise errors.LengthError(f"{name} {value} is more than this machine can address")
    return <Py_ssize_t>value


cdef extern from *:
    Py_ssize_t PY_SSIZE_T_MAX


cdef dict _STANDARDS = {"gb": CSVF_STANDARD_GB, "ieee": CSVF_STANDARD_IEEE}
cdef dict _TWEAK_MODELS = {"xts": CSVF_TWEAK_XTS, "line": CSVF_TWEAK_LINE}


cdef int _choice(dict choices, object value, str name) except -1:
    if isinstance(value, str) and value in choices:
        return choices[value]
    # Only a text is shown: whatever else got here by mistake may be a key.
    shown = repr(value) if isinstance(value, str) and len(value) <= 32 else type(value).__name__
    raise errors.ArgumentError(f"{name} must be one of {', '.join(map(repr, choices))}; got {shown}")


# ---- Errors --------------------------------------------------------------------------------------------------------

cdef object _status_error(int status, str what):
    """The exception for a status that the caller has nothing more precise to say about."""
    text = csvf_status_text(status).decode()
    kinds = {
        CSVF_ERR_ARGUMENT: errors.ArgumentError,
        CSVF_ERR_LENGTH: errors.LengthError,
        CSVF_ERR_RANGE: errors.AddressError,
        CSVF_ERR_ALIGNMENT: errors.AlignmentError,
        CSVF_ERR_OVERLAP: errors.OverlapError,
        CSVF_ERR_KEY: errors.WeakKeyError,
        CSVF_ERR_ASID: errors.AsidError,
        CSVF_ERR_BUSY: errors.AsidInUseError,
        CSVF_ERR_AUTHENTICATION: errors.AuthenticationError,
        CSVF_ERR_MEMORY: errors.AllocationError,
        CSVF_ERR_KERNEL: errors.KernelError,
        CSVF_ERR_LIMIT: errors.LimitError,
        CSVF_ERR_POINT: errors.PointError,
    }
    return kinds.get(status, errors.InternalError)(f"{what}: {text}")


cdef object _system_error(int number, str what):
    return errors.SystemCallError(number, f"{what}: {os.strerror(number)}")


cdef object _key_length_error(Py_ssize_t length, int expected, str what):
    return errors.KeyLengthError(f"{what} key has {length} bytes; expected {expected}")


cdef object _no_pickle(object self):
    return errors.KeyExposureError(
        f"a {type(self).__name__} object may hold secrets and cannot be pickled or copied; make it anew from its source")


# ---- Library and kernels -------------------------------------------------------------------------------------------

def _start():
    """Chooses the kernels. Raises StartupError when the environment asks for what cannot be had."""
    if csvf_init() != CSVF_OK:
        raise errors.StartupError(
            f"CSVFAST_KERNEL={os.environ.get('CSVFAST_KERNEL', '')!r} with "
            f"CSVFAST_DISABLE={os.environ.get('CSVFAST_DISABLE', '')!r} names a kernel or CPU feature that is unknown or "
            f"that this CPU cannot run; CPU features: {csvf_cpu_features().decode() or 'none'}; kernels: "
            + "; ".join(f"{name}: {', '.join(kernels(name))}" for name in primitives()))


def version():
    """The version of the C library."""
    return csvf_version().decode()


def cpu_features():
    """Names of the CPU features found (less those disabled) that matter to a kernel."""
    return csvf_cpu_features().decode().split()


def primitives():
    """Names of the primitives that have kernels, in the library's order."""
    return [csvf_primitive_name(index).decode() for index in range(CSVF_PRIMITIVE_COUNT)]


cdef int _primitive(object name) except -1:
    known = primitives()
    if name in known:
        return known.index(name)
    raise errors.KernelError(f"no primitive is called {name!r}; expected one of {', '.join(known)}")


def kernels(primitive, *, available=False):
    """Names of the kernels compiled in for a primitive, most preferred first; with available=True those this CPU runs."""
    cdef int index = _primitive(primitive)
    cdef size_t place
    names = []
    for place in range(csvf_kernel_count(index)):
        if not available or csvf_kernel_available(index, csvf_kernel_at(index, place)):
            names.append(csvf_kernel_at(index, place).decode())
    return names


def kernel(primitive):
    """Name of the kernel in use for a primitive."""
    return csvf_kernel_name(_primitive(primitive)).decode()


def force_kernel(primitive, name):
    """Uses the kernel of that name for objects made from now on; None goes back to the automatic choice.

    Objects that hold a key or a running hash keep the kernel they were made with; SM2 keys have none of their own, each call
    takes the one in use.

    Raises: KernelError for an unknown primitive or kernel, or one this CPU cannot run.
    Thread-safety: atomic, but the choice is the whole process's.
    """
    cdef int index = _primitive(primitive)
    cdef bytes encoded
    cdef int status
    if name is None:
        status = csvf_force_kernel(index, NULL)
    else:
        if not isinstance(name, str):
            raise TypeError(f"kernel name must be a str or None, not {type(name).__name__}")
        encoded = name.encode(errors="replace")
        # C would read the name up to a NUL only.
        status = csvf_force_kernel(index, encoded) if name in kernels(primitive) else CSVF_ERR_KERNEL
    if status != CSVF_OK:
        raise errors.KernelError(
            f"{primitive} has no kernel {name!r} that this CPU can run; expected one of "
            + ", ".join(kernels(primitive, available=True)))


include "_core_secret.pxi"
include "_core_sm3.pxi"
include "_core_sha256.pxi"
include "_core_sm4.pxi"
include "_core_sm2.pxi"
include "_core_memory.pxi"
include "_core_cache.pxi"
include "_core_stop.pxi"

_start()
