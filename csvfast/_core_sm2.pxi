# SM2 for Python: keys, signatures, encryption, key agreement. Part of _core.pyx.
# Every call of the C library here takes ten microseconds or more, so the GIL is always released around it.
# Points are x || y and signatures r || s, 64 bytes big-endian each, as in csvfast.h.


cdef enum:
    MANY_AT_ONCE = 2048  # signatures between two looks at the signals: a tenth of a second without vectors

cdef extern from "Python.h":
    int PyErr_CheckSignals() except -1


cdef int _fixed(object obj, uint8_t *target, Py_ssize_t length, str name) except -1:
    """Copies a buffer that must have exactly `length` bytes."""
    cdef Py_buffer view
    cdef Py_ssize_t found
    _acquire(obj, &view, False, name)
    found = view.len
    if found == length:
        memcpy(target, view.buf, length)
    PyBuffer_Release(&view)
    if found != length:
        raise errors.LengthError(f"{name} has {found} bytes; expected {length}")
    return 0


cdef object _sm2_error(int status, int number, str what):
    if status == CSVF_ERR_SYSTEM:
        return _system_error(number, f"{what}: the operating system's random numbers")
    if status == CSVF_ERR_AUTHENTICATION:
        return errors.AuthenticationError(f"{what}: the ciphertext has been altered or is for another key")
    if status == CSVF_ERR_KEY:
        return errors.KeyRangeError(f"{what}: outside its range")
    return _status_error(status, what)


