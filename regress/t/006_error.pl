# What ends badly while it holds a lock, or waits for one, leaves the lock usable and wakes who waits.
use strict;
use warnings;
use TestServer;
use PostgreSQL::Test::Utils;
use Test::More;

mirror('load') unless why_no_bpf();
my $node = new_server('error');

# An ERROR inside the lock: error recovery lets go of it.
my ($exit, undef, $err) = $node->psql('postgres', 'SELECT lock_generator_error()');
like($err, qr/ERROR:  lock_generator: raised while holding the lock/, 'an error inside the lock');
run_load($node, 'the lock is free afterwards', clients => 4, transactions => 5, sql => 'SELECT lock_generator_run(200, 200)');

# In the same session, too, and in a subtransaction.
is( $node->safe_psql(
		'postgres', <<'SQL'), 5, 'after 500 errors in one session the lock can be taken');
DO $$ BEGIN
    FOR i IN 1..500 LOOP
        BEGIN PERFORM lock_generator_error(); EXCEPTION WHEN others THEN NULL; END;
    END LOOP;
END $$;
SELECT lock_generator_run(1000000, 0, 5);
SQL

for my $mode ('owner', 'blind', 'park')
{
	run_load($node, "$mode: errors under load", clients => 8, seconds => 3, sql => <<"SQL");
SET adaptive_lwlock.mode = $mode;
SELECT lock_generator_run(200, 200, 1, 20);
DO \$\$ BEGIN PERFORM lock_generator_error(); EXCEPTION WHEN others THEN NULL; END \$\$;
SELECT lock_generator_stress(200, 50)
SQL
}
is($node->safe_psql('postgres', 'SELECT exclusive = value FROM lock_generator_stress_totals()'), 't', 'nobody was let in beside another');

# A waiter is cancelled or terminated: it goes once it has got the lock, and the lock stays usable.
for my $how ('cancel', 'terminate')
{
	my $holder = start_session($node, 'SELECT lock_generator_run(1000000, 0, 3, 0, 1, 1000000)');
	my $waiter = start_session($node, 'SELECT lock_generator_run(1000, 1000, 60000)');
	wait_until($node, "SELECT wait_event FROM pg_stat_activity WHERE pid = $waiter->{pid}", 'lock_generator', "$how: it waits");
	$node->safe_psql('postgres', "SELECT pg_${how}_backend($waiter->{pid})");
	$waiter->{run}->finish;
	like($waiter->{err}, $how eq 'cancel' ? qr/canceling statement/ : qr/terminating connection/, "$how: it ends");
	$holder->{run}->finish;
	is($holder->{out}, "$holder->{pid}\n3\n", "$how: the holder is not disturbed");
	run_load($node, "$how: the lock works", clients => 4, transactions => 5, sql => 'SELECT lock_generator_run(200, 200)');
}

# A background worker whose SIGTERM handler exits at once leaves in the middle of its wait. Its place in shared memory is the
# next process's, which waits for the same lock.
for my $mode ('owner', 'blind', 'park')
{
	$node->append_conf('postgresql.conf', "adaptive_lwlock.mode = $mode");
	$node->reload;
	my $holder = start_session($node, 'SELECT lock_generator_run(1000000, 0, 1, 0, 1, 5000000)');
	my $worker = $node->safe_psql('postgres', 'SELECT lock_generator_start_waiter()');
	my $waits = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'lock_generator'";
	wait_until($node, "$waits AND pid = $worker", 1, "$mode: a background worker waits");
	kill 'TERM', $worker;
	wait_until($node, "SELECT count(*) FROM pg_stat_activity WHERE pid = $worker", 0, "$mode: it leaves");
	my @next = map { start_session($node, 'SELECT lock_generator_run(1000, 0, 0.001)') } 1 .. 3;
	wait_until($node, $waits, 3, "$mode: others wait in its place");
	$_->{run}->finish for $holder, @next;
	is(join('', map { $_->{out} =~ /\n(.*)/ } $holder, @next), '1111', "$mode: each gets the lock");
	run_load($node, "$mode: the lock works", clients => 4, transactions => 5, sql => 'SELECT lock_generator_run(200, 200)');
}
unlike(slurp_file($node->logfile), qr/PANIC|server process .* was terminated/, 'and nothing crashes');
$node->stop;
done_testing();
