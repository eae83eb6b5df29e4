# SIGKILL of a backend that holds a lock, with others waiting for it: the server restarts its processes as it always does,
# and waits in the module's way again.
use strict;
use warnings;
use TestServer;
use CrashTest;
use PostgreSQL::Test::Utils;
use Test::More;

mirror('load') unless why_no_bpf();
my $node = new_server('sigkill', conf => "restart_after_crash = on\nmax_prepared_transactions = 2");
$node->safe_psql('postgres', 'CREATE TABLE t (id bigserial PRIMARY KEY, v int)');
my $source = status($node, 'source');

for my $mode ('owner', 'blind', 'park')
{
	$node->safe_psql('postgres', "ALTER SYSTEM SET adaptive_lwlock.mode = $mode");
	$node->reload;
	my $load = start_load($node, clients => 4, seconds => 60, sql => 'INSERT INTO t (v) VALUES (1)');
	my $holder = start_session($node, 'SELECT lock_generator_run(1000000, 0, 60, 0, 1, 1000000)');
	my @waiters = map { start_session($node, 'SELECT lock_generator_run(1000, 1000, 60000)') } 1 .. 3;
	wait_until($node, "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'lock_generator'", 3, "$mode: others wait");
	my $before = $node->safe_psql('postgres', 'SELECT pg_postmaster_start_time()');

	kill 'KILL', $holder->{pid};
	$_->{run}->finish for $holder, @waiters, $load;
	like($_->{err}, qr/terminating connection because of crash of another server process|connection/,
		"$mode: a waiter's session ended") for @waiters;

	comes_back($node) or BAIL_OUT('the server does not come back');
	is($node->safe_psql('postgres', 'SELECT pg_postmaster_start_time()'), $before, "$mode: the postmaster lived on");
	is(status($node, 'active, source, mode'), "t|$source|$mode", "$mode: the module is active again");
	is($node->safe_psql('postgres', "SELECT count(*) FROM t WHERE id IS NULL"), 0, "$mode: the table can be read");
	run_load($node, "$mode: the lock is free and works", clients => 4, seconds => 2, sql => 'SELECT lock_generator_run(200, 200)');
	run_load($node, "$mode: inserts work", clients => 4, seconds => 2, sql => 'INSERT INTO t (v) VALUES (1)');
}

# What the killed processes had in the mirror has come back.
wait_until($node, <<'SQL', 't', 'no slot is lost');
SELECT slots_used <= (SELECT count(*) FROM adaptive_lwlock_backends) + 1 FROM adaptive_lwlock_status()
SQL
$node->stop;
done_testing();
