# Bytes that nobody should see and that disappear with their object. Part of _core.pyx.


@cython.final
cdef class Secret:
    """Secret(data)\n--\n\nSecret bytes of a fixed size, wiped when the object dies.

    Holds a copy of `data`. Whatever takes bytes takes a Secret (it is a read-only buffer); it cannot be pickled, copied or
    printed, and compares in constant time. What Python makes of it with bytes() is the caller's to keep short.

    Args:
        data: one or more bytes; any C-contiguous buffer. Wiping the source is the caller's affair.
    Raises: LengthError (no bytes), BufferTypeError, NonContiguousBufferError; ClosedError from every use after wipe().
    Thread-safety: read-only until wipe(), which any thread may call: a call that runs meanwhile reads zeros or the secret,
        never memory of another object.
    """

    cdef uint8_t *data
    cdef Py_ssize_t length
    cdef bint usable
    cdef object __weakref__

    def __init__(self, data):
        cdef Py_buffer view
        if self.data != NULL:
            raise errors.ArgumentError("this Secret already holds its bytes")
        _acquire(data, &view, False, "data")
        try:
            self.reserve(view.len)
            memcpy(self.data, view.buf, view.len)
        finally:
            PyBuffer_Release(&view)

    cdef int reserve(self, Py_ssize_t length) except -1:
        if length == 0:
            raise errors.LengthError("a Secret has at least 1 byte")
        self.data = <uint8_t *>PyMem_Malloc(length)
        if self.data == NULL:
            raise errors.AllocationError(f"no memory for {length} bytes")
        self.length = length
        self.usable = True
        return 0

    @staticmethod
    cdef Secret make(Py_ssize_t length):
        """A Secret whose bytes the caller writes before anybody else sees it."""
        cdef Secret self = Secret.__new__(Secret)
        self.reserve(length)
        return self

    cdef int check(self) except -1:
        if not self.usable:
            raise errors.ClosedError("this Secret has been wiped")
        return 0

    @staticmethod
    def random(length):
        """A new Secret of `length` bytes from the operating system's generator. Raises: LengthError, SystemCallError."""
        cdef Py_ssize_t size = _length(length, "length"), done = 0
        cdef Secret self = Secret.make(size)
        while done < size:
            # getentropy gives at most 256 bytes a call.
            if getentropy(self.data + done, min(size - done, 256)) != 0:
                raise _system_error(errno, "reading the operating system's random numbers")
            done += min(size - done, 256)
        return self

    @staticmethod
    def concatenate(*parts):
        """A new Secret of all parts one after another; each is a buffer, e.g. another Secret."""
        cdef Py_buffer view
        cdef Py_ssize_t total = 0, at = 0
        cdef Secret self
        for part in parts:
            _acquire(part, &view, False, "part")
            total += view.len
            PyBuffer_Release(&view)
        self = Secret.make(total)
        for part in parts:
            _acquire(part, &view, False, "part")
            try:
                if view.len > total - at:
                    raise errors.LengthError("a part grew meanwhile")
                memcpy(self.data + at, view.buf, view.len)
                at += view.len
            finally:
                PyBuffer_Release(&view)
        if at != total:
            raise errors.LengthError("a part shrank meanwhile")
        return self

    def part(self, start, stop):
        """A new Secret of the bytes start .. stop - 1. Raises: AddressError unless 0 <= start < stop <= len(self)."""
        cdef Py_ssize_t first = _length(start, "start"), last = _length(stop, "stop")
        cdef Secret other
        self.check()
        if not first < last <= self.length:
            raise errors.AddressError(f"bytes {first} .. {last} are no part of a Secret of {self.length} bytes")
        other = Secret.make(last - first)
        memcpy(other.data, self.data + first, last - first)
        return other

    def equals(self, other):
        """Whether `other` (any buffer) has the same bytes, in time that depends on its length only."""
        cdef Py_buffer view
        cdef bint same
        self.check()
        _acquire(other, &view, False, "other")
        same = view.len == self.length and csvf_equal(self.data, view.buf, view.len) != 0
        PyBuffer_Release(&view)
        return same

    def wipe(self):
        """Overwrites the bytes with zeros now. Doing it again does nothing; any other use raises ClosedError."""
        self.usable = False
        if self.data != NULL:
            csvf_wipe(self.data, self.length)

    def __len__(self):
        return self.length

    def __eq__(self, other):
        if not PyObject_CheckBuffer(other):
            return NotImplemented
        return self.equals(other)

    __hash__ = None

    def __getbuffer__(self, Py_buffer *view, int flags):
        self.check()
        PyBuffer_FillInfo(view, self, self.data, self.length, 1, flags)

    def __repr__(self):
        return f"<Secret of {self.length} bytes>" if self.usable else "<Secret, wiped>"

    def __reduce__(self):
        raise _no_pickle(self)

    def __dealloc__(self):
        if self.data != NULL:
            csvf_wipe(self.data, self.length)
            PyMem_Free(self.data)
