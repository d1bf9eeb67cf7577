# SM4 for Python: XTS, CTR and GCM objects over any buffer. Part of _core.pyx.

ctypedef int (*_xts_bulk)(csvf_pool *, const csvf_xts *, uint8_t *, const uint8_t *, size_t, size_t,
                         uint64_t) noexcept nogil


cdef object _transform_error(int status, Py_ssize_t length, str what):
    if status == CSVF_ERR_OVERLAP:
        return errors.OverlapError(f"out overlaps data without being the same buffer ({what} of {length} bytes)")
    return _status_error(status, f"{what} of {length} bytes")


@cython.final
cdef class SM4XTS:
    """SM4XTS(key, *, standard='gb', unit_size=4096, pool=None)\n--\n\nSM4-XTS under one key, over consecutive data units.

    Args:
        key: 32 bytes, K1 (data) then K2 (tweak); the halves must differ.
        standard: "gb" (GB/T 17964-2021) or "ieee" (IEEE 1619-2018): the order in which the tweak is multiplied.
        unit_size: bytes of a data unit, 16 .. 16 MiB. A length that is no multiple of 16 uses ciphertext stealing.
        pool: WorkerPool to split large calls over, or None for the calling thread alone.
    Raises: KeyLengthError, WeakKeyError, LengthError (unit_size), ArgumentError (standard), BufferTypeError.
    Standard: GB/T 17964-2021, IEEE 1619-2018.
    Thread-safety: read-only after construction; any number of threads may use one object at once.
    """

    cdef csvf_xts xts
    cdef readonly size_t unit_size
    cdef readonly str standard
    cdef WorkerPool pool

    def __cinit__(self, key, *, standard="gb", unit_size=4096, pool=None):
        cdef Py_buffer view
        cdef int status, order = _choice(_STANDARDS, standard, "standard")
        cdef Py_ssize_t size = _length(unit_size, "unit_size")
        if not CSVF_XTS_UNIT_MIN <= size <= CSVF_XTS_UNIT_MAX:
            raise errors.LengthError(f"unit_size is {size}; expected {CSVF_XTS_UNIT_MIN} .. {CSVF_XTS_UNIT_MAX}")
        if pool is not None and not isinstance(pool, WorkerPool):
            raise TypeError(f"pool must be a WorkerPool or None, not {type(pool).__name__}")
        _acquire(key, &view, False, "key")
        length = view.len
        status = CSVF_OK
        if view.len == CSVF_XTS_KEY_BYTES:
            status = csvf_xts_init(&self.xts, <const uint8_t *>view.buf, order)
        PyBuffer_Release(&view)
        if length != CSVF_XTS_KEY_BYTES:
            raise _key_length_error(length, CSVF_XTS_KEY_BYTES, "SM4-XTS")
        if status == CSVF_ERR_KEY:
            raise errors.WeakKeyError("the halves K1 and K2 of the SM4-XTS key are equal; expected two different keys")
        if status != CSVF_OK:
            raise _status_error(status, "SM4-XTS key")
        self.standard = standard
        self.unit_size = size
        self.pool = pool

    def __dealloc__(self):
        csvf_wipe(&self.xts, sizeof(self.xts))

    def __reduce__(self):
        raise _no_pickle(self)

    def __repr__(self):
        return f"<SM4XTS standard={self.standard!r} unit_size={self.unit_size}>"

    cdef object _bulk(self, object data, object unit, object out, bint decrypting):
        cdef Py_buffer view
        cdef uint64_t first = _unsigned(unit, "unit", errors.AddressError)
        cdef csvf_pool *workers = NULL if self.pool is None else self.pool.pool
        cdef _Output output
        cdef Py_ssize_t length, tail
        cdef int status
        cdef _xts_bulk call = csvf_pool_xts_decrypt if decrypting else csvf_pool_xts_encrypt
        _acquire(data, &view, False, "data")
        try:
            length = view.len
            tail = length % self.unit_size
            if 0 < tail < CSVF_XTS_UNIT_MIN:
                raise errors.LengthError(
                    f"data has {length} bytes, which leaves {tail} for the last data unit of {self.unit_size}; "
                    f"expected none or at least {CSVF_XTS_UNIT_MIN}")
            output = _Output.make(out, length)
            if length < GIL_BYTES:
                status = call(NULL, &self.xts, output.data, <const uint8_t *>view.buf, length, self.unit_size, first)
            else:
                with nogil:
                    status = call(workers, &self.xts, output.data, <const uint8_t *>view.buf, length, self.unit_size,
                                  first)
        finally:
            PyBuffer_Release(&view)
        if status == CSVF_ERR_RANGE:
            raise errors.AddressError(f"unit {first} and the units after it pass 2**64 - 1 within {length} bytes")
        if status != CSVF_OK:
            raise _transform_error(status, length, "SM4-XTS")
        return output.result

    def encrypt(self, data, unit=0, out=None):
        """Encrypts data units numbered unit, unit + 1, ...; the last may be shorter, but not under 16 bytes.

        Args:
            data: C-contiguous buffer.
            unit: number of the first data unit, 0 .. 2**64 - 1; a page frame number for memory.
            out: writable buffer of the same length, may be data itself (in place); None returns new bytes.
        Returns: bytes, or out.
        Raises: LengthError, AddressError, OverlapError, BufferTypeError, ReadOnlyBufferError, NonContiguousBufferError.
        """
        return self._bulk(data, unit, out, False)

    def decrypt(self, data, unit=0, out=None):
        """Inverse of encrypt(); arguments, result and exceptions are the same."""
        return self._bulk(data, unit, out, True)

    cdef object _unit(self, object data, object tweak, object out, bint decrypting):
        cdef Py_buffer view, raw
        cdef uint8_t value[16]
        cdef _Output output
        cdef Py_ssize_t length
        cdef int status
        _acquire(tweak, &raw, False, "tweak")
        length = raw.len
        if length == 16:
            memcpy(value, raw.buf, 16)
        PyBuffer_Release(&raw)
        if length != 16:
            raise errors.LengthError(f"tweak has {length} bytes; expected 16")
        _acquire(data, &view, False, "data")
        try:
            length = view.len
            if not CSVF_XTS_UNIT_MIN <= length <= CSVF_XTS_UNIT_MAX:
                raise errors.LengthError(
                    f"a data unit has {length} bytes; expected {CSVF_XTS_UNIT_MIN} .. {CSVF_XTS_UNIT_MAX}")
            output = _Output.make(out, length)
            with nogil:
                if decrypting:
                    status = csvf_xts_decrypt_unit(&self.xts, output.data, <const uint8_t *>view.buf, length, value)
                else:
                    status = csvf_xts_encrypt_unit(&self.xts, output.data, <const uint8_t *>view.buf, length, value)
        finally:
            PyBuffer_Release(&view)
        if status != CSVF_OK:
            raise _transform_error(status, length, "SM4-XTS unit")
        return output.result

    def encrypt_unit(self, data, tweak, out=None):
        """Encrypts one data unit of 16 bytes to 16 MiB under a 16-byte tweak input (the "IV" of other libraries)."""
        return self._unit(data, tweak, out, False)

    def decrypt_unit(self, data, tweak, out=None):
        """Inverse of encrypt_unit()."""
        return self._unit(data, tweak, out, True)

    cdef object _span(self, object data, object unit, object offset, object out, bint decrypting):
        cdef Py_buffer view
        cdef uint64_t number = _unsigned(unit, "unit", errors.AddressError)
        cdef uint64_t start = _unsigned(offset, "offset", errors.AddressError)
        cdef _Output output
        cdef Py_ssize_t length
        cdef int status
        if start % CSVF_BLOCK_BYTES != 0:
            raise errors.AlignmentError(f"offset {start} is not a multiple of 16")
        _acquire(data, &view, False, "data")
        try:
            length = view.len
            if length % CSVF_BLOCK_BYTES != 0:
                raise errors.LengthError(f"data has {length} bytes; expected a multiple of 16")
            if start > CSVF_XTS_UNIT_MAX or <uint64_t>length > CSVF_XTS_UNIT_MAX - start:
                raise errors.AddressError(
                    f"offset {start} with {length} bytes passes the end of the largest unit, {CSVF_XTS_UNIT_MAX}")
            output = _Output.make(out, length)
            if length < GIL_BYTES:
                if decrypting:
                    status = csvf_xts_decrypt_span(&self.xts, output.data, <const uint8_t *>view.buf, length, number,
                                                   start)
                else:
                    status = csvf_xts_encrypt_span(&self.xts, output.data, <const uint8_t *>view.buf, length, number,
                                                   start)
            else:
                with nogil:
                    if decrypting:
                        status = csvf_xts_decrypt_span(&self.xts, output.data, <const uint8_t *>view.buf, length,
                                                       number, start)
                    else:
                        status = csvf_xts_encrypt_span(&self.xts, output.data, <const uint8_t *>view.buf, length,
                                                       number, start)
        finally:
            PyBuffer_Release(&view)
        if status != CSVF_OK:
            raise _transform_error(status, length, "SM4-XTS span")
        return output.result

    def encrypt_span(self, data, unit, offset, out=None):
        """Encrypts whole blocks from byte `offset` (a multiple of 16) inside one unit, without the blocks before them."""
        return self._span(data, unit, offset, out, False)

    def decrypt_span(self, data, unit, offset, out=None):
        """Inverse of encrypt_span()."""
        return self._span(data, unit, offset, out, True)

    cdef object _lines(self, object data, object addresses, object out, bint decrypting):
        cdef Py_buffer view, places
        cdef _Output output
        cdef Py_ssize_t length, count, index
        cdef int status
        _acquire(addresses, &places, False, "addresses")
        try:
            # The item type is checked by its size and kind: a wrong one would be read as other addresses.
            if memoryview(addresses).format not in ("Q", "L", "=Q", "<Q", "@Q", "@L") or places.itemsize != 8:
                raise errors.BufferTypeError(
                    "addresses must hold unsigned 64-bit integers (numpy.uint64 or array('Q')); got format "
                    f"{memoryview(addresses).format!r}")
            count = places.len // 8
            for index in range(count):
                if (<const uint64_t *>places.buf)[index] % CSVF_LINE_BYTES != 0:
                    raise errors.AlignmentError(
                        f"address {(<const uint64_t *>places.buf)[index]:#x} (number {index}) is not a multiple of 64")
            _acquire(data, &view, False, "data")
            try:
                length = view.len
                if length != count * CSVF_LINE_BYTES:
                    raise errors.LengthError(
                        f"data has {length} bytes; expected {count * CSVF_LINE_BYTES}: 64 for each of {count} addresses")
                output = _Output.make(out, length)
                with nogil:
                    if decrypting:
                        status = csvf_xts_decrypt_lines(&self.xts, output.data, <const uint8_t *>view.buf,
                                                        <const uint64_t *>places.buf, count)
                    else:
                        status = csvf_xts_encrypt_lines(&self.xts, output.data, <const uint8_t *>view.buf,
                                                        <const uint64_t *>places.buf, count)
            finally:
                PyBuffer_Release(&view)
        finally:
            PyBuffer_Release(&places)
        if status != CSVF_OK:
            raise _transform_error(status, length, "SM4-XTS lines")
        return output.result

    def encrypt_lines(self, data, addresses, out=None):
        """Encrypts many scattered 64-byte lines of 4096-byte units in one call.

        Args:
            data: 64 bytes for each address.
            addresses: buffer of unsigned 64-bit integers (numpy.uint64, array('Q')), byte addresses that are multiples of
                64; the data unit is address // 4096.
            out: as in encrypt().
        """
        return self._lines(data, addresses, out, False)

    def decrypt_lines(self, data, addresses, out=None):
        """Inverse of encrypt_lines()."""
        return self._lines(data, addresses, out, True)


