# SM3 for Python: hashlib-shaped streams, many messages at once, key derivation, worker threads. Part of _core.pyx.
# Class docstrings begin with the constructor's signature in the form inspect.signature() reads; Cython writes none.


cdef class _Stream:
    """A running state with hashlib's locking rule: a lock appears with the first update that gives up the GIL.

    Until then every call runs under the GIL from beginning to end, so it needs no lock.
    """

    cdef PyThread_type_lock lock

    def __dealloc__(self):
        if self.lock != NULL:
            PyThread_free_lock(self.lock)

    def __reduce__(self):
        raise _no_pickle(self)

    cdef void enter(self) noexcept:
        if self.lock != NULL and not PyThread_acquire_lock(self.lock, NOWAIT_LOCK):
            with nogil:
                PyThread_acquire_lock(self.lock, WAIT_LOCK)

    cdef void leave(self) noexcept:
        if self.lock != NULL:
            PyThread_release_lock(self.lock)

    cdef void absorb(self, const void *data, size_t length) noexcept nogil:
        pass

    cdef int need_lock(self) except -1:
        """To be called before enter() by whoever will give up the GIL before leave()."""
        if self.lock == NULL:
            self.lock = PyThread_allocate_lock()
            if self.lock == NULL:
                raise errors.AllocationError("no lock could be allocated")
        return 0

    cdef int feed(self, object data) except -1:
        cdef Py_buffer view
        _acquire(data, &view, False, "data")
        if view.len < GIL_BYTES:
            self.enter()
            self.absorb(view.buf, view.len)
        else:
            try:
                self.need_lock()
            except BaseException:
                PyBuffer_Release(&view)
                raise
            self.enter()
            with nogil:
                self.absorb(view.buf, view.len)
        self.leave()
        PyBuffer_Release(&view)
        return 0


@cython.final
cdef class sm3(_Stream):
    """sm3(data=b'', *, usedforsecurity=True)\n--\n\nA streaming SM3 hash with hashlib's interface.

    Args:
        data: first bytes of the message; any C-contiguous buffer.
        usedforsecurity: accepted for hashlib's sake, without effect.
    Raises: BufferTypeError, NonContiguousBufferError.
    Standard: GB/T 32905-2016.
    Thread-safety: as hashlib: one lock per object, calls from several threads are done one after another.
    """

    cdef csvf_sm3 state

    def __cinit__(self):
        csvf_sm3_init(&self.state)

    def __init__(self, data=b"", *, usedforsecurity=True):
        # __cinit__ alone would let a second __init__ go on with the old state.
        self.enter()
        csvf_sm3_init(&self.state)
        self.leave()
        self.feed(data)

    def __dealloc__(self):
        csvf_wipe(&self.state, sizeof(self.state))

    cdef void absorb(self, const void *data, size_t length) noexcept nogil:
        csvf_sm3_update(&self.state, data, length)

    cdef csvf_sm3 _copy_state(self) noexcept:
        cdef csvf_sm3 state
        self.enter()
        state = self.state
        self.leave()
        return state

    def update(self, data, /):
        """Appends bytes to the message."""
        self.feed(data)

    def digest(self):
        """The 32-byte digest of the message so far."""
        cdef csvf_sm3 state = self._copy_state()
        cdef uint8_t digest[32]
        csvf_sm3_final(&state, digest)
        csvf_wipe(&state, sizeof(state))
        return PyBytes_FromStringAndSize(<char *>digest, 32)

    def hexdigest(self):
        """The digest as 64 lower-case hexadecimal digits."""
        return self.digest().hex()

    def copy(self):
        """A second object that goes on from the same state."""
        cdef sm3 other = sm3.__new__(sm3)
        other.state = self._copy_state()
        return other

    @property
    def name(self):
        """'sm3'"""
        return "sm3"

    @property
    def digest_size(self):
        """32"""
        return CSVF_SM3_BYTES

    @property
    def block_size(self):
        """64"""
        return CSVF_SM3_BLOCK_BYTES

    def __repr__(self):
        return f"<sm3 csvfast object @ {<size_t><void *>self:#x}>"


