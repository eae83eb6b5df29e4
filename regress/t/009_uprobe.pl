# An operator attaches uprobes to the replaced functions' entries, and static probes, and takes them off, while the server
# works.
use strict;
use warnings;
use TestServer;
use PostgreSQL::Test::Utils;
use Test::More;

plan skip_all => why_no_root() if why_no_root();
plan skip_all => 'bpftrace is not installed' if system('bpftrace --version >/dev/null 2>&1') != 0;

mirror('load') unless why_no_bpf();
my $node = new_server('uprobe');
my $postgres = $node->config_data('--bindir') . '/postgres';
my $load = start_load($node, clients => 4, seconds => 24, sql => 'SELECT lock_generator_run(1000, 1000); SELECT count(*) FROM pg_class');

# Each call adds to the count, and a return needs the stack as the entry left it.
for my $function ('LWLockAcquire', 'LWLockRelease', 'LWLockAcquire', 'LWLockConditionalAcquire')
{
	my ($exit, $output) = as_root('timeout', '--kill-after=5', '30', 'bpftrace', '-e',
		"uprobe:$postgres:$function { \@entries = count(); } uretprobe:$postgres:$function { \@returns = count(); } interval:s:2 { exit(); }");
	my %count = $output =~ /\@(\w+): (\d+)/g;
	ok(($count{entries} // 0) > 0 && ($count{returns} // 0) > 0, "$function: entries and returns are counted") or diag("$exit\n$output");
	is($node->safe_psql('postgres', 'SELECT 1'), 1, "$function: the server works after the probe is gone");
}

# The server's static probes, which fire from the module.
my $module = $node->config_data('--pkglibdir') . '/adaptive_lwlock.so';
my ($exit, $output) = as_root('timeout', '--kill-after=5', '30', 'bpftrace', '-e',
	join(' ', map { "usdt:$module:postgresql:lwlock__$_ { \@${_}[str(arg0)] = count(); }" } 'acquire', 'release', 'wait__start', 'wait__done')
	  . ' interval:s:2 { exit(); }');
like($output, qr/\@$_\[lock_generator\]: [1-9]/, "static probe lwlock__$_ fires with the tranche's name")
  for 'acquire', 'release', 'wait__start', 'wait__done';
finish_load($load, 'the load did not notice', 60);
unlike(slurp_file($node->logfile), qr/PANIC|TRAP|was terminated by signal/, 'no process crashed');
is(status($node, 'active'), 't', 'the module is active');

# A server that starts while the probe is attached.
my $pid = fork() // die "fork: $!";
if (!$pid)
{
	as_root('timeout', '20', 'bpftrace', '-e', "uprobe:$postgres:LWLockAcquire { \@ = count(); } interval:s:12 { exit(); }");
	POSIX::_exit(0);
}
sleep 4;
$node->restart;
like(status($node, 'active, reason IS NOT NULL'), qr/^(t\|f|f\|t)$/, 'started under a probe: active, or stock with a reason');
run_load($node, 'started under a probe: works', clients => 4, seconds => 3, sql => 'SELECT lock_generator_run(1000, 1000)');
waitpid $pid, 0;
run_load($node, 'the probe is gone: works', clients => 4, seconds => 2, sql => 'SELECT lock_generator_run(1000, 1000)');
unlike(slurp_file($node->logfile), qr/PANIC|TRAP|was terminated by signal/, 'no process crashed');
$node->stop;
done_testing();
