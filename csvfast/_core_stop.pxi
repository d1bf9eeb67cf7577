# A way to stop an emulated processor at the begin of a block, from any thread.

cdef extern from *:
    """
    #include <stdint.h>

    typedef struct {
        int wanted;
        int (*stop)(void *engine);
    } csvf__stop;

    /* uc_cb_hookcode_t of unicorn/unicorn.h, for UC_HOOK_BLOCK. */
    static void csvf__stop_at_block(void *engine, uint64_t address, uint32_t size, void *data) {
        csvf__stop *state = (csvf__stop *)data;
        (void)address;
        (void)size;
        if (__atomic_load_n(&state->wanted, __ATOMIC_RELAXED)) state->stop(engine);
    }

    static void csvf__stop_set(csvf__stop *state, int wanted) { __atomic_store_n(&state->wanted, wanted, __ATOMIC_RELEASE); }
    """
    ctypedef struct csvf__stop:
        int wanted
        int (*stop)(void *engine) noexcept nogil
    void csvf__stop_at_block(void *engine, unsigned long long address, unsigned int size, void *data) noexcept nogil
    void csvf__stop_set(csvf__stop *state, int wanted) noexcept nogil


@cython.final
cdef class BlockStop:
    """A flag that a hook of Unicorn's (UC_HOOK_BLOCK) looks at when a block of instructions begins.

    In: stop   address of uc_emu_stop
    callback is the hook's address, data what it is given; both are good as long as this object lives. set() and clear() may
    be called by any thread.
    """

    cdef csvf__stop state

    def __cinit__(self, size_t stop):
        self.state.wanted = 0
        self.state.stop = <int (*)(void *) noexcept nogil>stop

    @property
    def callback(self):
        return <size_t>&csvf__stop_at_block

    @property
    def data(self):
        return <size_t>&self.state

    def set(self):
        csvf__stop_set(&self.state, 1)

    def clear(self):
        csvf__stop_set(&self.state, 0)

    def __reduce__(self):
        raise _no_pickle(self)
