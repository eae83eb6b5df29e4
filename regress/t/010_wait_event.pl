# A backend that sleeps for an LWLock shows the lock's tranche as its wait event, in every mode.
use strict;
use warnings;
use TestServer;
use Test::More;

mirror('load') unless why_no_bpf();
my $node = new_server('waitevent');
for my $mode ('owner', 'blind', 'park')
{
	my $holder = start_session($node, 'SELECT lock_generator_run(1000000, 0, 3, 0, 1, 1000000)');
	my $waiter = start_session($node, "SET adaptive_lwlock.mode = $mode; SELECT lock_generator_run(1000000, 0, 1)");
	wait_until($node, "SELECT wait_event_type, wait_event FROM pg_stat_activity WHERE pid = $waiter->{pid}",
		'LWLock|lock_generator', "$mode: the waiter shows it");
	is($node->safe_psql('postgres', "SELECT coalesce(wait_event, '') <> 'lock_generator' FROM pg_stat_activity WHERE pid = $holder->{pid}"),
		't', "$mode: the holder does not");
	$_->{run}->finish for $holder, $waiter;
	is($waiter->{out}, "$waiter->{pid}\n1\n", "$mode: the waiter gets the lock");
}
is($node->safe_psql('postgres', "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'lock_generator'"), 0, 'nobody shows it afterwards');
$node->stop;
done_testing();