@cython.final
cdef class hmac_sm3(_Stream):
    """hmac_sm3(key, data=b'')\n--\n\nHMAC with SM3, hashlib-shaped.

    Args:
        key: bytes of any length.
        data: first bytes of the message.
    Raises: BufferTypeError, NonContiguousBufferError.
    Standard: RFC 2104 over GB/T 32905-2016.
    Thread-safety: one lock per object, calls from several threads are done one after another.
    """

    cdef csvf_hmac_sm3 state

    def __cinit__(self):
        csvf_hmac_sm3_init(&self.state, NO_BYTES, 0)

    def __init__(self, key, data=b""):
        cdef Py_buffer view
        _acquire(key, &view, False, "key")
        self.enter()
        csvf_hmac_sm3_init(&self.state, <const uint8_t *>view.buf, view.len)
        self.leave()
        PyBuffer_Release(&view)
        self.feed(data)

    def __dealloc__(self):
        csvf_wipe(&self.state, sizeof(self.state))

    cdef void absorb(self, const void *data, size_t length) noexcept nogil:
        csvf_hmac_sm3_update(&self.state, data, length)

    def update(self, data, /):
        """Appends bytes to the message."""
        self.feed(data)

    cdef void _mac(self, uint8_t *mac) noexcept:
        cdef csvf_hmac_sm3 state
        self.enter()
        state = self.state
        self.leave()
        csvf_hmac_sm3_final(&state, mac)
        csvf_wipe(&state, sizeof(state))

    def digest(self):
        """The 32-byte MAC of the message so far."""
        cdef uint8_t mac[32]
        self._mac(mac)
        return PyBytes_FromStringAndSize(<char *>mac, 32)

    def hexdigest(self):
        """The MAC as 64 lower-case hexadecimal digits."""
        return self.digest().hex()

    def verify(self, mac, /):
        """Returns None if `mac` is the MAC of the message so far, else raises AuthenticationError; in constant time."""
        cdef uint8_t own[32]
        cdef Py_buffer view
        cdef bint equal
        _acquire(mac, &view, False, "mac")
        self._mac(own)
        equal = view.len == 32 and csvf_equal(own, view.buf, 32)
        csvf_wipe(own, sizeof(own))
        length = view.len
        PyBuffer_Release(&view)
        if length != 32:
            raise errors.LengthError(f"mac has {length} bytes; expected 32")
        if not equal:
            raise errors.AuthenticationError("the MAC does not match")

    def copy(self):
        """A second object that goes on from the same state under the same key."""
        cdef hmac_sm3 other = hmac_sm3.__new__(hmac_sm3)
        self.enter()
        other.state = self.state
        self.leave()
        return other

    @property
    def name(self):
        """'hmac-sm3'"""
        return "hmac-sm3"

    @property
    def digest_size(self):
        """32"""
        return CSVF_SM3_BYTES

    @property
    def block_size(self):
        """64"""
        return CSVF_SM3_BLOCK_BYTES

    def __repr__(self):
        return f"<hmac-sm3 csvfast object @ {<size_t><void *>self:#x}>"


@cython.final
cdef class WorkerPool:
    """WorkerPool(threads)\n--\n\nThreads for bulk calls outside an engine; the calling thread counts as one of them.

    Thread-safety: any thread may hand the pool to a call; calls are served one at a time.
    """

    cdef csvf_pool *pool
    cdef readonly uint32_t threads

    def __cinit__(self, threads):
        cdef uint64_t count = _unsigned(threads, "threads", errors.ArgumentError)
        if not 1 <= count <= 1024:
            raise errors.ArgumentError(f"threads is {count}; expected 1 .. 1024")
        cdef int status = csvf_pool_create(&self.pool, <uint32_t>count)
        cdef int number = errno
        if status == CSVF_ERR_SYSTEM:
            raise _system_error(number, f"starting {count} worker threads")
        if status != CSVF_OK:
            raise _status_error(status, f"starting {count} worker threads")
        self.threads = <uint32_t>count

    def __dealloc__(self):
        csvf_pool_destroy(self.pool)

    def __reduce__(self):
        raise TypeError("a WorkerPool cannot be pickled or copied")

    def __repr__(self):
        return f"<WorkerPool of {self.threads} threads>"