@cython.final
cdef class SM2PublicKey:
    """SM2PublicKey(encoded)\n--\n\nAn SM2 public key: a point of the curve that is not infinity, checked once.

    Equal keys are equal and hash alike; keys can be pickled.

    Args:
        encoded: x || y (64 bytes), 04 || x || y or hybrid 06/07 || x || y (65), compressed 02/03 || x (33); big-endian.
    Raises: LengthError, PointError (a coordinate not below p, not on the curve, a parity that does not fit, infinity),
        BufferTypeError, NonContiguousBufferError.
    Standard: GB/T 32918.1-2016 4.2.8 (encodings), GB/T 32918.2 (signatures), GB/T 32918.4 (encryption).
    Thread-safety: read-only after construction but for prepare(), which any thread may call at any time.
    """

    cdef csvf_sm2_public key
    cdef csvf_sm2_table *table   # set at most once, under the GIL; lives as long as the object
    cdef bytes z_user_id         # whose Z stands in z_value; both change under the GIL
    cdef uint8_t z_value[32]
    cdef bytes encoded
    cdef object __weakref__

    def __cinit__(self, encoded):
        cdef Py_buffer view
        cdef Py_ssize_t length
        cdef uint8_t point[64]
        cdef int status
        _acquire(encoded, &view, False, "encoded")
        length = view.len
        status = csvf_sm2_public_init(&self.key, <const uint8_t *>view.buf, length)
        PyBuffer_Release(&view)
        if status == CSVF_ERR_LENGTH:
            raise errors.LengthError(
                f"an SM2 public key has {length} bytes; expected 64 (x || y), 65 (04, 06 or 07 || x || y) or 33 (02 or 03 || x)")
        if status == CSVF_ERR_POINT:
            raise errors.PointError(f"these {length} bytes are no point of the SM2 curve")
        if status != CSVF_OK:
            raise _status_error(status, "SM2 public key")
        csvf_sm2_public_bytes(point, &self.key)
        self.encoded = PyBytes_FromStringAndSize(<char *>point, 64)

    def __dealloc__(self):
        csvf_sm2_table_destroy(self.table)

    @property
    def point(self):
        """x || y, 64 bytes, big-endian."""
        return self.encoded

    @property
    def prepared(self):
        """Whether prepare() has been called."""
        return self.table != NULL

    def prepare(self):
        """Computes a table of multiples, once: verifications with this key are several times faster from then on.

        Worth it for keys that verify often (roots, intermediate certificates). Calling it again does nothing.
        Raises: AllocationError.
        """
        cdef csvf_sm2_table *table = NULL
        cdef int status
        if self.table != NULL:
            return
        with nogil:
            status = csvf_sm2_table_create(&table, &self.key)
        if status != CSVF_OK:
            raise _status_error(status, "SM2 table")
        # Another thread may have been faster; its table may be in use already, so it is ours that goes.
        if self.table == NULL:
            self.table = table
        else:
            csvf_sm2_table_destroy(table)

    cdef int write_z(self, object user_id, uint8_t *z) except -1:
        cdef Py_buffer view
        cdef Py_ssize_t length
        cdef int status
        if self.z_user_id is not None and type(user_id) is bytes and <bytes>user_id == self.z_user_id:
            memcpy(z, self.z_value, 32)
            return 0
        _acquire(user_id, &view, False, "user_id")
        length = view.len
        status = csvf_sm2_z(z, &self.key, <const uint8_t *>view.buf, length)
        PyBuffer_Release(&view)
        if status == CSVF_ERR_LENGTH:
            raise errors.LengthError(f"user_id has {length} bytes; expected at most {CSVF_SM2_ID_MAX}")
        if status != CSVF_OK:
            raise _status_error(status, "SM2 Z")
        if type(user_id) is bytes:
            self.z_user_id = <bytes>user_id
            memcpy(self.z_value, z, 32)
        return 0

    def z(self, user_id=b"1234567812345678"):
        """Z, the digest of the user identity, the curve and this key that goes before every message (32 bytes).

        Args:
            user_id: the identity of the key's owner, at most 8191 bytes.
        Raises: LengthError, BufferTypeError.
        Standard: GB/T 32918.2-2016 5.5.
        """
        cdef uint8_t z[32]
        self.write_z(user_id, z)
        return PyBytes_FromStringAndSize(<char *>z, 32)

    def digest(self, message, *, user_id=b"1234567812345678"):
        """e = SM3(Z || message), the 32 bytes that are signed. Raises: as z()."""
        cdef uint8_t digest[32]
        cdef Py_buffer view
        self.write_z(user_id, digest)
        _acquire(message, &view, False, "message")
        if view.len < GIL_BYTES:
            _sm2_digest(digest, view.buf, view.len)
        else:
            with nogil:
                _sm2_digest(digest, view.buf, view.len)
        PyBuffer_Release(&view)
        return PyBytes_FromStringAndSize(<char *>digest, 32)

    def verify(self, signature, message, *, user_id=b"1234567812345678"):
        """Returns None if `signature` is this key's over `message`, else raises.

        Args:
            signature: r || s, 64 bytes.
            message: any buffer.
            user_id: the signer's identity, at most 8191 bytes.
        Raises: SignatureError, LengthError (signature, user_id), BufferTypeError, NonContiguousBufferError.
        Standard: GB/T 32918.2-2016 7.
        """
        cdef uint8_t rs[64]
        cdef uint8_t digest[32]
        cdef Py_buffer view
        cdef int status
        _fixed(signature, rs, 64, "signature")
        self.write_z(user_id, digest)
        _acquire(message, &view, False, "message")
        with nogil:
            _sm2_digest(digest, view.buf, view.len)
            status = csvf_sm2_verify_digest_var(&self.key, self.table, rs, digest)
        PyBuffer_Release(&view)
        if status != CSVF_OK:
            raise _signature_error(status)

    def verify_digest(self, signature, digest):
        """As verify(), over e itself (32 bytes, see digest()) instead of a message."""
        cdef uint8_t rs[64]
        cdef uint8_t e[32]
        cdef int status
        _fixed(signature, rs, 64, "signature")
        _fixed(digest, e, 32, "digest")
        with nogil:
            status = csvf_sm2_verify_digest_var(&self.key, self.table, rs, e)
        if status != CSVF_OK:
            raise _signature_error(status)

    def encrypt(self, plaintext, *, _nonce=None):
        """Encrypts for the holder of the private key: 04 || x || y || C3 || C2, 97 bytes more than the plaintext.

        Args:
            plaintext: 1 .. 2**32 - 1 bytes.
            _nonce: for known-answer tests only; 32 bytes.
        Raises: LengthError, SystemCallError (no randomness), KeyRangeError (_nonce), BufferTypeError.
        Standard: GB/T 32918.4-2016 6.
        """
        cdef Py_buffer view
        cdef _Output output
        cdef uint8_t nonce[32]
        cdef bint chosen = _nonce is not None
        cdef int status, number
        if chosen:
            _fixed(_nonce, nonce, 32, "_nonce")
        _acquire(plaintext, &view, False, "plaintext")
        try:
            if not 1 <= <uint64_t>view.len <= 0xFFFFFFFF:
                raise errors.LengthError(f"plaintext has {view.len} bytes; expected 1 .. 2**32 - 1")
            output = _Output.make(None, view.len + CSVF_SM2_ENCRYPTION_OVERHEAD)
            with nogil:
                if chosen:
                    status = csvf_sm2_encrypt_with_nonce(output.data, &self.key, <const uint8_t *>view.buf, view.len, nonce)
                else:
                    status = csvf_sm2_encrypt(output.data, &self.key, <const uint8_t *>view.buf, view.len)
                number = errno
        finally:
            PyBuffer_Release(&view)
            if chosen:
                csvf_wipe(nonce, 32)
        if status != CSVF_OK:
            raise _sm2_error(status, number, "SM2 encryption")
        return output.result

    def __eq__(self, other):
        if not isinstance(other, SM2PublicKey):
            return NotImplemented
        return self.encoded == (<SM2PublicKey>other).encoded

    def __hash__(self):
        return hash(self.encoded)

    def __reduce__(self):
        return SM2PublicKey, (self.encoded,)

    def __repr__(self):
        return f"<SM2PublicKey {self.encoded[:8].hex()}..>"


