# A backend that sleeps for an LWLock shows the lock's tranche as its wait event, in every mode.
use strict;
use warnings;
use TestServer;
use Test::More;
use Time::HiRes qw(usleep);

mirror('load') unless why_no_bpf();
my $node = new_server('waitevent');
for my $mode ('owner', 'blind', 'park')
{
	# Holds the lock for a second at a time, and is stopped there.
	my $holder = start_session($node, 'SELECT lock_generator_run(1000000, 0, 20, 0, 1, 1000000)');
	wait_until($node, "SELECT query LIKE '%lock_generator_run%' FROM pg_stat_activity WHERE pid = $holder->{pid}", 't',
		"$mode: there is a holder");
	usleep(500_000);
	kill STOP => $holder->{pid};
	my $waiter = start_session($node, "SET adaptive_lwlock.mode = $mode; SELECT lock_generator_run(1000000, 0, 1)");
	wait_until($node, "SELECT wait_event_type, wait_event FROM pg_stat_activity WHERE pid = $waiter->{pid}",
		'LWLock|lock_generator', "$mode: the waiter shows it");
	is($node->safe_psql('postgres', "SELECT coalesce(wait_event, '') <> 'lock_generator' FROM pg_stat_activity WHERE pid = $holder->{pid}"),
		't', "$mode: the holder does not");
	kill CONT => $holder->{pid};
	$node->safe_psql('postgres', "SELECT pg_cancel_backend($holder->{pid})");
	$_->{run}->finish for $holder, $waiter;
	is($waiter->{out}, "$waiter->{pid}\n1\n", "$mode: the waiter gets the lock");
}
is($node->safe_psql('postgres', "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'lock_generator'"), 0, 'nobody shows it afterwards');
$node->stop;
done_testing();