def sm3_many(buffers, /):
    """SM3 of many independent messages at once, in vector lanes.

    Args:
        buffers: an iterable of C-contiguous buffers; lengths may differ.
    Returns: a list of 32-byte digests in the same order.
    Raises: BufferTypeError, NonContiguousBufferError.
    Standard: GB/T 32905-2016.
    Thread-safety: safe from any thread, as long as no thread changes the buffers meanwhile.
    """
    cdef tuple messages = tuple(buffers)  # a tuple of our own: nobody can change it while the GIL is released
    cdef Py_ssize_t count = len(messages), held = 0, index
    cdef size_t total = 0
    if count == 0:
        return []
    cdef size_t each = sizeof(Py_buffer) + sizeof(void *) + sizeof(size_t) + CSVF_SM3_BYTES
    cdef char *block = <char *>PyMem_Malloc(count * each)
    if block == NULL:
        raise errors.AllocationError(f"no memory for {count} message descriptors")
    cdef Py_buffer *views = <Py_buffer *>block
    cdef const uint8_t **data = <const uint8_t **>(block + count * sizeof(Py_buffer))
    cdef size_t *lengths = <size_t *>(block + count * (sizeof(Py_buffer) + sizeof(void *)))
    cdef uint8_t *digests = <uint8_t *>(block + count * (sizeof(Py_buffer) + sizeof(void *) + sizeof(size_t)))
    try:
        for index in range(count):
            if PyObject_GetBuffer(messages[index], &views[index], PyBUF_SIMPLE) != 0:
                raise _buffer_error(messages[index], f"message {index}", False)
            held += 1
            data[index] = <const uint8_t *>views[index].buf
            lengths[index] = views[index].len
            total += views[index].len
        if total < GIL_BYTES:
            csvf_sm3_many(digests, data, lengths, count)
        else:
            with nogil:
                csvf_sm3_many(digests, data, lengths, count)
        return [PyBytes_FromStringAndSize(<char *>digests + 32 * index, 32) for index in range(count)]
    finally:
        for index in range(held):
            PyBuffer_Release(&views[index])
        PyMem_Free(block)


def sm3_update_many(streams, buffers, /):
    """Continues many SM3 streams, each with a buffer of its own, in vector lanes: `stream.update(buffer)` for every pair.

    Args:
        streams: an iterable of different sm3 objects.
        buffers: as many C-contiguous buffers; the lanes are fullest where their lengths are much alike.
    Raises: ArgumentError (a stream is there twice, other numbers of streams and buffers), BufferTypeError,
        NonContiguousBufferError; nothing was hashed then.
    Standard: GB/T 32905-2016.
    Thread-safety: as the streams: one lock per object, held by all of them until the call returns.
    """
    cdef tuple states = tuple(streams), messages = tuple(buffers)
    cdef Py_ssize_t count = len(states), held = 0, index
    if len(messages) != count:
        raise errors.ArgumentError(f"there are {len(messages)} buffers for {count} streams; expected one for each")
    for index in range(count):
        if type(states[index]) is not sm3:
            raise TypeError(f"stream {index} must be an sm3, not {type(states[index]).__name__}")
    if len(set(states)) != count:
        raise errors.ArgumentError("a stream is given more than once; expected different ones")
    if count == 0:
        return
    cdef char *block = <char *>PyMem_Malloc(count * (sizeof(Py_buffer) + 2 * sizeof(void *) + sizeof(size_t)))
    if block == NULL:
        raise errors.AllocationError(f"no memory for {count} message descriptors")
    cdef Py_buffer *views = <Py_buffer *>block
    cdef const uint8_t **data = <const uint8_t **>(views + count)
    cdef csvf_sm3 **pointers = <csvf_sm3 **>(data + count)
    cdef size_t *lengths = <size_t *>(pointers + count)
    try:
        for index in range(count):
            (<sm3>states[index]).need_lock()
            pointers[index] = &(<sm3>states[index]).state
            if PyObject_GetBuffer(messages[index], &views[index], PyBUF_SIMPLE) != 0:
                raise _buffer_error(messages[index], f"buffer {index}", False)
            held += 1
            data[index] = <const uint8_t *>views[index].buf
            lengths[index] = views[index].len
        # In one order for everybody: two calls that share streams wait for each other, and not for ever.
        ordered = sorted(states, key=id)
        for state in ordered:
            (<sm3>state).enter()
        with nogil:
            csvf_sm3_update_many(pointers, data, lengths, count)
        for state in ordered:
            (<sm3>state).leave()
    finally:
        for index in range(held):
            PyBuffer_Release(&views[index])
        PyMem_Free(block)


