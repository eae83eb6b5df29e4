# All that needs no server, built into build/: the library, the schedmirror command, the tests of these and of the patching, and the
# measuring programs. Included by the top Makefile; also usable alone:  make -f build.mk [lib|schedmirror|preload|unit|examples|switch_cost|costs|micro]
#
# Needs: g++; for the kernel side clang, bpftool, libbpf-dev, libboost-program-options-dev; for the tests libgtest-dev and
# libboost-dev.

B := build
ADAPTIVE_CXX ?= g++
ADAPTIVE_CXXFLAGS = -std=c++20 -O2 -g -Wall -Wextra -Isrc -MMD -MP $(SANITIZE)
# PGXS sets it to nothing where the server was built without LLVM.
CLANG := $(or $(CLANG),clang)
BPFTOOL ?= $(or $(shell command -v bpftool),/usr/sbin/bpftool)

LIB_SOURCES := $(wildcard src/mirror/*.cpp src/proposals/*.cpp src/lock/*.cpp)
LIB_OBJECTS := $(LIB_SOURCES:%.cpp=$(B)/%.o)
PRELOAD_OBJECTS := $(patsubst %.cpp,$(B)/preload/%.o,$(wildcard src/preload/*.cpp) $(LIB_SOURCES))
EXAMPLES := $(patsubst examples/%.cpp,$(B)/examples/%,$(wildcard examples/*.cpp))
UNIT_TESTS := $(patsubst regress/unit/%.cpp,$(B)/unit/%,$(wildcard regress/unit/*_test.cpp))

.PHONY: adaptive lib schedmirror preload unit switch_cost examples
adaptive: lib schedmirror preload unit switch_cost examples
lib: $(B)/libadaptive.a
preload: $(B)/libadaptive_pthread.so
schedmirror: $(B)/schedmirror
unit: $(UNIT_TESTS) $(B)/unit/patch_test
switch_cost: $(B)/switch_cost
examples: $(EXAMPLES)

# No exception and no allocation in what runs inside other people's processes.
$(LIB_OBJECTS): $(B)/src/%.o: src/%.cpp
	@mkdir -p $(@D)
	$(ADAPTIVE_CXX) $(ADAPTIVE_CXXFLAGS) -fPIC -fno-exceptions -fno-rtti -c $< -o $@

$(B)/libadaptive.a: $(LIB_OBJECTS)
	rm -f $@
	$(AR) rcs $@ $^

# The whole library once more. Its thread-local data must be there from a thread's start: what is made at the first use
# is allocated, and an allocator may lock. Bound at once, for calls that come before the first constructor.
$(PRELOAD_OBJECTS): $(B)/preload/%.o: %.cpp
	@mkdir -p $(@D)
	$(ADAPTIVE_CXX) $(ADAPTIVE_CXXFLAGS) -fPIC -fno-exceptions -fno-rtti -fvisibility=hidden -ftls-model=initial-exec -c $< -o $@

$(B)/libadaptive_pthread.so: $(PRELOAD_OBJECTS)
	$(ADAPTIVE_CXX) -shared -static-libstdc++ -static-libgcc -Wl,-z,defs,-z,now,-z,nodelete,--gc-sections $^ -o $@

# clang's BPF target does not know the multiarch directory that <linux/types.h> needs for <asm/types.h>.
$(B)/schedmirror.bpf.o: src/schedmirror/schedmirror.bpf.c src/mirror/sched_slot.h
	@mkdir -p $(@D)
	$(CLANG) -target bpf -mcpu=v3 -O2 -g -Wall -Isrc -I$(shell $(ADAPTIVE_CXX) -print-sysroot)/usr/include/$(shell $(ADAPTIVE_CXX) -print-multiarch) -c $< -o $@

$(B)/schedmirror.skel.h: $(B)/schedmirror.bpf.o
	$(BPFTOOL) gen skeleton $< name schedmirror_bpf > $@.tmp
	mv $@.tmp $@

$(B)/schedmirror: src/schedmirror/main.cpp src/schedmirror/loader.cpp $(B)/schedmirror.skel.h $(B)/libadaptive.a
	$(ADAPTIVE_CXX) $(ADAPTIVE_CXXFLAGS) -I$(B) $(filter %.cpp,$^) $(B)/libadaptive.a -lbpf -lboost_program_options -o $@

$(UNIT_TESTS): $(B)/unit/%: regress/unit/%.cpp $(B)/libadaptive.a
	@mkdir -p $(@D)
	$(ADAPTIVE_CXX) $(ADAPTIVE_CXXFLAGS) $< $(B)/libadaptive.a -lgtest -lgtest_main -lpthread $(LDLIBS) -o $@

$(B)/unit/interleavings_test $(B)/unit/mutex_interleavings_test $(B)/unit/preload_interleavings_test: LDLIBS += -lboost_context

$(B)/unit/preload_test: | $(B)/libadaptive_pthread.so

# Each a program of one file.
$(EXAMPLES): $(B)/examples/%: examples/%.cpp $(B)/libadaptive.a
	@mkdir -p $(@D)
	$(ADAPTIVE_CXX) $(ADAPTIVE_CXXFLAGS) $< $(B)/libadaptive.a -lpthread -lrt -o $@

# The library's tests, and all they are made of, under sanitizers: build/asan/unit/…, build/tsan/unit/…. Left out is what they
# do not follow: fibers, code that rewrites itself, mutexes in the place of theirs, and in the latter what processes or the kernel do. They use the
# schedmirror command and the examples of the usual build.
ASAN_TESTS := $(filter-out %interleavings_test %schedmirror_test %mirror_test preload_test,$(notdir $(UNIT_TESTS)))
TSAN_TESTS := $(filter queue_protocol_test mutex_test shared_mutex_test condition_variable_test futex_spin_wait_test this_task_test,$(ASAN_TESTS))
.PHONY: sanitize
sanitize: schedmirror examples
	@mkdir -p $(B)/asan $(B)/tsan
	ln -sfn ../schedmirror $(B)/asan/schedmirror
	ln -sfn ../schedmirror $(B)/tsan/schedmirror
	ln -sfn ../examples $(B)/asan/examples
	ln -sfn ../examples $(B)/tsan/examples
	+$(MAKE) -f build.mk B=$(B)/asan SANITIZE="-O1 -g1 -fsanitize=address,undefined -fno-sanitize-recover=undefined" \
		$(ASAN_TESTS:%=$(B)/asan/unit/%)
	+$(MAKE) -f build.mk B=$(B)/tsan SANITIZE="-O1 -g1 -fsanitize=thread" $(TSAN_TESTS:%=$(B)/tsan/unit/%)

# The per-CPU operations in shared objects, at every level of optimisation.
PERCPU_OPS := $(patsubst %,$(B)/lib/libpercpu_ops_O%.so,0 1 2 3)
$(PERCPU_OPS): $(B)/lib/libpercpu_ops_O%.so: $(wildcard regress/unit/percpu/*) $(wildcard src/percpu/*.h)
	@mkdir -p $(@D)
	$(ADAPTIVE_CXX) -std=c++20 -O$* -g -Wall -Wextra -Isrc -fPIC -shared $(filter %.cpp,$^) -o $@
$(B)/unit/percpu_test: | $(PERCPU_OPS)
$(B)/unit/percpu_test: LDLIBS += -ldl

# The test of replacing functions, which needs libraries of functions to be replaced.
PATCH_TEST_ARCH := $(firstword $(subst -, ,$(shell $(ADAPTIVE_CXX) -dumpmachine)))
PATCH_TEST_CXXFLAGS = -std=c++20 -O2 -g -Wall -Wextra -Iextension -MMD -MP
PATCH_TEST_OBJECTS := $(patsubst %.cpp,$(B)/%.o,$(wildcard extension/patch/*.cpp))

$(PATCH_TEST_OBJECTS): $(B)/%.o: %.cpp
	@mkdir -p $(@D)
	$(ADAPTIVE_CXX) $(PATCH_TEST_CXXFLAGS) -fno-exceptions -fno-rtti -c $< -o $@

$(B)/lib/libpatch_targets.so: regress/unit/patch/targets_$(PATCH_TEST_ARCH).S
	@mkdir -p $(@D)
	$(ADAPTIVE_CXX) -shared -nostdlib -Wl,-z,noexecstack $< -o $@

# The same list compiled file by file, and with link-time optimization, which inlines or clones a function of it.
PATCH_TEST_LISTS := list list_inlined list_cloned
PATCH_TEST_LIST_FLAGS = -std=c++20 -O2 -Wall -Wextra -fPIC -shared -fno-semantic-interposition
PATCH_TEST_CLONE_FLAGS = -fno-inline -fipa-cp-clone --param ipa-cp-eval-threshold=0 --param ipa-cp-unit-growth=1000

$(B)/lib/libpatch_list.so: $(addprefix regress/unit/patch/,list.cpp list_clears.cpp list_adds.cpp)
$(B)/lib/libpatch_list_inlined.so: $(addprefix regress/unit/patch/,list.cpp list_clears.cpp)
$(B)/lib/libpatch_list_cloned.so: $(addprefix regress/unit/patch/,list.cpp list_adds.cpp)
$(B)/lib/libpatch_list_inlined.so: PATCH_TEST_LIST_FLAGS += -flto=auto
$(B)/lib/libpatch_list_cloned.so: PATCH_TEST_LIST_FLAGS += -flto=auto $(PATCH_TEST_CLONE_FLAGS)
$(PATCH_TEST_LISTS:%=$(B)/lib/libpatch_%.so): regress/unit/patch/list.h
	@mkdir -p $(@D)
	$(ADAPTIVE_CXX) $(PATCH_TEST_LIST_FLAGS) $(filter %.cpp,$^) -o $@

$(B)/unit/patch_test: regress/unit/patch/patch_test.cpp $(PATCH_TEST_OBJECTS) $(B)/lib/libpatch_targets.so \
		$(PATCH_TEST_LISTS:%=$(B)/lib/libpatch_%.so)
	@mkdir -p $(@D)
	$(ADAPTIVE_CXX) $(PATCH_TEST_CXXFLAGS) -rdynamic $(filter %.cpp %.o,$^) -L$(B)/lib -lpatch_targets \
		-Wl,-rpath,'$$ORIGIN/../lib' -lgtest -lgtest_main -lpthread -ldl -o $@

$(B)/switch_cost: bench/switch_cost.cpp $(B)/libadaptive.a
	@mkdir -p $(@D)
	$(ADAPTIVE_CXX) $(ADAPTIVE_CXXFLAGS) -iquote bench $< $(B)/libadaptive.a -lbpf -lboost_program_options -lpthread -o $@

$(B)/unit/deschedule_test $(B)/unit/rseq_shared_test: | $(EXAMPLES)

.PHONY: accuracy
adaptive: accuracy
accuracy: $(B)/accuracy
$(B)/accuracy: bench/accuracy.cpp $(B)/libadaptive.a
	@mkdir -p $(@D)
	$(ADAPTIVE_CXX) $(ADAPTIVE_CXXFLAGS) $< $(B)/libadaptive.a -lboost_program_options -lpthread -o $@

# Of the waiting algorithm outside PostgreSQL, and of the library's locks.
TORTURES := $(B)/lock_torture $(B)/library_torture
.PHONY: tortures
tortures: $(TORTURES)
$(TORTURES): $(B)/%: regress/torture/%.cpp $(B)/libadaptive.a
	@mkdir -p $(@D)
	$(ADAPTIVE_CXX) $(ADAPTIVE_CXXFLAGS) $< $(B)/libadaptive.a -lboost_program_options -lpthread -ldl -o $@

# What bench/questions measures.
COSTS := $(patsubst bench/costs/%.cpp,$(B)/costs/%,$(wildcard bench/costs/*.cpp))
.PHONY: costs
costs: $(COSTS)
$(COSTS): $(B)/costs/%: bench/costs/%.cpp bench/generator/line_cost.cpp $(B)/libadaptive.a
	@mkdir -p $(@D)
	$(ADAPTIVE_CXX) $(ADAPTIVE_CXXFLAGS) -iquote bench $(filter-out %.h,$^) -lpthread -o $@

# The comparison of locks, which needs the packages of `scripts/setup --micro`: not among the goals of `make`.
.PHONY: micro
micro: $(B)/micro $(B)/uncontended
$(B)/micro $(B)/uncontended: $(B)/%: bench/locks/%.cpp $(B)/bench/contenders.o $(B)/libadaptive.a
	$(ADAPTIVE_CXX) $(ADAPTIVE_CXXFLAGS) -iquote bench $(filter-out %.h,$^) -lbenchmark -lboost_program_options \
		-labsl_synchronization -lnsync_cpp -lpthread -o $@

$(B)/bench/contenders.o: bench/locks/contenders.cpp
	@mkdir -p $(@D)
	$(ADAPTIVE_CXX) $(ADAPTIVE_CXXFLAGS) -iquote bench -c $< -o $@

-include $(LIB_OBJECTS:.o=.d) $(PRELOAD_OBJECTS:.o=.d) $(UNIT_TESTS:=.d) $(EXAMPLES:=.d) $(B)/switch_cost.d $(B)/accuracy.d $(TORTURES:=.d) $(B)/micro.d $(B)/uncontended.d \
	$(B)/bench/contenders.d $(COSTS:=.d) $(wildcard $(B)/schedmirror*.d) \
	$(PATCH_TEST_OBJECTS:.o=.d) $(B)/unit/patch_test.d
