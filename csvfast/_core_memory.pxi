# The engine for Python: encrypted DRAM with one key per ASID. Part of _core.pyx. csvfast.memory.EncryptedMemory adds
# files, snapshots and views on top; the accesses that must be fast are here.


cdef class Engine:
    """Base of csvfast.memory.EncryptedMemory: a csvf_engine with checked arguments. See there for the arguments."""

    cdef csvf_engine *engine
    cdef Py_buffer owner            # the caller's buffer when the DRAM is theirs
    cdef bint owned
    cdef Py_ssize_t exports         # views of the DRAM alive; guarded by the GIL
    cdef Py_ssize_t calls           # C calls running without the GIL; guarded by the GIL
    cdef Py_ssize_t caches          # cache models that stand on this memory; guarded by the GIL
    cdef Py_ssize_t shape, stride   # what exported views point at
    cdef readonly uint32_t asid_max
    cdef readonly uint32_t threads
    cdef readonly uint64_t base_address
    cdef readonly str standard
    cdef readonly str tweak_model
    cdef object __weakref__

    def __cinit__(self, *args, **kwargs):
        self.stride = 1

    def __init__(self, size, *, standard="gb", tweak_model="xts", base_address=0, asid_max=509, threads=1, buffer=None,
                 fd=None, file_offset=0):
        cdef csvf_config config
        cdef Py_ssize_t length = _length(size, "size")
        cdef uint64_t limit = _unsigned(asid_max, "asid_max", errors.AsidError)
        cdef uint64_t workers = _unsigned(threads, "threads", errors.ArgumentError)
        cdef uint64_t offset = _unsigned(file_offset, "file_offset", errors.AddressError)
        cdef uint64_t descriptor
        cdef int status, number
        if self.engine != NULL or self.shape != 0 or self.owned:
            raise errors.ArgumentError("this memory has already been initialised")
        if length == 0 or length % CSVF_PAGE_BYTES != 0:
            raise errors.LengthError(f"size is {length}; expected a positive multiple of {CSVF_PAGE_BYTES}")
        if not 1 <= limit <= 65535:
            raise errors.AsidError(f"asid_max is {limit}; expected 1 .. 65535")
        if workers > 1024:
            raise errors.ArgumentError(f"threads is {workers}; expected 0 .. 1024")
        config.struct_size = sizeof(csvf_config)
        config.base_address = _unsigned(base_address, "base_address", errors.AddressError)
        config.asid_max = <uint32_t>limit
        config.standard = _choice(_STANDARDS, standard, "standard")
        config.tweak_model = _choice(_TWEAK_MODELS, tweak_model, "tweak_model")
        config.threads = <uint32_t>workers
        if config.base_address % CSVF_PAGE_BYTES != 0:
            raise errors.AlignmentError(f"base_address {config.base_address:#x} is not a multiple of {CSVF_PAGE_BYTES}")
        if config.base_address > <uint64_t>0xFFFFFFFFFFFFFFFF - <uint64_t>length:
            raise errors.AddressError(
                f"{length} bytes from base_address {config.base_address:#x} do not end below 2**64")
        if offset % CSVF_PAGE_BYTES != 0:
            raise errors.AlignmentError(f"file_offset {offset} is not a multiple of {CSVF_PAGE_BYTES}")
        if buffer is not None:
            if fd is not None:
                raise errors.ArgumentError("the memory can stand on a buffer or on a file, not on both")
            _acquire(buffer, &self.owner, True, "buffer")
            self.owned = True
            problem = self.unfit_owner(length)
            if problem is not None:
                self.disown()
                raise problem
            with nogil:
                status = csvf_engine_create_on(&self.engine, self.owner.buf, length, &config)
                number = errno
        elif fd is not None:
            descriptor = _unsigned(fd, "fd", errors.ArgumentError)
            if descriptor > 0x7FFFFFFF:
                raise errors.ArgumentError(f"fd is {descriptor}; expected a file descriptor")
            with nogil:
                status = csvf_engine_create_file(&self.engine, <int>descriptor, offset, length, &config)
                number = errno
        else:
            with nogil:
                status = csvf_engine_create(&self.engine, length, &config)
                number = errno
        if status != CSVF_OK:
            self.disown()
        if status == CSVF_ERR_SYSTEM:
            raise _system_error(number, f"making an encrypted memory of {length} bytes")
        if status != CSVF_OK:
            raise _status_error(status, f"making an encrypted memory of {length} bytes")
        self.shape = length
        self.asid_max = config.asid_max
        self.threads = config.threads
        self.base_address = config.base_address
        self.standard = standard
        self.tweak_model = tweak_model

    cdef object unfit_owner(self, Py_ssize_t length):
        """The exception for a caller's buffer that cannot serve as DRAM, or None."""
        cdef size_t past = <size_t>self.owner.buf % CSVF_LINE_BYTES
        if self.owner.len != length:
            return errors.LengthError(f"buffer has {self.owner.len} bytes; expected {length}, the size of the memory")
        if past != 0:
            return errors.AlignmentError(
                f"buffer begins {past} bytes past a 64-byte boundary; expected it on one (mmap and numpy's large arrays "
                "viewed from a page boundary are)")
        return None

    cdef void disown(self) noexcept:
        """Gives a caller's buffer back, so that it can be resized again."""
        if self.owned:
            self.owned = False
            PyBuffer_Release(&self.owner)

    def __dealloc__(self):
        # No view and no call can be alive here: each of them holds a reference to this object.
        csvf_engine_destroy(self.engine)
        self.disown()

    def __reduce__(self):
        raise _no_pickle(self)

    # ---- Life

    cdef int check(self) except -1:
        if self.engine == NULL:
            raise errors.ClosedError("the memory is closed" if self.shape else "the memory was never initialised")
        return 0

    cdef int acquire(self, object data, Py_buffer *view, bint writable, str name) except -1:
        """A caller's buffer for this open memory. Checked again afterwards: giving a buffer may run Python code (from 3.12 on a
        class's __buffer__), and that may close the memory."""
        self.check()
        _acquire(data, view, writable, name)
        if self.engine == NULL:
            PyBuffer_Release(view)
            self.check()
        return 0

    def close(self):
        """Wipes every key and gives the memory back. Closing twice is allowed.

        Raises: MemoryInUseError while views (`raw`, memoryview) or cache models of it exist or other threads are inside a call.
        """
        if self.engine == NULL:
            return
        if self.exports or self.calls:
            raise errors.MemoryInUseError(
                f"the memory cannot be closed: {self.exports} views of it exist and {self.calls} calls are running")
        if self.caches:
            raise errors.MemoryInUseError(f"the memory cannot be closed: {self.caches} cache models stand on it")
        cdef csvf_engine *engine = self.engine
        self.engine = NULL
        with nogil:
            csvf_engine_destroy(engine)
        self.disown()

    @property
    def closed(self):
        """True after close()."""
        return self.engine == NULL

    @property
    def size(self):
        """Bytes of DRAM."""
        return self.shape

    def __len__(self):
        return self.shape

    def __getbuffer__(self, Py_buffer *view, int flags):
        self.check()
        view.buf = csvf_engine_dram(self.engine)
        view.obj = self
        view.len = self.shape
        view.itemsize = 1
        view.readonly = 0
        view.ndim = 1
        view.format = b"B"
        view.shape = &self.shape
        view.strides = &self.stride
        view.suboffsets = NULL
        view.internal = NULL
        self.exports += 1

    def __releasebuffer__(self, Py_buffer *view):
        self.exports -= 1

    # ---- Errors

    cdef object failure(self, int status, str what, uint64_t address, uint64_t length, uint32_t asid):
        if status == CSVF_ERR_RANGE:
            return errors.AddressError(
                f"{what} of {length} bytes at address {address:#x} leaves the memory; expected addresses within "
                f"{self.base_address:#x} .. {self.base_address + <uint64_t>self.shape - 1:#x}")
        if status == CSVF_ERR_ASID:
            return self.asid_error(asid)
        if status == CSVF_ERR_OVERLAP:
            return errors.OverlapError(f"{what}: the buffer lies inside the encrypted memory itself")
        return _status_error(status, f"{what} of {length} bytes at address {address:#x}")

    cdef object asid_error(self, uint32_t asid):
        if not 1 <= asid <= self.asid_max:
            return errors.AsidError(f"ASID {asid} is out of range; expected 1 .. {self.asid_max}")
        return errors.UnknownAsidError(f"ASID {asid} has no key installed")

    # ---- Keys

    def install(self, asid, key=None):
        """Gives an ASID a key; only its expanded form is kept.

        Args:
            asid: 1 .. asid_max (0 is the host, which is never encrypted).
            key: 32 bytes, K1 then K2, the halves different; None = a new random key that nobody can learn.
        Returns: the ASID's generation: how many keys it has had, this one counted.
        Raises: AsidError, AsidInUseError, KeyLengthError, WeakKeyError, BufferTypeError, ClosedError.
        Thread-safety: any thread, also while others access the memory.
        """
        cdef uint32_t who = _asid(asid)
        cdef uint8_t secret[CSVF_XTS_KEY_BYTES]
        cdef Py_buffer view
        cdef Py_ssize_t length = CSVF_XTS_KEY_BYTES
        cdef uint64_t generation = 0
        cdef int status, number
        self.check()
        if key is None:
            while True:
                if getentropy(secret, sizeof(secret)) != 0:
                    number = errno
                    csvf_wipe(secret, sizeof(secret))
                    raise _system_error(number, "reading the system's random numbers")
                if not csvf_equal(secret, secret + 16, 16):
                    break
            status = csvf_asid_install(self.engine, who, secret, length)
            csvf_wipe(secret, sizeof(secret))
        else:
            self.acquire(key, &view, False, "key")
            length = view.len
            # The C library compares the length first, so a short buffer is never read past its end.
            status = csvf_asid_install(self.engine, who, <const uint8_t *>view.buf, length)
            PyBuffer_Release(&view)
        if status == CSVF_ERR_LENGTH:
            raise _key_length_error(length, CSVF_XTS_KEY_BYTES, "memory encryption")
        if status == CSVF_ERR_KEY:
            raise errors.WeakKeyError(f"the halves K1 and K2 of the key for ASID {who} are equal; expected two different")
        if status == CSVF_ERR_BUSY:
            raise errors.AsidInUseError(f"ASID {who} already has a key; remove it first")
        if status != CSVF_OK:
            raise self.failure(status, "installing a key", 0, 0, who)
        if csvf_asid_state(self.engine, &generation, NULL, who) != CSVF_OK:
            raise self.asid_error(who)
        return generation

    def remove(self, asid):
        """Removes and wipes an ASID's key; returns when no thread uses it any more.

        Raises: AsidError, UnknownAsidError, ClosedError. Thread-safety: any thread.
        """
        cdef uint32_t who = _asid(asid)
        cdef int status
        self.check()
        self.calls += 1
        with nogil:
            status = csvf_asid_remove(self.engine, who)
        self.calls -= 1
        if status != CSVF_OK:
            raise self.failure(status, "removing a key", 0, 0, who)

    def generation(self, asid):
        """How many keys the ASID has had so far."""
        cdef uint32_t who = _asid(asid)
        cdef uint64_t generation = 0
        self.check()
        if csvf_asid_state(self.engine, &generation, NULL, who) != CSVF_OK:
            raise self.asid_error(who)
        return generation

    def installed(self, asid):
        """True if the ASID has a key now."""
        cdef uint32_t who = _asid(asid)
        cdef int installed = 0
        self.check()
        if csvf_asid_state(self.engine, NULL, &installed, who) != CSVF_OK:
            raise self.asid_error(who)
        return installed != 0

    def asids(self):
        """The ASIDs that have a key now, ascending."""
        cdef uint32_t who
        cdef int installed = 0
        self.check()
        found = []
        for who in range(1, self.asid_max + 1):
            if csvf_asid_state(self.engine, NULL, &installed, who) == CSVF_OK and installed:
                found.append(who)
        return found

    # ---- Access

    def write(self, address, data, asid):
        """Writes bytes at any address as guest `asid`; 0 is the host, which writes them as they are.

        Args:
            address: system physical byte address.
            data: C-contiguous buffer of any length.
            asid: whose key encrypts.
        Raises: AddressError, AsidError, UnknownAsidError, OverlapError, BufferTypeError, NonContiguousBufferError,
            ClosedError.
        Thread-safety: any number of threads; different bytes never disturb each other.
        """
        cdef uint64_t place = _unsigned(address, "address", errors.AddressError)
        cdef uint32_t who = _asid(asid)
        cdef Py_buffer view
        cdef Py_ssize_t length
        cdef int status
        self.acquire(data, &view, False, "data")
        length = view.len
        if length < GIL_BYTES:
            status = csvf_write(self.engine, who, place, view.buf, length)
        else:
            self.calls += 1
            with nogil:
                status = csvf_write(self.engine, who, place, view.buf, length)
            self.calls -= 1
        PyBuffer_Release(&view)
        if status != CSVF_OK:
            raise self.failure(status, "write", place, length, who)

    def read(self, address, length, asid):
        """Reads `length` bytes at any address as guest `asid`. The wrong ASID reads noise.

        Returns: bytes. Raises: as write(), and LengthError. Thread-safety: as write().
        """
        cdef uint64_t place = _unsigned(address, "address", errors.AddressError)
        cdef Py_ssize_t size = _length(length, "length")
        cdef uint32_t who = _asid(asid)
        cdef uint8_t *target
        cdef int status
        self.check()
        if size > self.shape:  # before anything of that size is allocated
            raise self.failure(CSVF_ERR_RANGE, "read", place, size, who)
        data = PyBytes_FromStringAndSize(NULL, size)
        target = <uint8_t *>PyBytes_AS_STRING(data)
        if size >= HUGE_BYTES:
            _prefer_huge_pages(<char *>target, size)
        if size < GIL_BYTES:
            status = csvf_read(self.engine, target, size, who, place)
        else:
            self.calls += 1
            with nogil:
                status = csvf_read(self.engine, target, size, who, place)
            self.calls -= 1
        if status != CSVF_OK:
            raise self.failure(status, "read", place, size, who)
        return data

    def read_into(self, address, out, asid):
        """Fills a writable buffer from any address as guest `asid`; returns the number of bytes."""
        cdef uint64_t place = _unsigned(address, "address", errors.AddressError)
        cdef uint32_t who = _asid(asid)
        cdef Py_buffer view
        cdef Py_ssize_t length
        cdef int status
        self.acquire(out, &view, True, "out")
        length = view.len
        if length < GIL_BYTES:
            status = csvf_read(self.engine, view.buf, length, who, place)
        else:
            self.calls += 1
            with nogil:
                status = csvf_read(self.engine, view.buf, length, who, place)
            self.calls -= 1
        PyBuffer_Release(&view)
        if status != CSVF_OK:
            raise self.failure(status, "read", place, length, who)
        return length

    def write_pages(self, pfn, data, asid):
        """Writes whole pages from page frame `pfn` on; large runs use the worker threads.

        Raises: as write(), and LengthError when data is no multiple of 4096 bytes. Thread-safety: as write().
        """
        cdef uint64_t frame = _unsigned(pfn, "page frame number", errors.AddressError)
        cdef uint32_t who = _asid(asid)
        cdef Py_buffer view
        cdef Py_ssize_t length
        cdef int status
        self.acquire(data, &view, False, "data")
        length = view.len
        if length % CSVF_PAGE_BYTES != 0:
            PyBuffer_Release(&view)
            raise errors.LengthError(f"data has {length} bytes; expected a multiple of {CSVF_PAGE_BYTES}")
        self.calls += 1
        with nogil:
            status = csvf_write_pages(self.engine, who, frame, view.buf, length // CSVF_PAGE_BYTES)
        self.calls -= 1
        PyBuffer_Release(&view)
        if status != CSVF_OK:
            raise self.page_failure(status, "write", frame, length, who)

    def read_pages(self, pfn, count, asid, out=None):
        """Reads `count` whole pages from page frame `pfn` on, as new bytes or into `out`.

        Raises: as read(). Thread-safety: as write().
        """
        cdef uint64_t frame = _unsigned(pfn, "page frame number", errors.AddressError)
        cdef Py_ssize_t pages = _length(count, "count")
        cdef uint32_t who = _asid(asid)
        cdef _Output output
        cdef int status
        self.check()
        if pages > self.shape // CSVF_PAGE_BYTES:
            raise errors.AddressError(
                f"count is {pages} pages; the memory has {self.shape // CSVF_PAGE_BYTES}")
        output = _Output.make(out, pages * CSVF_PAGE_BYTES)
        self.check()  # again: making it may run the garbage collector, and with it anybody's finalizer
        self.calls += 1
        with nogil:
            status = csvf_read_pages(self.engine, output.data, pages, who, frame)
        self.calls -= 1
        if status != CSVF_OK:
            raise self.page_failure(status, "read", frame, pages * CSVF_PAGE_BYTES, who)
        return output.result

    cdef object page_failure(self, int status, str what, uint64_t frame, uint64_t length, uint32_t who):
        if status == CSVF_ERR_RANGE:
            first = self.base_address // CSVF_PAGE_BYTES
            return errors.AddressError(
                f"{what} of {length // CSVF_PAGE_BYTES} pages at page frame {frame:#x} leaves the memory; expected "
                f"frames within {first:#x} .. {first + self.shape // CSVF_PAGE_BYTES - 1:#x}")
        return self.failure(status, what, frame * CSVF_PAGE_BYTES, length, who)

    def write_line(self, address, data, asid):
        """Writes one 64-byte line at an address that is a multiple of 64. Raises: as write(), AlignmentError, LengthError."""
        cdef uint64_t place = _unsigned(address, "address", errors.AddressError)
        cdef uint32_t who = _asid(asid)
        cdef Py_buffer view
        cdef Py_ssize_t length
        cdef int status = CSVF_OK
        self.acquire(data, &view, False, "data")
        length = view.len
        if length == CSVF_LINE_BYTES:
            status = csvf_write_line(self.engine, who, place, <const uint8_t *>view.buf)
        PyBuffer_Release(&view)
        if length != CSVF_LINE_BYTES:
            raise errors.LengthError(f"a line has {length} bytes; expected {CSVF_LINE_BYTES}")
        if status == CSVF_ERR_ALIGNMENT:
            raise errors.AlignmentError(f"address {place:#x} is not a multiple of {CSVF_LINE_BYTES}")
        if status != CSVF_OK:
            raise self.failure(status, "write", place, CSVF_LINE_BYTES, who)

    def read_line(self, address, asid):
        """Reads one 64-byte line at an address that is a multiple of 64. Raises: as read(), AlignmentError."""
        cdef uint64_t place = _unsigned(address, "address", errors.AddressError)
        cdef uint32_t who = _asid(asid)
        self.check()
        data = PyBytes_FromStringAndSize(NULL, CSVF_LINE_BYTES)
        cdef int status = csvf_read_line(self.engine, <uint8_t *>PyBytes_AS_STRING(data), who, place)
        if status == CSVF_ERR_ALIGNMENT:
            raise errors.AlignmentError(f"address {place:#x} is not a multiple of {CSVF_LINE_BYTES}")
        if status != CSVF_OK:
            raise self.failure(status, "read", place, CSVF_LINE_BYTES, who)
        return data

    # ---- Launch

    def encrypt_in_place(self, address, length, asid):
        """Makes plaintext the host put into memory that guest's memory (LAUNCH_UPDATE_DATA without the measurement).

        Args: address, length: multiples of 16.
        Raises: AddressError, AlignmentError, LengthError, AsidError, UnknownAsidError, ClosedError.
        Thread-safety: any thread; the range must not be accessed by others meanwhile.
        """
        cdef uint64_t place = _unsigned(address, "address", errors.AddressError)
        cdef Py_ssize_t size = _length(length, "length")
        cdef uint32_t who = _asid(asid)
        cdef int status
        self.check()
        self.launch_range(place, size, CSVF_BLOCK_BYTES)
        self.calls += 1
        with nogil:
            status = csvf_encrypt_in_place(self.engine, who, place, size)
        self.calls -= 1
        if status != CSVF_OK:
            raise self.failure(status, "encrypting in place", place, size, who)

    def launch_update(self, address, length, asid, *, linear=None, page_digests=False):
        """Measures plaintext the host put into memory and encrypts it in place, in the same pass.

        Args:
            address, length: multiples of 16; with page_digests multiples of 4096.
            asid: the guest whose memory this becomes.
            linear: an sm3 object that goes on over the plaintext (the launch digest), or None.
            page_digests: True to get the SM3 of each plaintext page (the leaves of the page tree).
        Returns: 32 bytes per page with page_digests, else None.
        Raises: as encrypt_in_place(). Thread-safety: any thread; `linear` is locked during the call.
        """
        cdef uint64_t place = _unsigned(address, "address", errors.AddressError)
        cdef Py_ssize_t size = _length(length, "length")
        cdef uint32_t who = _asid(asid)
        cdef csvf_sm3 *stream = NULL
        cdef uint8_t *leaves = NULL
        cdef sm3 running = None
        cdef int status
        if linear is not None:
            if not isinstance(linear, sm3):
                raise TypeError(f"linear must be a csvfast.sm3 object or None, not {type(linear).__name__}")
            running = linear
            running.need_lock()
            stream = &running.state
        self.check()
        self.launch_range(place, size, CSVF_PAGE_BYTES if page_digests else CSVF_BLOCK_BYTES)
        digests = None
        if page_digests:
            if size > self.shape:
                raise self.failure(CSVF_ERR_RANGE, "launch update", place, size, who)
            digests = PyBytes_FromStringAndSize(NULL, size // CSVF_PAGE_BYTES * CSVF_SM3_BYTES)
            leaves = <uint8_t *>PyBytes_AS_STRING(digests)
        self.calls += 1  # before waiting for the stream's lock, which gives up the GIL
        if running is not None:
            running.enter()
        with nogil:
            status = csvf_launch_update(self.engine, stream, leaves, who, place, size)
        if running is not None:
            running.leave()
        self.calls -= 1
        if status != CSVF_OK:
            raise self.failure(status, "launch update", place, size, who)
        return digests

    cdef int launch_range(self, uint64_t address, Py_ssize_t length, Py_ssize_t unit) except -1:
        if address % unit != 0:
            raise errors.AlignmentError(f"address {address:#x} is not a multiple of {unit}")
        if length % unit != 0:
            raise errors.LengthError(f"length is {length}; expected a multiple of {unit}")
        return 0

    # ---- Facts

    def sync(self):
        """Writes a file-backed memory to its file; does nothing for the others. Raises: SystemCallError, ClosedError."""
        cdef int status, number
        self.check()
        self.calls += 1
        with nogil:
            status = csvf_engine_sync(self.engine)
            number = errno
        self.calls -= 1
        if status == CSVF_ERR_SYSTEM:
            raise _system_error(number, "writing the memory to its file")
        if status != CSVF_OK:
            raise _status_error(status, "writing the memory to its file")

    def stats(self):
        """Counters since creation, as a dict; exact when no other call is running."""
        cdef csvf_stats stats
        cdef int status
        self.check()
        stats.struct_size = sizeof(csvf_stats)
        status = csvf_engine_stats(self.engine, &stats)
        if status != CSVF_OK:
            raise _status_error(status, "reading the statistics")
        return {
            "bytes_encrypted": stats.bytes_encrypted,
            "bytes_decrypted": stats.bytes_decrypted,
            "bytes_host": stats.bytes_host,
            "read_modify_writes": stats.read_modify_writes,
            "tweak_hits": stats.tweak_hits,
            "tweak_misses": stats.tweak_misses,
            "keys_installed": stats.keys_installed,
            "keys_removed": stats.keys_removed,
            "asids_active": stats.asids_active,
        }