cdef extern from "../sm3/sm3_files.h" nogil:
    ctypedef struct csvf__file:
        const char *path
        uint64_t inode
        uint64_t size
        int64_t mtime_ns
        int64_t ctime_ns
        int done
        uint8_t digest[32]
    void csvf__sm3_files(csvf__file *files, size_t count, uint8_t *room, size_t room_length, size_t limit)


def sm3_small_files(paths, identities, room, limit, /):
    """SM3 of many small files, read and hashed without the GIL, side by side in vector lanes.

    Args:
        paths: an iterable of paths as bytes.
        identities: as many objects with the numbers size, mtime_ns, ctime_ns and inode, as the files were found.
        room: writable buffer that the files are read into, longer than `limit`.
        limit: bytes of a file, at most.
    Returns: a list with, for each path, the digest, or None for what is no regular file of at most `limit` bytes, cannot be read, or is not, or
        is no longer, what was found: to be measured in another way, which says what is wrong.
    Raises: ArgumentError (other numbers of paths and identities), LengthError, BufferTypeError, ReadOnlyBufferError.
    Thread-safety: safe from any thread, with room of its own.
    """
    cdef tuple names = tuple(paths), found = tuple(identities)
    cdef Py_ssize_t count = len(names), most = _length(limit, "limit"), index
    cdef csvf__file *files
    cdef Py_buffer view
    if len(found) != count:
        raise errors.ArgumentError(f"there are {len(found)} identities for {count} paths; expected one for each")
    for index in range(count):
        if type(names[index]) is not bytes or b"\0" in names[index]:
            raise TypeError(f"path {index} must be bytes without NUL")
    if count == 0:
        return []
    _acquire(room, &view, True, "room")
    try:
        if view.len <= most:
            raise errors.LengthError(f"room has {view.len} bytes; expected more than the limit {most}")
        files = <csvf__file *>PyMem_Malloc(count * sizeof(csvf__file))
        if files == NULL:
            raise errors.AllocationError(f"no memory for {count} file descriptions")
        try:
            for index in range(count):
                identity = found[index]
                files[index].path = PyBytes_AS_STRING(names[index])
                files[index].size = identity.size
                files[index].mtime_ns = identity.mtime_ns
                files[index].ctime_ns = identity.ctime_ns
                files[index].inode = identity.inode
            with nogil:
                csvf__sm3_files(files, count, <uint8_t *>view.buf, view.len, most)
            return [
                PyBytes_FromStringAndSize(<char *>files[index].digest, 32) if files[index].done else None
                for index in range(count)
            ]
        finally:
            PyMem_Free(files)
    finally:
        PyBuffer_Release(&view)


cdef extern from "../sm3/sm3_mapped.h" nogil:
    ctypedef struct csvf__window:
        int descriptor
        uint64_t offset
        size_t length
        int done
    void csvf__sm3_update_mapped(csvf_sm3 *const *streams, csvf__window *windows, size_t count, csvf_sm3 *before,
                                 const uint8_t **data, size_t *lengths)
    int csvf__sm3_blocks_mapped(uint8_t *digests, const uint8_t *prefix, size_t prefix_length, csvf__window *window,
                                size_t block_length)


