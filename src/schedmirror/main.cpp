// schedmirror: the command that loads, unloads and describes the kernel side of the mirror.
#include <boost/program_options.hpp>
#include <cstdio>
#include <iostream>

#include "mirror/mirror.h"
#include "schedmirror/loader.h"

namespace po = boost::program_options;
namespace loader = adaptive::loader;

namespace {

constexpr const char* kUsage =
    "Usage: schedmirror load [--slots N] [--group NAME] | unload | status\n"
    "\n"
    "Lets the kernel keep a table of which registered tasks are on a CPU, for processes of one group to "
    "read.\n"
    "  load    loads and pins the kernel side, as root; it stays until unloaded or until the next boot\n"
    "  unload  takes it out; tasks that use it notice and go on without\n"
    "  status  describes it; exit code 0 when loaded, 3 when not\n"
    "\n";

// One line, whatever the arguments that it quotes contain.
void complain(std::string what) {
    for (char& c : what)
        if (static_cast<unsigned char>(c) < ' ' || c == 0x7f) c = '?';
    std::cerr << "schedmirror: " << what << "\n";
}

int usage_error(const std::string& what) {
    complain(what + "; see schedmirror --help");
    return loader::kUsage;
}

// Loading sets the directory's owner and mode, and unloading removes it: it must not be one that is there for
// others, like the file system's own.
bool names_a_directory_of_its_own(const std::string& dir) {
    const std::string name = dir.substr(dir.rfind('/') + 1);
    return !name.empty() && name != "." && name != "..";
}

int run(int argc, char** argv) {
    po::options_description visible("Options");
    visible.add_options()("slots", po::value<int64_t>(),
                          "load: how many tasks can register (1 to 65534; default 4096)")(
        "group", po::value<std::string>(), "load: the group that may use the mirror (default postgres)")(
        "dir", po::value<std::string>()->default_value(adaptive::kMirrorDir), "where it is pinned")(
        "verbose", "let libbpf and the kernel's verifier explain themselves")("help", "print this");
    po::options_description all;
    all.add(visible).add_options()("command", po::value<std::vector<std::string>>());
    po::positional_options_description positional;
    positional.add("command", -1);

    po::variables_map given;
    po::store(po::command_line_parser(argc, argv).options(all).positional(positional).run(), given);
    if (given.count("help")) {
        std::cout << kUsage << visible;
        return loader::kDone;
    }
    if (!given.count("command")) return usage_error("what to do? load, unload or status");
    const auto& commands = given["command"].as<std::vector<std::string>>();
    if (commands.size() != 1) return usage_error("one command at a time");
    const std::string& command = commands.front();
    if (command != "load" && (given.count("slots") || given.count("group")))
        return usage_error("--slots and --group belong to load");

    if (given.count("verbose")) loader::set_verbose();
    const std::string dir = given["dir"].as<std::string>();
    if (!names_a_directory_of_its_own(dir)) return usage_error("--dir must end in a name");
    if (command == "unload") return loader::unload(dir);
    if (command == "status") return loader::status(dir);
    if (command != "load") return usage_error("unknown command " + command);

    loader::LoadOptions options;
    if (given.count("slots")) {
        const int64_t slots = given["slots"].as<int64_t>();
        if (slots < 1 || slots >= SCHED_MIRROR_MAX_SLOTS) return usage_error("--slots must be 1 to 65534");
        options.slots = static_cast<uint32_t>(slots);
    }
    if (given.count("group")) options.group = given["group"].as<std::string>();
    return loader::load(dir, options);
}

}  // namespace

int main(int argc, char** argv) {
    try {
        return run(argc, argv);
    } catch (const po::error& error) {
        return usage_error(error.what());
    } catch (const std::exception& error) {
        complain(error.what());
        return loader::kFailed;
    }
}
