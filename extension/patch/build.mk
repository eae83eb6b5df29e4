# The unit test of replacing functions, which needs a library of functions to be replaced. Included by the top Makefile;
# also usable alone:  make -f extension/patch/build.mk unit

B ?= build
PATCH_TEST_CXX ?= $(or $(ADAPTIVE_CXX),g++)
PATCH_TEST_ARCH := $(firstword $(subst -, ,$(shell $(PATCH_TEST_CXX) -dumpmachine)))
PATCH_TEST_CXXFLAGS = -std=c++20 -O2 -g -Wall -Wextra -Iextension -MMD -MP
PATCH_TEST_OBJECTS := $(patsubst %.cpp,$(B)/%.o,$(wildcard extension/patch/*.cpp))

.PHONY: unit
unit: $(B)/unit/patch_test

$(PATCH_TEST_OBJECTS): $(B)/%.o: %.cpp
	@mkdir -p $(@D)
	$(PATCH_TEST_CXX) $(PATCH_TEST_CXXFLAGS) -fno-exceptions -fno-rtti -c $< -o $@

$(B)/lib/libpatch_targets.so: regress/unit/patch/targets_$(PATCH_TEST_ARCH).S
	@mkdir -p $(@D)
	$(PATCH_TEST_CXX) -shared -nostdlib -Wl,-z,noexecstack $< -o $@

$(B)/unit/patch_test: regress/unit/patch/patch_test.cpp $(PATCH_TEST_OBJECTS) $(B)/lib/libpatch_targets.so
	@mkdir -p $(@D)
	$(PATCH_TEST_CXX) $(PATCH_TEST_CXXFLAGS) -rdynamic $(filter %.cpp %.o,$^) -L$(B)/lib -lpatch_targets \
		-Wl,-rpath,'$$ORIGIN/../lib' -lgtest -lgtest_main -lpthread -ldl -o $@

-include $(PATCH_TEST_OBJECTS:.o=.d) $(B)/unit/patch_test.d