def sm3_update_mapped(streams, windows, /):
    """Continues many SM3 streams, each with a part of a file, which is mapped for the time of the call.

    Args:
        streams: an iterable of different sm3 objects.
        windows: as many (descriptor, offset, length): parts of regular files or block devices.
    Returns: a list with True for each stream that went on, False where the file cannot be mapped, or where pages went away while they were
        hashed (it was truncated, the disk has an error): such a stream is as it was; reading the part says what is wrong.
    Raises: ArgumentError (a stream is there twice, other numbers of streams and windows); nothing was hashed then.
    Standard: GB/T 32905-2016.
    Thread-safety: as the streams: one lock per object, held by all of them until the call returns. The first call takes SIGBUS, and
        gives faults of others to the handler that was there; when somebody takes SIGBUS later, everything is False.
    """
    cdef tuple states = tuple(streams), parts = tuple(windows)
    cdef Py_ssize_t count = len(states), index
    if len(parts) != count:
        raise errors.ArgumentError(f"there are {len(parts)} windows for {count} streams; expected one for each")
    for index in range(count):
        if type(states[index]) is not sm3:
            raise TypeError(f"stream {index} must be an sm3, not {type(states[index]).__name__}")
    if len(set(states)) != count:
        raise errors.ArgumentError("a stream is given more than once; expected different ones")
    if count == 0:
        return []
    cdef size_t each = sizeof(csvf__window) + sizeof(csvf_sm3) + 2 * sizeof(void *) + sizeof(size_t)
    cdef char *block = <char *>PyMem_Malloc(count * each)
    if block == NULL:
        raise errors.AllocationError(f"no memory for {count} window descriptors")
    cdef csvf__window *mapped = <csvf__window *>block
    cdef csvf_sm3 *before = <csvf_sm3 *>(mapped + count)
    cdef csvf_sm3 **pointers = <csvf_sm3 **>(before + count)
    cdef const uint8_t **data = <const uint8_t **>(pointers + count)
    cdef size_t *lengths = <size_t *>(data + count)
    try:
        for index in range(count):
            (<sm3>states[index]).need_lock()
            pointers[index] = &(<sm3>states[index]).state
            descriptor, offset, length = parts[index]
            mapped[index].descriptor = descriptor
            mapped[index].offset = offset
            mapped[index].length = length
        ordered = sorted(states, key=id)  # as sm3_update_many
        for state in ordered:
            (<sm3>state).enter()
        with nogil:
            csvf__sm3_update_mapped(pointers, mapped, count, before, data, lengths)
        for state in ordered:
            (<sm3>state).leave()
        return [mapped[index].done != 0 for index in range(count)]
    finally:
        csvf_wipe(before, count * sizeof(csvf_sm3))
        PyMem_Free(block)