cdef void _sm2_digest(uint8_t *digest, const void *message, size_t length) noexcept nogil:
    """e from Z, which stands where e is written."""
    cdef csvf_sm3 state
    csvf_sm3_init(&state)
    csvf_sm3_update(&state, digest, 32)
    csvf_sm3_update(&state, message, length)
    csvf_sm3_final(&state, digest)


cdef object _signature_error(int status):
    if status == CSVF_ERR_AUTHENTICATION:
        return errors.SignatureError("the SM2 signature is not valid for this key, user identity and message")
    return _status_error(status, "SM2 verification")


@cython.final
cdef class SM2PrivateKey:
    """SM2PrivateKey(secret)\n--\n\nAn SM2 private key; wiped when the object dies. It cannot be pickled or copied.

    Args:
        secret: d, 32 bytes big-endian, 1 .. n - 2. Wiping the source is the caller's affair (a Secret does it itself).
    Raises: KeyLengthError, KeyRangeError, BufferTypeError, NonContiguousBufferError.
    Standard: GB/T 32918.1..4-2016 on the curve of GB/T 32918.5-2017.
    Thread-safety: read-only after construction; any number of threads may use one object at once.
    """

    cdef csvf_sm2_private key
    cdef SM2PublicKey public
    cdef object __weakref__

    def __init__(self, secret):
        cdef Py_buffer view
        cdef csvf_sm2_private key
        cdef Py_ssize_t length
        cdef int status = CSVF_ERR_LENGTH
        if self.public is not None:
            raise errors.ArgumentError("this SM2PrivateKey already holds its key")
        _acquire(secret, &view, False, "secret")
        length = view.len
        if length == CSVF_SM2_BYTES:
            with nogil:
                status = csvf_sm2_private_init(&key, <const uint8_t *>view.buf)
        PyBuffer_Release(&view)
        if status == CSVF_ERR_LENGTH:
            raise _key_length_error(length, CSVF_SM2_BYTES, "SM2 private")
        if status != CSVF_OK:
            csvf_wipe(&key, sizeof(key))
        if status == CSVF_ERR_KEY:
            raise errors.KeyRangeError("the SM2 private key is outside 1 .. n - 2")
        if status != CSVF_OK:
            raise _status_error(status, "SM2 private key")
        self.take(&key)

    cdef int take(self, csvf_sm2_private *key) except -1:
        """Makes the key this object's and wipes the caller's copy."""
        cdef csvf_sm2_public public
        cdef uint8_t point[64]
        if self.public is not None:  # another thread's __init__ was faster; its key may be in use already
            csvf_wipe(key, sizeof(key[0]))
            raise errors.ArgumentError("this SM2PrivateKey already holds its key")
        self.key = key[0]
        csvf_wipe(key, sizeof(key[0]))
        csvf_sm2_private_public(&public, &self.key)
        csvf_sm2_public_bytes(point, &public)
        self.public = SM2PublicKey(PyBytes_FromStringAndSize(<char *>point, 64))
        return 0

    def __dealloc__(self):
        csvf_wipe(&self.key, sizeof(self.key))

    cdef int check(self) except -1:
        # Reached by SM2PrivateKey.__new__(SM2PrivateKey) only.
        if self.public is None:
            raise errors.ClosedError("this SM2PrivateKey holds no key")
        return 0

    @staticmethod
    def generate():
        """A new key from the operating system's generator. Raises: SystemCallError."""
        cdef SM2PrivateKey self = SM2PrivateKey.__new__(SM2PrivateKey)
        cdef csvf_sm2_private key
        cdef int status, number
        with nogil:
            status = csvf_sm2_private_generate(&key)
            number = errno
        if status != CSVF_OK:
            csvf_wipe(&key, sizeof(key))
            raise _sm2_error(status, number, "making an SM2 key")
        self.take(&key)
        return self

    @property
    def public_key(self):
        """The SM2PublicKey that belongs to it; the same object each time."""
        self.check()
        return self.public

    def secret(self):
        """The 32 bytes of the private key as a Secret, for storing them."""
        cdef Secret secret
        self.check()
        secret = Secret.make(CSVF_SM2_BYTES)
        csvf_sm2_private_bytes(secret.data, &self.key)
        return secret

    def sign(self, message, *, user_id=b"1234567812345678"):
        """Signs a message. The nonce comes from the operating system, the private key and the message together.

        Args:
            message: any buffer.
            user_id: the signer's identity, at most 8191 bytes.
        Returns: r || s, 64 bytes; another signature each time.
        Raises: LengthError (user_id), SystemCallError (no randomness), BufferTypeError, NonContiguousBufferError.
        Standard: GB/T 32918.2-2016 6.
        """
        cdef uint8_t signature[64]
        cdef uint8_t digest[32]
        cdef Py_buffer view
        cdef int status, number
        self.check()
        self.public.write_z(user_id, digest)
        _acquire(message, &view, False, "message")
        with nogil:
            _sm2_digest(digest, view.buf, view.len)
            status = csvf_sm2_sign_digest(signature, &self.key, digest)
            number = errno
        PyBuffer_Release(&view)
        if status != CSVF_OK:
            raise _sm2_error(status, number, "SM2 signature")
        return PyBytes_FromStringAndSize(<char *>signature, 64)

    def sign_digest(self, digest, *, _nonce=None):
        """As sign(), over e itself (32 bytes, see SM2PublicKey.digest()).

        `_nonce` is for known-answer tests only: a nonce used twice or guessed gives the private key away.
        Raises: LengthError, SystemCallError, KeyRangeError (_nonce), BufferTypeError.
        """
        cdef uint8_t signature[64]
        cdef uint8_t e[32]
        cdef uint8_t nonce[32]
        cdef bint chosen = _nonce is not None
        cdef int status, number
        self.check()
        _fixed(digest, e, 32, "digest")
        if chosen:
            _fixed(_nonce, nonce, 32, "_nonce")
        with nogil:
            if chosen:
                status = csvf_sm2_sign_digest_with_nonce(signature, &self.key, e, nonce)
                csvf_wipe(nonce, 32)
            else:
                status = csvf_sm2_sign_digest(signature, &self.key, e)
            number = errno
        if status != CSVF_OK:
            raise _sm2_error(status, number, "_nonce" if chosen else "SM2 signature")
        return PyBytes_FromStringAndSize(<char *>signature, 64)

    cdef object _decrypt(self, object ciphertext, bint secretly):
        cdef Py_buffer view
        cdef _Output output
        cdef Secret secret
        cdef Py_ssize_t length
        cdef uint8_t *target
        cdef int status
        self.check()
        _acquire(ciphertext, &view, False, "ciphertext")
        try:
            length = view.len - <Py_ssize_t>CSVF_SM2_ENCRYPTION_OVERHEAD
            if not 1 <= length <= <Py_ssize_t>0xFFFFFFFF:
                raise errors.LengthError(
                    f"ciphertext has {view.len} bytes; expected {CSVF_SM2_ENCRYPTION_OVERHEAD} more than a plaintext of at "
                    "least 1")
            if secretly:
                secret = Secret.make(length)
                target, result = secret.data, secret
            else:
                output = _Output.make(None, length)
                target, result = output.data, output.result
            with nogil:
                status = csvf_sm2_decrypt(target, &self.key, <const uint8_t *>view.buf, view.len)
        finally:
            PyBuffer_Release(&view)
        if status == CSVF_ERR_POINT:
            raise errors.PointError("the ciphertext does not begin with 04 and a point of the SM2 curve")
        if status != CSVF_OK:
            raise _sm2_error(status, 0, "SM2 decryption")
        return result

    def decrypt(self, ciphertext):
        """The plaintext of 04 || x || y || C3 || C2.

        Raises: AuthenticationError (C3 does not match: altered, or for another key), PointError (C1), LengthError,
            BufferTypeError, NonContiguousBufferError.
        Standard: GB/T 32918.4-2016 7.
        """
        return self._decrypt(ciphertext, False)

    def decrypt_secret(self, ciphertext):
        """As decrypt(), but the plaintext comes as a Secret."""
        return self._decrypt(ciphertext, True)

    def agree(self, SM2PrivateKey ephemeral not None, SM2PublicKey peer not None, SM2PublicKey peer_ephemeral not None,
              length, *, initiator, user_id=b"1234567812345678", peer_user_id=b"1234567812345678"):
        """Key agreement: both sides end with the same secret if each holds the private keys it claims.

        Args:
            ephemeral: one's own key of this one agreement.
            peer, peer_ephemeral: the other side's long-term and ephemeral public keys.
            length: bytes wanted, 1 .. 2**32 - 1.
            initiator: True for user A of the standard, False for user B.
            user_id, peer_user_id: identities, at most 8191 bytes each.
        Returns: (key, S_B, S_A): the Secret, what the responder sends to confirm it, what the initiator sends. Until the other
            side's value has been compared, nothing is known about who holds the key.
        Raises: LengthError, PointError (the shared point is infinity), BufferTypeError.
        Standard: GB/T 32918.3-2016 6.1.
        """
        cdef Py_ssize_t size = _length(length, "length")
        cdef uint8_t z[32]
        cdef uint8_t peer_z[32]
        cdef uint8_t confirmation[64]
        cdef bint first = bool(initiator)
        cdef Secret key
        cdef int status
        self.check()
        ephemeral.check()
        if not 1 <= <uint64_t>size <= 0xFFFFFFFF:
            raise errors.LengthError(f"length is {size}; expected 1 .. 2**32 - 1")
        self.public.write_z(user_id, z)
        peer.write_z(peer_user_id, peer_z)
        key = Secret.make(size)
        with nogil:
            status = csvf_sm2_agree(key.data, size, confirmation, first, &self.key, &ephemeral.key, z, &peer.key,
                                    &peer_ephemeral.key, peer_z)
        if status == CSVF_ERR_POINT:
            raise errors.PointError("the shared point of this agreement is infinity: the peer's keys are not honest")
        if status != CSVF_OK:
            raise _sm2_error(status, 0, "SM2 key agreement")
        return (key, PyBytes_FromStringAndSize(<char *>confirmation, 32),
                PyBytes_FromStringAndSize(<char *>confirmation + 32, 32))

    def __reduce__(self):
        raise _no_pickle(self)

    def __repr__(self):
        return f"<SM2PrivateKey of {self.public!r}>"


