# adaptive_lwlock
#
# From a bare clone; each installs the packages that it needs, and builds:
#   make check             every test of this tree
#   make bench             compare with a stock server
#   make check-core        PostgreSQL's own test suites, without the module and with it (an hour)
#   make check-versions    build and test for every version of PostgreSQL, in chroots (ten minutes; more the first time)
#   make check-aarch64     cross compile, and test the library and the patching under emulation
#   make model             every interleaving of the waiting protocol, and what becomes of it with a rule broken
#   make torture           ten minutes of torture (TORTURE_MINUTES=…)
#   make bundle            one file for measuring on a machine on which nothing can be installed
#
# For a server that is installed:
#   make               the module (PGXS) and the schedmirror command
#   make install       both: the module into the server of PG_CONFIG, the command into sbindir
#   make installcheck  SQL and isolation tests against a running server that has the module preloaded
#
#   PG_CONFIG=…        the server to build for
#   sbindir=…          where schedmirror is installed: a directory on root's PATH
#   SCHEDMIRROR=no     leave out the kernel side, which needs clang, libbpf and Boost.Program_options

PG_CONFIG ?= pg_config
sbindir = /usr/local/sbin

EXTENSION = adaptive_lwlock
MODULE_big = adaptive_lwlock
DATA = $(wildcard sql/adaptive_lwlock--*.sql)
# A major version without a header of its own gets a module that says so and leaves the server alone.
KNOWN_VERSION = $(wildcard extension/server/pg$(MAJORVERSION).h)
SOURCES = $(filter-out extension/unknown_version.cpp,$(wildcard extension/*.cpp extension/lwlock/*.cpp extension/patch/*.cpp))
OBJS = $(patsubst %.cpp,%.o,$(sort $(if $(KNOWN_VERSION),$(SOURCES),extension/settings.cpp extension/unknown_version.cpp)))
LIBRARY = $(if $(KNOWN_VERSION),build/libadaptive.a)

REGRESS = $(patsubst regress/sql/%.sql,%,$(sort $(wildcard regress/sql/*.sql)))
REGRESS_OPTS = --inputdir=regress --outputdir=build/regress --load-extension=adaptive_lwlock
REGRESS_PREP = build
ISOLATION = $(patsubst regress/specs/%.spec,%,$(sort $(wildcard regress/specs/*.spec)))
ISOLATION_OPTS = --inputdir=regress --outputdir=build/isolation --load-extension=adaptive_lwlock

# The server's headers come with -isystem: their warnings are not ours.
PG_CPPFLAGS = -I. -iquote extension -Isrc -isystem $(shell $(PG_CONFIG) --includedir-server)
PG_CXXFLAGS = -std=c++20 -Wextra -fno-exceptions -fno-rtti -fno-threadsafe-statics -MMD -MP
SHLIB_LINK = $(LIBRARY)
EXTRA_CLEAN = build $(OBJS:.o=.d)

# Bitcode lets the JIT inline SQL functions: there is nothing to gain here.
override with_llvm = no

all:

# These start where no server may be installed yet; their scripts come back to this Makefile.
FROM_BARE_CLONE = check bench check-core check-versions check-aarch64 model torture bundle

ifneq (,$(filter-out $(FROM_BARE_CLONE),$(or $(MAKECMDGOALS),all)))
PGXS := $(shell $(PG_CONFIG) --pgxs)
ifeq (,$(PGXS))
$(error $(PG_CONFIG) does not run: set PG_CONFIG, or have scripts/setup install what is missing)
endif
include $(PGXS)
include build.mk
-include $(OBJS:.o=.d)

$(OBJS): Makefile
$(shlib): $(LIBRARY)

ifneq ($(SCHEDMIRROR),no)
all: build/schedmirror
install: install-schedmirror
uninstall: uninstall-schedmirror
endif

.PHONY: install-schedmirror uninstall-schedmirror
install-schedmirror: build/schedmirror
	$(MKDIR_P) '$(DESTDIR)$(sbindir)'
	$(INSTALL_PROGRAM) build/schedmirror '$(DESTDIR)$(sbindir)'
uninstall-schedmirror:
	rm -f '$(DESTDIR)$(sbindir)/schedmirror'

clean: clean-generator
.PHONY: clean-generator
clean-generator:
	$(MAKE) -s -C bench/generator clean

build:
	$(MKDIR_P) $@
endif

ifneq (,$(filter $(FROM_BARE_CLONE),$(MAKECMDGOALS)))
export PG_CONFIG
.PHONY: $(FROM_BARE_CLONE)
$(FROM_BARE_CLONE):
	@scripts/$@
endif
