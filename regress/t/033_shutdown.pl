# Every way to shut down, in every mode, under load of backends that spin and sleep for LWLocks: the server comes down in time,
# and starts again with every acknowledged commit.
use strict;
use warnings;
use TestServer;
use CrashTest;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(time);

# Stock servers are down within a second or two. What hangs never is; the limit allows for a slow machine.
my $limit = 30;
mirror('load') unless why_no_bpf();
my $node = new_server('shutdown', init => { extra => ['--data-checksums'] }, conf => "fsync = off\n");
create_ledger($node);
my $source = status($node, 'source');
my ($entries, $clients) = (0, 4);

for my $mode ('owner', 'blind', 'park')
{
	for my $how ('smart', 'fast', 'immediate')
	{
		set_mode($node, $mode);
		my $log = -s $node->logfile;
		# A smart shutdown waits for its clients.
		my $seconds = $how eq 'smart' ? 2 : 60;
		my $ledger = start_ledger($node, clients => $clients, seconds => $seconds);
		my @loads = (
			start_load($node, clients => 4, seconds => $seconds, sql => 'SELECT lock_generator_run(200, 200, 20, 20)'),
			start_load($node, clients => 3, seconds => $seconds, sql => 'SELECT lock_generator_run(1000000, 0, 2, 0, 1, 20000)'));
		$node->poll_query_until('postgres', "SELECT count(*) > 0 FROM pg_stat_activity WHERE wait_event = 'lock_generator'")
		  or die 'nobody waits';

		my $start = time;
		$node->stop($how);
		my $took = time - $start;
		my @problems;
		push @problems, sprintf 'it took %.1f s', $took if $took > $limit + ($how eq 'smart' ? $seconds : 0);
		my $acknowledged = end_load($ledger) // push @problems, 'the load hangs';
		for my $load (@loads) { defined end_load($load) or push @problems, 'a load hangs'; }
		push @problems, "a client was not left alone:\n$_->{out}"
		  for grep { $how eq 'smart' && $_->{out} =~ /aborted/ } $ledger, @loads;

		$node->start;
		my $recovered = slurp_file($node->logfile, $log) =~ /was not properly shut down/ ? 1 : 0;
		push @problems, 'recovery: ' . ($recovered ? 'needed' : 'not needed') if $recovered != ($how eq 'immediate');
		my $is = status($node, 'active, source, mode');
		push @problems, "status $is" if $is ne "t|$source|$mode";
		($entries, my @wrong) = check_ledger($node, $entries, $acknowledged, $clients);
		ok(!@problems && !@wrong, sprintf '%s: %s shutdown', $mode, $how) or diag(join "\n", @problems, @wrong, $ledger->{out});
		note(sprintf '%s, %s: %.1f s', $mode, $how, $took);
	}
}

wait_until($node, <<'SQL', 't', 'no slot is lost');
SELECT slots_used <= (SELECT count(*) FROM adaptive_lwlock_backends) + 1 FROM adaptive_lwlock_status()
SQL
is(crashes($node, 0), '', 'no process crashed');
check_relations($node);
done_testing();