@cython.final
cdef class SM4CTR(_Stream):
    """SM4CTR(key, counter)\n--\n\nAn SM4-CTR key stream; each call goes on where the last one ended, also inside a block.

    Args:
        key: 16 bytes.
        counter: 16 bytes, the first counter block, a 128-bit big-endian number that wraps.
    Raises: KeyLengthError, LengthError (counter), BufferTypeError.
    Standard: GB/T 17964-2021, NIST SP 800-38A.
    Thread-safety: one lock per object; calls from several threads take consecutive pieces of the key stream.
    """

    cdef csvf_sm4_ctr ctr

    def __cinit__(self, key, counter):
        cdef Py_buffer view, first
        cdef int status = CSVF_OK
        _acquire(key, &view, False, "key")
        try:
            if view.len != CSVF_SM4_KEY_BYTES:
                raise _key_length_error(view.len, CSVF_SM4_KEY_BYTES, "SM4-CTR")
            _acquire(counter, &first, False, "counter")
            try:
                if first.len != CSVF_BLOCK_BYTES:
                    raise errors.LengthError(f"counter has {first.len} bytes; expected 16")
                status = csvf_sm4_ctr_init(&self.ctr, <const uint8_t *>view.buf, <const uint8_t *>first.buf)
            finally:
                PyBuffer_Release(&first)
        finally:
            PyBuffer_Release(&view)
        if status != CSVF_OK:
            raise _status_error(status, "SM4-CTR key")

    def __dealloc__(self):
        csvf_wipe(&self.ctr, sizeof(self.ctr))

    def __repr__(self):
        return "<SM4CTR>"

    cdef object _crypt(self, object data, object out):
        cdef Py_buffer view
        cdef _Output output
        cdef Py_ssize_t length
        cdef int status
        _acquire(data, &view, False, "data")
        try:
            length = view.len
            output = _Output.make(out, length)
            if length < GIL_BYTES:
                self.enter()
                status = csvf_sm4_ctr_crypt(&self.ctr, output.data, <const uint8_t *>view.buf, length)
            else:
                self.need_lock()
                self.enter()
                with nogil:
                    status = csvf_sm4_ctr_crypt(&self.ctr, output.data, <const uint8_t *>view.buf, length)
            self.leave()
        finally:
            PyBuffer_Release(&view)
        if status != CSVF_OK:
            raise _transform_error(status, length, "SM4-CTR")
        return output.result

    def encrypt(self, data, out=None):
        """The next len(data) bytes of key stream, XORed into data.

        Args:
            data: C-contiguous buffer.
            out: writable buffer of the same length, may be data itself (in place); None returns new bytes.
        Returns: bytes, or out.
        Raises: LengthError, OverlapError, BufferTypeError, ReadOnlyBufferError, NonContiguousBufferError.
        """
        return self._crypt(data, out)

    def decrypt(self, data, out=None):
        """The same operation as encrypt()."""
        return self._crypt(data, out)


