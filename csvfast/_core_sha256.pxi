# Digests and MAC of a container image's layer in one pass over its bytes. Part of _core.pyx.

cdef extern from "sha256/sha256_layer.h" nogil:
    ctypedef struct csvf_sha256_layer:
        pass
    int csvf__sha256_layer_usable()
    void csvf__sha256_layer_init(csvf_sha256_layer *layer, const uint8_t *key, size_t length)
    void csvf__sha256_layer_update(csvf_sha256_layer *layer, const uint8_t *sealed, const uint8_t *clear, size_t length)
    void csvf__sha256_layer_digests(const csvf_sha256_layer *layer, uint8_t *sealed, uint8_t *mac, uint8_t *clear)


@cython.final
cdef class sha256_layer(_Stream):
    """sha256_layer(key)\n--\n\nSHA-256 and HMAC-SHA-256 of a layer's ciphertext, and SHA-256 of its plaintext, in one pass.

    Two of them cost what one costs, since they share the message schedule and wait for each other's rounds.

    Args:
        key: of the HMAC, 1 .. 64 bytes.
    Raises: KernelError (this CPU has no SHA instructions: ask usable() first), KeyLengthError, BufferTypeError.
    Standard: FIPS 180-4, RFC 2104.
    Thread-safety: as hashlib: one lock per object, calls from several threads are done one after another.
    """

    cdef csvf_sha256_layer state
    cdef bint ready
    cdef int with_clear  # -1: not known before the first update

    def __init__(self, key):
        cdef Py_buffer view
        if not csvf__sha256_layer_usable():
            raise errors.KernelError("this CPU has no SHA instructions, or CSVFAST_DISABLE names them")
        if self.ready:
            raise errors.ArgumentError("this sha256_layer already has its key")
        _acquire(key, &view, False, "key")
        try:
            if not 1 <= view.len <= 64:
                raise errors.KeyLengthError(f"key has {view.len} bytes; expected 1 .. 64")
            csvf__sha256_layer_init(&self.state, <const uint8_t *>view.buf, view.len)
        finally:
            PyBuffer_Release(&view)
        self.with_clear = -1
        self.ready = True

    def __dealloc__(self):
        csvf_wipe(&self.state, sizeof(self.state))

    @staticmethod
    def usable():
        """Whether this CPU can."""
        return csvf__sha256_layer_usable() != 0

    def update(self, sealed, clear=None):
        """The next bytes of ciphertext, and of plaintext: as many, and either in every call or in none.

        Raises: LengthError, ArgumentError (plaintext in some calls only), BufferTypeError.
        """
        cdef Py_buffer first, second
        cdef const uint8_t *other = NULL
        cdef bint given = clear is not None
        if not self.ready:
            raise errors.ArgumentError("this sha256_layer has no key")
        _acquire(sealed, &first, False, "sealed")
        try:
            if given:
                _acquire(clear, &second, False, "clear")
                other = <const uint8_t *>second.buf
            try:
                if given and first.len != second.len:
                    raise errors.LengthError(f"clear has {second.len} bytes; expected {first.len}, as sealed has")
                self.need_lock()
                self.enter()
                try:
                    if self.with_clear == (not given):
                        raise errors.ArgumentError("plaintext came in some calls only; expected it in all or in none")
                    self.with_clear = given
                    with nogil:
                        csvf__sha256_layer_update(&self.state, <const uint8_t *>first.buf, other, first.len)
                finally:
                    self.leave()
            finally:
                if given:
                    PyBuffer_Release(&second)
        finally:
            PyBuffer_Release(&first)

    def digest(self):
        """SHA-256 of the ciphertext so far."""
        return self._digests()[0]

    def mac(self):
        """HMAC-SHA-256 of the ciphertext so far."""
        return self._digests()[1]

    def clear_digest(self):
        """SHA-256 of the plaintext so far. Raises: ArgumentError (none came)."""
        if self.with_clear == 0:
            raise errors.ArgumentError("no plaintext came")
        return self._digests()[2]

    cdef tuple _digests(self):
        cdef uint8_t sealed[32]
        cdef uint8_t mac[32]
        cdef uint8_t clear[32]
        if not self.ready:
            raise errors.ArgumentError("this sha256_layer has no key")
        self.enter()
        csvf__sha256_layer_digests(&self.state, sealed, mac, clear)
        self.leave()
        return sealed[:32], mac[:32], clear[:32]
