// Processes that share a mutex in Boost.Interprocess memory, one of which dies with it.
//
// Eight processes count in a managed shared memory segment. The mutex is robust: one of them is killed while it
// holds it, half way through a change; the next one is told so, puts the data right, and all goes on.
//
//   build/examples/interprocess_counter

#include "lock/robust_mutex.h"

#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <boost/interprocess/managed_shared_memory.hpp>
#include <csignal>
#include <cstdio>
#include <string>

using namespace adaptive;
namespace interprocess = boost::interprocess;

namespace {

constexpr int kProcesses = 8;
constexpr long kTurns = 20'000;

struct Account {
    RobustMutex mutex;
    long debits = 0, credits = 0;  // equal whenever nobody is in there
    long repairs = 0;
};

void enter(Account& account) {
    if (account.mutex.lock() == LockResult::owner_died) {
        account.credits = account.debits;
        account.repairs++;
        account.mutex.consistent();
    }
}

void book(Account& account) {
    enter(account);
    account.debits++;
    account.credits++;
    account.mutex.unlock();
}

void die_half_way(Account& account) {
    enter(account);
    account.debits++;
    raise(SIGKILL);
}

}  // namespace

int main() {
    const std::string name = "adaptive_example_" + std::to_string(getpid());
    struct Remove {
        const std::string& name;
        ~Remove() { interprocess::shared_memory_object::remove(name.c_str()); }
    } remove{name};
    interprocess::managed_shared_memory segment(interprocess::create_only, name.c_str(), 65536);
    segment.construct<Account>("account")();

    const pid_t parent = getpid();
    for (int i = 0; i < kProcesses; i++)
        if (fork() == 0) {
            prctl(PR_SET_PDEATHSIG, SIGKILL);
            if (getppid() != parent) _exit(1);
            // A mapping of its own, at another address.
            interprocess::managed_shared_memory mine(interprocess::open_only, name.c_str());
            Account& account = *mine.find<Account>("account").first;
            for (long turn = 0; turn < kTurns; turn++) book(account);
            if (i == 0) die_half_way(account);
            _exit(0);
        }
    while (wait(nullptr) > 0) {
    }

    Account& account = *segment.find<Account>("account").first;
    enter(account);
    const bool right = account.debits == kProcesses * kTurns + 1 && account.credits == account.debits &&
                       account.repairs == 1;
    printf("%ld debits, %ld credits, %ld repairs: %s\n", account.debits, account.credits, account.repairs,
           right ? "right" : "WRONG");
    account.mutex.unlock();
    return right ? 0 : 1;
}