cdef int _check_tag_length(Py_ssize_t length) except -1:
    if not (length == 4 or length == 8 or 12 <= length <= 16):
        raise errors.LengthError(f"the tag has {length} bytes; expected 4, 8 or 12 .. 16")
    return 0


@cython.final
cdef class SM4GCM:
    """SM4GCM(key)\n--\n\nSM4-GCM under one key; every call is a whole message with its own nonce.

    Args:
        key: 16 bytes.
    Raises: KeyLengthError, BufferTypeError.
    Standard: GB/T 36624, NIST SP 800-38D, RFC 8998.
    Thread-safety: read-only after construction; any number of threads may use one object at once.
    """

    cdef csvf_sm4_gcm gcm

    def __cinit__(self, key):
        cdef Py_buffer view
        cdef int status = CSVF_OK
        _acquire(key, &view, False, "key")
        length = view.len
        if length == CSVF_SM4_KEY_BYTES:
            status = csvf_sm4_gcm_init(&self.gcm, <const uint8_t *>view.buf)
        PyBuffer_Release(&view)
        if length != CSVF_SM4_KEY_BYTES:
            raise _key_length_error(length, CSVF_SM4_KEY_BYTES, "SM4-GCM")
        if status != CSVF_OK:
            raise _status_error(status, "SM4-GCM key")

    def __dealloc__(self):
        csvf_wipe(&self.gcm, sizeof(self.gcm))

    def __reduce__(self):
        raise _no_pickle(self)

    def __repr__(self):
        return "<SM4GCM>"

    cdef object _crypt(self, object nonce, object data, object aad, object out, uint8_t *tag, Py_ssize_t tag_length,
                       bint decrypting):
        cdef Py_buffer view, number, extra
        cdef _Output output
        cdef Py_ssize_t length
        cdef int status
        _acquire(nonce, &number, False, "nonce")
        try:
            if number.len == 0:
                raise errors.LengthError("nonce has 0 bytes; expected at least 1 (12 recommended)")
            _acquire(aad, &extra, False, "aad")
            try:
                _acquire(data, &view, False, "data")
                try:
                    length = view.len
                    output = _Output.make(out, length)
                    with nogil:
                        if decrypting:
                            status = csvf_sm4_gcm_decrypt(
                                &self.gcm, output.data, tag, tag_length, <const uint8_t *>number.buf, number.len,
                                <const uint8_t *>extra.buf, extra.len, <const uint8_t *>view.buf, length)
                        else:
                            status = csvf_sm4_gcm_encrypt(
                                &self.gcm, output.data, tag, tag_length, <const uint8_t *>number.buf, number.len,
                                <const uint8_t *>extra.buf, extra.len, <const uint8_t *>view.buf, length)
                finally:
                    PyBuffer_Release(&view)
            finally:
                PyBuffer_Release(&extra)
        finally:
            PyBuffer_Release(&number)
        if status == CSVF_ERR_AUTHENTICATION:
            raise errors.AuthenticationError("the SM4-GCM tag does not match key, nonce, associated data and ciphertext")
        if status != CSVF_OK:
            raise _transform_error(status, length, "SM4-GCM")
        return output.result

    def encrypt(self, nonce, data, aad=b"", out=None, *, tag_length=16):
        """Encrypts and authenticates one message.

        Args:
            nonce: 1 byte or more, 12 recommended; never twice under one key.
            data: C-contiguous buffer.
            aad: bytes that are authenticated but not encrypted.
            out: writable buffer of the data's length, may be data itself (in place); None returns new bytes.
            tag_length: 4, 8 or 12 .. 16.
        Returns: (ciphertext, tag); ciphertext is out when out was given.
        Raises: LengthError, LimitError, OverlapError, BufferTypeError, ReadOnlyBufferError, NonContiguousBufferError.
        """
        cdef uint8_t tag[16]
        cdef Py_ssize_t size = _length(tag_length, "tag_length")
        _check_tag_length(size)
        result = self._crypt(nonce, data, aad, out, tag, size, False)
        return result, PyBytes_FromStringAndSize(<char *>tag, size)

    def decrypt(self, nonce, data, tag, aad=b"", out=None):
        """Verifies one message and only then releases its plaintext.

        Returns: bytes, or out.
        Raises: AuthenticationError (out has then been wiped), and what encrypt() raises.
        """
        cdef uint8_t copy[16]
        cdef Py_buffer view
        cdef Py_ssize_t size
        _acquire(tag, &view, False, "tag")
        size = view.len
        if size <= 16:
            memcpy(copy, view.buf, size)
        PyBuffer_Release(&view)
        _check_tag_length(size)
        return self._crypt(nonce, data, aad, out, copy, size, True)