cdef int _gather(object source, uint8_t *target, Py_ssize_t count, Py_ssize_t each, str name) except -1:
    """`count` pieces of `each` bytes, from one buffer or from a sequence of buffers, one after another."""
    cdef tuple pieces
    cdef Py_ssize_t index
    cdef str which
    if PyObject_CheckBuffer(source):
        which = f"{name}s"
        return _fixed(source, target, count * each, which)
    pieces = tuple(source)
    if len(pieces) != count:
        raise errors.LengthError(f"there are {len(pieces)} {name}s for {count} keys")
    for index in range(count):
        which = f"{name} {index}"
        _fixed(pieces[index], target + index * each, each, which)
    return 0


def sm2_verify_many(keys, signatures, digests, /):
    """Verifies many signatures at once, in vector lanes where the CPU has them; a bad one spoils no other.

    Args:
        keys: a sequence of SM2PublicKey; the same key may stand in it often. Prepared keys are used as such.
        signatures: r || s for each key: a sequence of 64-byte buffers, or one buffer of 64 bytes a key.
        digests: e for each key (SM2PublicKey.digest()): a sequence of 32-byte buffers, or one buffer of 32 bytes a key.
    Returns: a list of bool in the same order: valid or not.
    Raises: LengthError, TypeError (something else than an SM2PublicKey), BufferTypeError, NonContiguousBufferError.
    Thread-safety: safe from any thread. Ctrl-C ends a long call within a fraction of a second.
    """
    cdef tuple owners = tuple(keys)  # keeps the keys alive while the GIL is released
    cdef Py_ssize_t count = len(owners), index, piece
    cdef SM2PublicKey key
    cdef int status
    cdef size_t each = sizeof(csvf_sm2_check) + CSVF_SM2_SIGNATURE_BYTES + CSVF_SM3_BYTES + 1
    cdef char *block
    cdef csvf_sm2_check *checks
    cdef uint8_t *rs
    cdef uint8_t *e
    cdef uint8_t *valid
    block = <char *>PyMem_Malloc(count * each + 1)
    if block == NULL:
        raise errors.AllocationError(f"no memory for {count} signatures")
    try:
        checks = <csvf_sm2_check *>block
        rs = <uint8_t *>(checks + count)
        e = rs + count * CSVF_SM2_SIGNATURE_BYTES
        valid = e + count * CSVF_SM3_BYTES
        _gather(signatures, rs, count, CSVF_SM2_SIGNATURE_BYTES, "signature")
        _gather(digests, e, count, CSVF_SM3_BYTES, "digest")
        for index in range(count):
            if type(owners[index]) is not SM2PublicKey:
                raise TypeError(f"key {index} must be an SM2PublicKey, not {type(owners[index]).__name__}")
            key = <SM2PublicKey>owners[index]
            checks[index].public_key = &key.key
            checks[index].table = key.table
            checks[index].signature = rs + index * CSVF_SM2_SIGNATURE_BYTES
            checks[index].digest = e + index * CSVF_SM3_BYTES
        for index in range(0, count, MANY_AT_ONCE):
            piece = min(count - index, MANY_AT_ONCE)
            with nogil:
                status = csvf_sm2_verify_many_var(valid + index, checks + index, piece)
            if status != CSVF_OK:
                raise _status_error(status, f"verifying {count} SM2 signatures")
            PyErr_CheckSignals()
        return [valid[index] == 1 for index in range(count)]
    finally:
        PyMem_Free(block)
