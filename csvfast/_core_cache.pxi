# The caches of one CPU core over an Engine. Part of _core.pyx. csvfast.memory.CacheModel gives sizes and results their shapes.

cdef dict _REPLACEMENTS = {
    "lru": CSVF_REPLACE_LRU, "fifo": CSVF_REPLACE_FIFO, "tree": CSVF_REPLACE_TREE, "random": CSVF_REPLACE_RANDOM,
}
cdef dict _FILLS = {"line": CSVF_FILL_LINE, "page": CSVF_FILL_PAGE}


cdef uint32_t _small(object number, str name) except? 0xFFFFFFFE:
    cdef uint64_t value = _unsigned(number, name, errors.ArgumentError)
    if value >= 0xFFFFFFFE:
        raise errors.ArgumentError(f"{name} is {value}; expected less than 2**32 - 2")
    return <uint32_t>value


cdef int _c_bit(object encrypted, uint32_t asid) except -1:
    return asid != 0 if encrypted is None else 1 if encrypted else 0


cdef class Cache:
    """Base of csvfast.memory.CacheModel: a csvf_cache with checked arguments. See there for the arguments."""

    cdef csvf_cache *cache
    cdef readonly Engine memory
    cdef bint busy              # a call runs without the GIL: the C object is one thread's at a time
    cdef bint opened
    cdef object __weakref__

    def __init__(self, memory, *, levels, tlb, fill="line", fabric_lines=16, c_bit=47, memory_cycles=200,
                 encryption_cycles=20, write_back_cycles=0, seed=0):
        cdef csvf_cache_config config
        cdef int status
        cdef Py_ssize_t at
        if self.opened:
            raise errors.ArgumentError("this cache model has already been initialised")
        if not isinstance(memory, Engine):
            raise TypeError(f"memory must be an EncryptedMemory, not {type(memory).__name__}")
        config.struct_size = sizeof(config)
        status = csvf_cache_defaults(&config)
        if status != CSVF_OK:
            raise _status_error(status, "reading the defaults")
        levels = list(levels)
        if not 1 <= len(levels) <= CSVF_CACHE_LEVELS:
            raise errors.ArgumentError(f"{len(levels)} cache levels; expected 1 .. {CSVF_CACHE_LEVELS}")
        for at in range(<Py_ssize_t>CSVF_CACHE_LEVELS):
            config.levels[at].size = 0
            if at < len(levels):
                size, ways, replacement, cycles = levels[at]
                what = f"cache level {at + 1}"
                config.levels[at].size = _unsigned(size, "size of a cache", errors.LengthError)
                config.levels[at].ways = self.fit(size, ways, CSVF_LINE_BYTES, replacement, what)
                config.levels[at].replacement = _choice(_REPLACEMENTS, replacement, "replacement")
                config.levels[at].cycles = _small(cycles, "cycles")
        config.tlb_entries = 0
        if tlb is not None:
            entries, ways, replacement = tlb
            config.tlb_ways = self.fit(entries, ways, 1, replacement, "the TLB")
            config.tlb_entries = _small(entries, "entries of the TLB")
            config.tlb_replacement = _choice(_REPLACEMENTS, replacement, "replacement")
        config.fill = _choice(_FILLS, fill, "fill")
        config.fabric_lines = _small(fabric_lines, "fabric_lines")
        if config.fabric_lines > CSVF_FABRIC_LINES_MAX:
            raise errors.ArgumentError(f"fabric_lines is {fabric_lines}; expected 0 .. {CSVF_FABRIC_LINES_MAX}")
        config.c_bit = _small(c_bit, "c_bit")
        if not 32 <= config.c_bit <= 51:
            raise errors.ArgumentError(f"c_bit is {c_bit}; expected 32 .. 51")
        config.memory_cycles = _small(memory_cycles, "memory_cycles")
        config.encryption_cycles = _small(encryption_cycles, "encryption_cycles")
        config.write_back_cycles = _small(write_back_cycles, "write_back_cycles")
        config.seed = _unsigned(seed, "seed", errors.ArgumentError)
        (<Engine>memory).check()
        status = csvf_cache_create(&self.cache, (<Engine>memory).engine, &config)
        if status != CSVF_OK:
            raise _status_error(status, "making a cache model")
        self.memory = memory
        self.memory.caches += 1
        self.opened = True

    cdef uint32_t fit(self, object size, object ways, Py_ssize_t unit, object replacement, str what) except? 0xFFFFFFFE:
        """The number of ways, when the sets come out as a power of two."""
        cdef uint64_t total = _unsigned(size, f"size of {what}", errors.LengthError)
        cdef uint64_t count = _unsigned(ways, f"ways of {what}", errors.ArgumentError)
        cdef uint64_t sets
        if not 1 <= count <= CSVF_CACHE_WAYS_MAX:
            raise errors.ArgumentError(f"{what} has {count} ways; expected 1 .. {CSVF_CACHE_WAYS_MAX}")
        if replacement == "tree" and count & (count - 1):
            raise errors.ArgumentError(f"{what} has {count} ways; tree replacement needs a power of two")
        sets = total // (count * <uint64_t>unit)
        if total == 0 or total % (count * <uint64_t>unit) != 0 or sets & (sets - 1) or sets * count > <uint64_t>1 << 31:
            raise errors.LengthError(
                f"{what} of {total} {'bytes' if unit > 1 else 'entries'} in {count} ways; expected {count * <uint64_t>unit} "
                "times a power of two")
        return <uint32_t>count

    def __dealloc__(self):
        csvf_cache_destroy(self.cache)
        if self.cache != NULL and self.memory is not None:
            self.memory.caches -= 1

    def __reduce__(self):
        raise _no_pickle(self)

    cdef int check(self) except -1:
        if self.cache == NULL:
            raise errors.ClosedError("the cache model is closed" if self.opened else "the cache model was never initialised")
        if self.busy:
            raise errors.MemoryInUseError("another thread is inside a call on this cache model; expected one at a time")
        return 0

    def close(self):
        """Wipes what is cached and drops it, dirty lines too, as cutting the power does. Closing twice is allowed.

        Raises: MemoryInUseError while another thread is inside a call.
        """
        if self.cache == NULL:
            return
        self.check()
        csvf_cache_destroy(self.cache)
        self.cache = NULL
        self.memory.caches -= 1

    @property
    def closed(self):
        """True after close()."""
        return self.cache == NULL

    cdef object failure(self, int status, str what, uint64_t address, uint64_t length, uint32_t asid, int c_bit):
        if status == CSVF_ERR_ASID and asid == 0 and c_bit:
            return errors.AsidError("the host (ASID 0) has no encrypted memory of its own here; expected encrypted=False")
        return self.memory.failure(status, what, address, length, asid)

    cdef object fault(self, csvf_translation *found, uint64_t address, uint32_t asid):
        stage = "nested" if found.fault_stage == CSVF_STAGE_NESTED else "guest"
        where = f"the {stage} tables at level {found.fault_level}" if found.fault_level else f"the {stage} stage: no such address"
        return errors.PageFaultError(
            f"virtual address {address:#x} of ASID {asid}: {found.address:#x} refused by {where}",
            found.address, stage, found.fault_level)

    # ---- Access at physical addresses

    def read(self, address, length, asid, *, encrypted=None):
        """Reads through the caches at a system physical address.

        Args:
            asid: who reads; 0 is the host.
            encrypted: the access's C-bit; None = True for a guest, False for the host.
        Returns: bytes. A hit needs no key: a line that stayed when its ASID's key went is read as it is.
        Raises: AddressError, LengthError, AsidError, UnknownAsidError (a miss without a key), ClosedError, MemoryInUseError.
        Thread-safety: one thread at a time uses a cache model; several models may stand on one memory.
        """
        cdef uint64_t place = _unsigned(address, "address", errors.AddressError)
        cdef Py_ssize_t size = _length(length, "length")
        cdef uint32_t who = _asid(asid)
        cdef int c_bit = _c_bit(encrypted, who), status
        self.check()
        if size > self.memory.shape:
            raise self.failure(CSVF_ERR_RANGE, "read", place, size, who, c_bit)
        data = PyBytes_FromStringAndSize(NULL, size)
        status = csvf_cache_read(self.cache, PyBytes_AS_STRING(data), size, who, place, c_bit)
        if status != CSVF_OK:
            raise self.failure(status, "read", place, size, who, c_bit)
        return data

    def write(self, address, data, asid, *, encrypted=None):
        """Writes through the caches at a system physical address: to the lines, which go to DRAM when they are evicted or flushed.

        Raises: as read(), OverlapError, BufferTypeError, NonContiguousBufferError. Lines before one that misses without a key have
            been written. Thread-safety: as read().
        """
        cdef uint64_t place = _unsigned(address, "address", errors.AddressError)
        cdef uint32_t who = _asid(asid)
        cdef int c_bit = _c_bit(encrypted, who), status
        cdef Py_buffer view
        cdef Py_ssize_t length
        _acquire(data, &view, False, "data")
        try:
            self.check()
            length = view.len
            status = csvf_cache_write(self.cache, who, place, view.buf, length, c_bit)
        finally:
            PyBuffer_Release(&view)
        if status != CSVF_OK:
            raise self.failure(status, "write", place, length, who, c_bit)

    # ---- Flushes

    def flush(self, address, length, asid, *, encrypted=None):
        """CLFLUSH over a range: writes back and drops the lines of exactly this ASID and C-bit; those of others stay.

        Raises: as read(). Thread-safety: as read().
        """
        cdef uint64_t place = _unsigned(address, "address", errors.AddressError)
        cdef Py_ssize_t size = _length(length, "length")
        cdef uint32_t who = _asid(asid)
        cdef int c_bit = _c_bit(encrypted, who)
        self.check()
        cdef int status = csvf_cache_flush(self.cache, who, place, size, c_bit)
        if status != CSVF_OK:
            raise self.failure(status, "flush", place, size, who, c_bit)

    def write_back(self):
        """WBINVD: writes back every dirty line, as far as the fabric, and drops all lines. The TLB stays. Raises: ClosedError."""
        self.check()
        csvf_cache_write_back(self.cache)

    def flush_fabric(self):
        """DF_FLUSH: write-backs that wait go to DRAM under the key their ASID has now. Raises: ClosedError."""
        self.check()
        csvf_cache_fabric_flush(self.cache)

    # ---- Translation

    def set_tables(self, asid, *, guest_root=None, nested_root=None):
        """Gives an ASID its page tables; flushes nothing. A stage without a table maps every address to itself.

        Args:
            guest_root: guest physical address of the top table, in the guest's encrypted memory; its C-bit is ignored.
            nested_root: system physical address of the host's top table.
        Raises: AsidError, AlignmentError, AddressError, ClosedError.
        """
        cdef uint32_t who = _asid(asid)
        cdef uint64_t first = CSVF_NO_TABLE, second = CSVF_NO_TABLE
        if guest_root is not None:
            first = _unsigned(guest_root, "guest_root", errors.AddressError)
        if nested_root is not None:
            second = _unsigned(nested_root, "nested_root", errors.AddressError)
        self.check()
        cdef int status = csvf_cache_set_tables(self.cache, who, first, second)
        if status == CSVF_ERR_ALIGNMENT:
            raise errors.AlignmentError(f"roots {first:#x} and {second:#x}; expected multiples of {CSVF_PAGE_BYTES}")
        if status != CSVF_OK:
            raise self.failure(status, "setting page tables", 0, 0, who, 0)

    def translate(self, address, asid, *, write=False, execute=False, user=False):
        """Translates a virtual address through TLB and tables, for an access of that kind.

        Returns: a dict of address (system physical), encrypted (the C-bit), writable, executable, user (0 or 1).
        Raises: PageFaultError, AsidError, UnknownAsidError, AddressError (a table outside the memory), ClosedError.
        """
        cdef uint64_t place = _unsigned(address, "address", errors.AddressError)
        cdef uint32_t who = _asid(asid)
        cdef csvf_translation found
        self.check()
        self.find(&found, place, who, (CSVF_ACCESS_WRITE if write else 0) | (CSVF_ACCESS_EXECUTE if execute else 0)
                  | (CSVF_ACCESS_USER if user else 0))
        return {
            "address": found.address,
            "encrypted": found.c_bit,
            "writable": (found.allowed & CSVF_ACCESS_WRITE) != 0,
            "executable": (found.allowed & CSVF_ACCESS_EXECUTE) != 0,
            "user": (found.allowed & CSVF_ACCESS_USER) != 0,
        }

    cdef int find(self, csvf_translation *found, uint64_t address, uint32_t asid, uint32_t access) except -1:
        cdef int status = csvf_cache_translate(self.cache, found, asid, address, access)
        if status == CSVF_ERR_FAULT:
            raise self.fault(found, address, asid)
        if status == CSVF_ERR_RANGE:
            raise errors.AddressError(f"the page tables for address {address:#x} of ASID {asid} lead outside the memory")
        if status != CSVF_OK:
            raise self.failure(status, "translation", address, 0, asid, 0)
        return 0

    cdef object virtual_failure(self, int status, str what, uint64_t address, uint64_t length, uint32_t asid, uint32_t access):
        """The exception for a virtual access; which page of it was refused is found by asking again, which counts again."""
        cdef csvf_translation found
        cdef uint64_t page
        if status == CSVF_ERR_FAULT:
            for page in range(address // CSVF_PAGE_BYTES, (address + length - 1) // CSVF_PAGE_BYTES + 1):
                if csvf_cache_translate(self.cache, &found, asid, max(address, page * CSVF_PAGE_BYTES), access) == CSVF_ERR_FAULT:
                    return self.fault(&found, max(address, page * CSVF_PAGE_BYTES), asid)
        if status == CSVF_ERR_RANGE:
            return errors.AddressError(f"{what} of {length} bytes at virtual address {address:#x} leads outside the memory")
        return self.failure(status, what, address, length, asid, 0)

    def read_virtual(self, address, length, asid, *, execute=False, user=False):
        """Reads at a virtual address. Raises: as translate() and read(). Thread-safety: as read()."""
        cdef uint64_t place = _unsigned(address, "address", errors.AddressError)
        cdef Py_ssize_t size = _length(length, "length")
        cdef uint32_t who = _asid(asid)
        cdef uint32_t access = (CSVF_ACCESS_EXECUTE if execute else 0) | (CSVF_ACCESS_USER if user else 0)
        self.check()
        if size > self.memory.shape:  # before anything of that size is allocated
            raise errors.LengthError(f"length is {size}; expected at most {self.memory.shape}, the size of the memory")
        data = PyBytes_FromStringAndSize(NULL, size)
        cdef int status = csvf_cache_read_virtual(self.cache, PyBytes_AS_STRING(data), size, who, place, access)
        if status != CSVF_OK:
            raise self.virtual_failure(status, "read", place, size, who, access)
        return data

    def write_virtual(self, address, data, asid, *, user=False):
        """Writes at a virtual address. Raises: as translate() and write(). Thread-safety: as read()."""
        cdef uint64_t place = _unsigned(address, "address", errors.AddressError)
        cdef uint32_t who = _asid(asid)
        cdef uint32_t access = CSVF_ACCESS_WRITE | (CSVF_ACCESS_USER if user else 0)
        cdef Py_buffer view
        cdef Py_ssize_t length
        cdef int status
        _acquire(data, &view, False, "data")
        try:
            self.check()
            length = view.len
            status = csvf_cache_write_virtual(self.cache, who, place, view.buf, length, access)
        finally:
            PyBuffer_Release(&view)
        if status != CSVF_OK:
            raise self.virtual_failure(status, "write", place, length, who, access)

    def invalidate_page(self, address, asid):
        """INVLPGA: drops the translation of the page at a virtual address under an ASID. Raises: AsidError, ClosedError."""
        cdef uint64_t place = _unsigned(address, "address", errors.AddressError)
        cdef uint32_t who = _asid(asid)
        self.check()
        cdef int status = csvf_tlb_invalidate_page(self.cache, who, place)
        if status != CSVF_OK:
            raise self.failure(status, "INVLPGA", place, 0, who, 0)

    def flush_tlb(self, asid=None):
        """Drops the translations of an ASID (TLB_CONTROL's flush by ASID), or all. Raises: AsidError, ClosedError."""
        cdef int status
        cdef uint32_t who
        self.check()
        if asid is None:
            csvf_tlb_flush(self.cache)
            return
        who = _asid(asid)
        status = csvf_tlb_flush_asid(self.cache, who)
        if status != CSVF_OK:
            raise self.failure(status, "TLB flush", 0, 0, who, 0)

    # ---- Traces and facts

    def run(self, accesses, asid, *, virtual=False, encrypted=None):
        """Runs a trace: everything happens as for real accesses, but no bytes move to or from the caller.

        Args:
            accesses: records of 16 bytes, native order: address (8), length (4), access (4: 1 = write, 2 = execute, 4 = user).
            virtual: addresses go through TLB and tables; else they are physical and `encrypted` is their C-bit.
        Returns: the number of accesses. Raises: as the single accesses, with the number of the one that was refused.
        Thread-safety: as read(); other threads run meanwhile.
        """
        cdef uint32_t who = _asid(asid)
        cdef int c_bit = _c_bit(encrypted, who), is_virtual = 1 if virtual else 0, status
        cdef size_t done = 0, count
        cdef Py_buffer view
        cdef csvf_trace_access refused
        refused.address, refused.length, refused.access = 0, 0, 0
        _acquire(accesses, &view, False, "accesses")
        try:
            self.check()
            if view.len % sizeof(csvf_trace_access) != 0:
                raise errors.LengthError(f"accesses has {view.len} bytes; expected a multiple of {sizeof(csvf_trace_access)}")
            if <size_t>view.buf % 8 != 0:
                raise errors.AlignmentError("accesses does not begin on an 8-byte boundary")
            count = view.len // sizeof(csvf_trace_access)
            self.busy = True
            with nogil:
                status = csvf_cache_run(self.cache, &done, who, <const csvf_trace_access *>view.buf, count, is_virtual, c_bit)
            self.busy = False
            if done < count:
                refused = (<const csvf_trace_access *>view.buf)[done]
        finally:
            PyBuffer_Release(&view)
        if status == CSVF_OK:
            return count
        what = f"access {done} of the trace"
        if done == count:  # refused before the first of none
            raise self.failure(status, what, 0, 0, who, 0 if is_virtual else c_bit)
        if status == CSVF_ERR_ARGUMENT:
            raise errors.ArgumentError(f"{what}: kind {refused.access} is out of range; expected 0 .. 7")
        if status == CSVF_ERR_LENGTH:
            raise errors.LengthError(f"{what} has a length of 0")
        if is_virtual:
            raise self.virtual_failure(status, what, refused.address, refused.length, who, refused.access)
        raise self.failure(status, what, refused.address, refused.length, who, c_bit)

    def contents(self, asid):
        """What is cached for an ASID (0: lines with C-bit 0): a dict of lines, dirty, waiting (in the fabric)."""
        cdef uint32_t who = _asid(asid)
        cdef uint64_t lines = 0, dirty = 0, waiting = 0
        self.check()
        cdef int status = csvf_cache_contents(self.cache, &lines, &dirty, &waiting, who)
        if status != CSVF_OK:
            raise self.failure(status, "contents", 0, 0, who, 0)
        return {"lines": lines, "dirty": dirty, "waiting": waiting}

    def stats(self, asid):
        """Counts of an ASID since creation, as a dict; see csvf_cache_stats in csvfast.h. Raises: AsidError, ClosedError."""
        cdef uint32_t who = _asid(asid)
        cdef csvf_cache_stats stats
        self.check()
        stats.struct_size = sizeof(stats)
        cdef int status = csvf_cache_statistics(self.cache, &stats, who)
        if status != CSVF_OK:
            raise self.failure(status, "statistics", 0, 0, who, 0)
        return {
            "reads": stats.reads,
            "writes": stats.writes,
            "walk_reads": stats.walk_reads,
            "hits_1": stats.hits[0],
            "hits_2": stats.hits[1],
            "hits_3": stats.hits[2],
            "misses": stats.misses,
            "write_backs": stats.write_backs,
            "lines_lost": stats.lines_lost,
            "bytes_decrypted": stats.bytes_decrypted,
            "bytes_encrypted": stats.bytes_encrypted,
            "tlb_hits": stats.tlb_hits,
            "tlb_misses": stats.tlb_misses,
            "faults": stats.faults,
            "cycles": stats.cycles,
            "encryption_cycles": stats.encryption_cycles,
        }
