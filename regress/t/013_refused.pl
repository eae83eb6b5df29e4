# Where the kernel denies a process to change its code, the server starts, works, and says why it waits in its own way.
use strict;
use warnings;
use TestServer;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;
use POSIX ();

# What systemd's MemoryDenyWriteExecute= does: no memory becomes executable later. It holds for all children.
my ($pr_set_mdwe, $refuse_exec_gain) = (65, 1);
my %prctl = (x86_64 => 157, aarch64 => 167);
my $number = $prctl{ (POSIX::uname())[4] } or plan skip_all => 'the number of prctl() is not known here';
if (syscall($number, $pr_set_mdwe, $refuse_exec_gain, 0, 0, 0) != 0)
{
	plan skip_all => "prctl(PR_SET_MDWE) needs Linux 6.3: $!";
}

my $node = new_server('refused');
is(status($node, 'active, functions_replaced'), 'f|0', 'the module is not active');
my $reason = status($node, 'reason');
like($reason, qr/\w+ \w+/, 'and says why');
like(slurp_file($node->logfile), qr/WARNING: .*adaptive_lwlock is not active.*\n.*DETAIL: .*\Q$reason\E/, 'in the log as well');
run_load($node, 'the server works', clients => 8, seconds => 2, sql => 'SELECT lock_generator_run(200, 200, 2, 20)');
is(counters($node, 'lock_generator')->{contended}, 0, 'and counts nothing');
$node->restart;
is(status($node, 'active'), 'f', 'the same after a restart');
unlike(slurp_file($node->logfile), qr/PANIC|TRAP|was terminated by signal/, 'no process crashed');
$node->stop;
done_testing();
