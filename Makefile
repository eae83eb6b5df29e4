# adaptive_lwlock
#
#   make check         from a bare clone: install packages, build, run every test
#   make bench         from a bare clone: install packages, build, compare with a stock server
#
#   make               the module (PGXS) and the schedmirror command
#   make install       both, into the server of PG_CONFIG
#   make installcheck  SQL and isolation tests against a running server that has the module preloaded
#
#   PG_CONFIG=…        the server to build for
#   SCHEDMIRROR=no     leave out the kernel side, which needs clang, libbpf and Boost.Program_options

PG_CONFIG ?= pg_config

EXTENSION = adaptive_lwlock
MODULE_big = adaptive_lwlock
DATA = $(wildcard sql/adaptive_lwlock--*.sql)
OBJS = $(patsubst %.cpp,%.o,$(sort $(wildcard extension/*.cpp extension/patch/*.cpp)))

REGRESS = $(patsubst regress/sql/%.sql,%,$(sort $(wildcard regress/sql/*.sql)))
REGRESS_OPTS = --inputdir=regress --outputdir=build/regress --load-extension=adaptive_lwlock
REGRESS_PREP = build
ISOLATION = $(patsubst regress/specs/%.spec,%,$(sort $(wildcard regress/specs/*.spec)))
ISOLATION_OPTS = --inputdir=regress --outputdir=build/isolation --load-extension=adaptive_lwlock

# The server's headers come with -isystem: their warnings are not ours.
PG_CPPFLAGS = -I. -Isrc -isystem $(shell $(PG_CONFIG) --includedir-server)
PG_CXXFLAGS = -std=c++20 -Wextra -fno-exceptions -fno-rtti -fno-threadsafe-statics -MMD -MP
SHLIB_LINK = build/libadaptive.a
EXTRA_CLEAN = build $(OBJS:.o=.d)

# Bitcode lets the JIT inline SQL functions: there is nothing to gain here.
override with_llvm = no

all:

# `make check` and `make bench` start where no server may be installed yet; their scripts come back to this Makefile.
ifneq (,$(filter-out check bench,$(or $(MAKECMDGOALS),all)))
PGXS := $(shell $(PG_CONFIG) --pgxs)
ifeq (,$(PGXS))
$(error $(PG_CONFIG) does not run: set PG_CONFIG, or have scripts/setup install what is missing)
endif
include $(PGXS)
include src/build.mk extension/patch/build.mk
-include $(OBJS:.o=.d)

$(OBJS): Makefile
$(shlib): build/libadaptive.a

ifneq ($(SCHEDMIRROR),no)
all: build/schedmirror
install: install-schedmirror
uninstall: uninstall-schedmirror
endif

.PHONY: install-schedmirror uninstall-schedmirror
install-schedmirror: build/schedmirror
	$(MKDIR_P) '$(DESTDIR)$(bindir)'
	$(INSTALL_PROGRAM) build/schedmirror '$(DESTDIR)$(bindir)'
uninstall-schedmirror:
	rm -f '$(DESTDIR)$(bindir)/schedmirror'

clean: clean-generator
.PHONY: clean-generator
clean-generator:
	$(MAKE) -s -C bench/generator clean

build:
	$(MKDIR_P) $@
endif

ifneq (,$(filter check bench,$(MAKECMDGOALS)))
export PG_CONFIG
.PHONY: check bench
check bench:
	@scripts/$@
endif