def sm3_blocks_mapped(descriptor, offset, length, block_length=4096, *, prefix=b""):
    """`sm3_blocks` of a part of a file, which is mapped for the time of the call.

    Args:
        descriptor, offset, length: a part of a regular file or block device, a whole number of blocks.
        block_length, prefix: as of sm3_blocks.
    Returns: the digests one after another, or None where sm3_update_mapped says False.
    Raises: LengthError, BufferTypeError, NonContiguousBufferError.
    Thread-safety: safe from any thread. SIGBUS: as sm3_update_mapped.
    """
    cdef csvf__window window
    cdef Py_ssize_t size = _length(block_length, "block_length"), whole = _length(length, "length")
    cdef Py_buffer salt
    cdef uint8_t *out
    cdef int status
    window.descriptor = descriptor
    window.offset = offset
    window.length = whole
    if size == 0 or whole % size != 0:
        raise errors.LengthError(f"length is {whole}; expected a multiple of block_length {size}, which is at least 1")
    if whole == 0:
        return b""
    _acquire(prefix, &salt, False, "prefix")
    try:
        if salt.len > 256:
            raise errors.LengthError(f"prefix has {salt.len} bytes; expected at most 256")
        digests = PyBytes_FromStringAndSize(NULL, 32 * (whole // size))
        out = <uint8_t *>PyBytes_AS_STRING(digests)
        with nogil:
            status = csvf__sm3_blocks_mapped(out, <const uint8_t *>salt.buf, salt.len, &window, size)
    finally:
        PyBuffer_Release(&salt)
    if status != CSVF_OK:
        raise _status_error(status, f"hashing blocks of {size} bytes")
    return digests if window.done else None


def sm3_blocks(data, block_length=4096, *, prefix=b"", out=None, pool=None):
    """SM3 of each block of a buffer, every block preceded by the same prefix: the leaves of a page or dm-verity tree.

    Args:
        data: C-contiguous buffer, a whole number of blocks.
        block_length: bytes of a block, at least 1.
        prefix: 0 to 256 bytes hashed before every block (dm-verity's salt).
        out: writable buffer of 32 bytes per block that does not overlap data, or None.
        pool: WorkerPool to split the work over, or None.
    Returns: the digests one after another as bytes, or out.
    Raises: LengthError, OverlapError, BufferTypeError, NonContiguousBufferError, ReadOnlyBufferError.
    Thread-safety: safe from any thread, as long as no thread changes the buffers meanwhile.
    """
    cdef Py_buffer view, salt
    cdef Py_ssize_t size = _length(block_length, "block_length"), count
    cdef _Output output
    cdef csvf_pool *workers = NULL
    cdef int status
    if size == 0:
        raise errors.LengthError("block_length is 0; expected at least 1")
    if pool is not None:
        if not isinstance(pool, WorkerPool):
            raise TypeError(f"pool must be a WorkerPool or None, not {type(pool).__name__}")
        workers = (<WorkerPool>pool).pool
    _acquire(data, &view, False, "data")
    try:
        if view.len % size != 0:
            raise errors.LengthError(f"data has {view.len} bytes; expected a multiple of block_length {size}")
        _acquire(prefix, &salt, False, "prefix")
        try:
            if salt.len > 256:
                raise errors.LengthError(f"prefix has {salt.len} bytes; expected at most 256")
            count = view.len // size
            output = _Output.make(out, 32 * count)
            if (output.data < <uint8_t *>view.buf + view.len and <uint8_t *>view.buf < output.data + 32 * count
                    and count > 0):
                raise errors.OverlapError("out overlaps data")
            with nogil:
                if workers == NULL:
                    status = csvf_sm3_blocks(output.data, <const uint8_t *>salt.buf, salt.len,
                                             <const uint8_t *>view.buf, size, count)
                else:
                    status = csvf_pool_sm3_blocks(workers, output.data, <const uint8_t *>salt.buf, salt.len,
                                                  <const uint8_t *>view.buf, size, count)
        finally:
            PyBuffer_Release(&salt)
    finally:
        PyBuffer_Release(&view)
    if status != CSVF_OK:
        raise _status_error(status, f"hashing {count} blocks of {size} bytes")
    return output.result


def sm3_kdf(secret, length, *, out=None):
    """Key derivation with SM3: SM3(secret || BE32(1)) || SM3(secret || BE32(2)) || ..., cut to `length` bytes.

    Args:
        secret: C-contiguous buffer.
        length: bytes wanted, at most 32 * (2**32 - 1).
        out: writable buffer of that length that does not overlap the secret (so that a derived secret can be wiped), or None.
    Returns: bytes, or out.
    Raises: LengthError, OverlapError, BufferTypeError, ReadOnlyBufferError, NonContiguousBufferError.
    Standard: GB/T 32918.4-2016 5.4.3 (= ANSI X9.63).
    Thread-safety: safe from any thread.
    """
    cdef Py_ssize_t size = _length(length, "length")
    cdef Py_buffer view
    cdef _Output output
    cdef int status
    if size > 32 * ((1 << 32) - 1):
        raise errors.LengthError(f"length is {size}; expected at most {32 * ((1 << 32) - 1)}")
    _acquire(secret, &view, False, "secret")
    try:
        output = _Output.make(out, size)
        if (output.data < <uint8_t *>view.buf + view.len and <uint8_t *>view.buf < output.data + size
                and size > 0 and view.len > 0):
            raise errors.OverlapError("out overlaps the secret")
        if size < GIL_BYTES and view.len < GIL_BYTES:
            status = csvf_sm3_kdf(output.data, size, <const uint8_t *>view.buf, view.len)
        else:
            with nogil:
                status = csvf_sm3_kdf(output.data, size, <const uint8_t *>view.buf, view.len)
    finally:
        PyBuffer_Release(&view)
    if status != CSVF_OK:
        raise _status_error(status, f"deriving {size} bytes")
    return output.result
