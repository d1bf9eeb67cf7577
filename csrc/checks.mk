# Checks beyond the plain tests; included by Makefile. Each names its tool and fails when the tool is missing.
#
#   make ctime         constant time under valgrind (portable, AES-NI, SM3 kernels) and, with clang, MemorySanitizer (portable)
#   make ctrace        constant time of every vector kernel of this CPU: instruction traces of different secrets are equal (needs python3 with numpy)
#   make asan          the C tests and every fuzz target on generated inputs under AddressSanitizer and UBSan
#   make tsan          the threaded tests under ThreadSanitizer
#   make fuzz-smoke    libFuzzer (clang), FUZZ_SECONDS each (60)

PYTHON ?= python3
VALGRIND ?= valgrind
FUZZ_SECONDS ?= 60
FUZZ_CORPUS ?= $(BUILD)/corpus
SECRET_SOURCES := tests/secret_operations.c

.PHONY: ctime ctime-valgrind ctime-msan ctrace asan tsan fuzz fuzz-smoke

$(BUILD)/ctime: tests/ctime.c $(SECRET_SOURCES) $(wildcard tests/*.h) $(BUILD)/libcsvfast.a
	@mkdir -p $(@D)
	$(CC) $(ALL_FLAGS) $(LDFLAGS) -o $@ tests/ctime.c $(SECRET_SOURCES) $(BUILD)/libcsvfast.a

# Static: the trace covers memcpy and friends, and one disassembly covers the trace.
$(BUILD)/ctrace: tests/ctrace.c $(SECRET_SOURCES) $(wildcard tests/*.h) $(BUILD)/libcsvfast.a
	$(CC) $(ALL_FLAGS) $(LDFLAGS) -static -no-pie -o $@ tests/ctrace.c $(SECRET_SOURCES) $(BUILD)/libcsvfast.a

ctime: ctime-valgrind
	@if command -v $(FUZZ_CC) >/dev/null 2>&1; then $(MAKE) ctime-msan; else echo "no $(FUZZ_CC): MemorySanitizer left out"; fi

# The second run must fail: its operations leak on purpose.
ctime-valgrind:
	$(MAKE) BUILD=$(BUILD)/checkmem CPPFLAGS=-DCSVF_CHECKMEM $(BUILD)/checkmem/ctime
	$(VALGRIND) -q --error-exitcode=42 $(BUILD)/checkmem/ctime
	@$(VALGRIND) -q --error-exitcode=42 $(BUILD)/checkmem/ctime leak >/dev/null 2>&1; \
	    test $$? = 42 && echo "valgrind notices the deliberate leak"

# MSan has no rules for AES-NI and GFNI intrinsics (it reports their operands themselves), so it watches the portable kernels.
ctime-msan:
	$(MAKE) BUILD=$(BUILD)/msan CC=$(FUZZ_CC) SANITIZE=memory $(BUILD)/msan/ctime
	CSVFAST_DISABLE=avx512,ifma,gfni,vaes,aes,avx2,bmi2,adx,pclmul,sha $(BUILD)/msan/ctime
	@CSVFAST_DISABLE=avx512,ifma,gfni,vaes,aes,avx2,bmi2,adx,pclmul,sha $(BUILD)/msan/ctime leak >/dev/null 2>&1; \
	    test $$? -ne 0 && echo "MemorySanitizer notices the deliberate leak"

ctrace: $(BUILD)/ctrace
	"$(PYTHON)" tests/ctrace.py $(BUILD)/ctrace

# clang when there is one: the objects then serve the fuzzers too. Loads of a thousand unrolled vector accesses are checked by calls
# instead of inline code, without which these files take minutes to compile.
ASAN_CC := $(shell command -v $(FUZZ_CC) >/dev/null 2>&1 && echo $(FUZZ_CC) || echo $(CC))
ifneq ($(findstring clang,$(ASAN_CC)),)
ASAN_FLAGS := -O1 -fsanitize=fuzzer-no-link -mllvm -asan-instrumentation-with-call-threshold=0
else
ASAN_FLAGS := --param asan-instrumentation-with-call-threshold=0
endif
ASAN_MAKE = $(MAKE) BUILD=$(BUILD)/asan CC=$(ASAN_CC) SANITIZE=address,undefined CFLAGS='$(ASAN_FLAGS)'

asan:
	$(ASAN_MAKE) check
	$(ASAN_MAKE) $(FUZZERS:$(BUILD)/fuzz/%=$(BUILD)/asan/fuzz-standalone/%)
	for target in $(notdir $(FUZZERS)); do $(BUILD)/asan/fuzz-standalone/$$target --random 300 || exit 1; done

TSAN_TESTS := test_engine_threads test_cache_threads test_embedding test_pool test_dispatch $(if $(PRELOAD),test_vmram)
tsan:
	$(MAKE) BUILD=$(BUILD)/tsan SANITIZE=thread $(TSAN_TESTS:%=$(BUILD)/tsan/tests/%)
	for test in $(TSAN_TESTS); do TSAN_OPTIONS='history_size=7 suppressions=tests/tsan_vmram.supp' $(BUILD)/tsan/tests/$$test || exit 1; done

$(BUILD)/fuzz-standalone/%: fuzz/%.c fuzz/standalone.c $(BUILD)/libcsvfast.a
	@mkdir -p $(@D)
	$(CC) $(ALL_FLAGS) $(LDFLAGS) -o $@ $< fuzz/standalone.c $(BUILD)/libcsvfast.a

# The fuzzers link the objects of the asan build.
fuzz:
	$(MAKE) BUILD=$(BUILD)/asan CC=$(FUZZ_CC) SANITIZE=address,undefined CFLAGS='$(ASAN_FLAGS)' $(FUZZERS:$(BUILD)/%=$(BUILD)/asan/%)

$(BUILD)/fuzz/%: fuzz/%.c $(BUILD)/libcsvfast.a
	@mkdir -p $(@D)
	$(CC) $(ALL_FLAGS) -fsanitize=fuzzer $(LDFLAGS) -o $@ $< $(BUILD)/libcsvfast.a

fuzz-smoke: fuzz
	@for target in $(FUZZERS:$(BUILD)/%=$(BUILD)/asan/%); do \
	    corpus=$(FUZZ_CORPUS)/$$(basename $$target); mkdir -p $$corpus; \
	    echo "== $$target, $(FUZZ_SECONDS) s"; \
	    $$target -max_total_time=$(FUZZ_SECONDS) -max_len=2048 -timeout=30 -print_final_stats=1 -verbosity=0 $$corpus || exit 1; \
	done; echo "$(words $(FUZZERS)) passed, 0 failed"
