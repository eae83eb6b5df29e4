# The unit test of replacing functions, which needs libraries of functions to be replaced. Included by the top Makefile;
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
	$(PATCH_TEST_CXX) $(PATCH_TEST_LIST_FLAGS) $(filter %.cpp,$^) -o $@

$(B)/unit/patch_test: regress/unit/patch/patch_test.cpp $(PATCH_TEST_OBJECTS) $(B)/lib/libpatch_targets.so \
		$(PATCH_TEST_LISTS:%=$(B)/lib/libpatch_%.so)
	@mkdir -p $(@D)
	$(PATCH_TEST_CXX) $(PATCH_TEST_CXXFLAGS) -rdynamic $(filter %.cpp %.o,$^) -L$(B)/lib -lpatch_targets \
		-Wl,-rpath,'$$ORIGIN/../lib' -lgtest -lgtest_main -lpthread -ldl -o $@

-include $(PATCH_TEST_OBJECTS:.o=.d) $(B)/unit/patch_test.d
