package Throughput;

# Loads that run until they are told to end, and what one of them does in a time.
#
# What a mirror that lies or is gone may cost: mode owner still does at least half of the work that the poorer of park and
# blind does under the same conditions. One load runs all the time while mode and conditions take turns, so that a machine
# that is busy elsewhere is so for all of them; some more rounds follow when the first three leave a doubt.

use strict;
use warnings;
use Exporter 'import';
use MachineUse;
use TestServer;
use Test::More;
use Time::HiRes qw(time sleep);

our @EXPORT = qw(owner_keeps_up start_endless_load end_load);

sub start_endless_load { my ($node, %options) = @_; return start_load($node, %options, seconds => 10_000); }

# Checks that the load neither failed nor stalled while it ran.
sub end_load
{
	my ($load, $name) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;
	$load->{run}->signal('TERM');
	$load->{run}->finish;
	my $problem = $load->{out} =~ /ERROR|FATAL|aborted/ ? 'it failed' : stalled($load->{out}) ? 'it stalled' : '';
	is($problem, '', $name) or diag("$load->{out}\n" . machine_use_since($load->{since}));
	return;
}

# Some of the holders sleep, so that what is believed of the owner matters, in either direction.
my $work = 'SELECT lock_generator_run(1000, 1000, 2, 20, 200, 200)';

# conditions: what is wrong, as name => code that brings it about, in this order; each is brought about in every round, and
# the first one again before park and blind.
sub owner_keeps_up
{
	my ($node, @conditions) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;
	my (%code, @names);
	while (my ($name, $code) = splice @conditions, 0, 2) { push @names, $name; $code{$name} = $code; }

	$node->safe_psql('postgres', 'CREATE SEQUENCE IF NOT EXISTS done');
	my $load = start_endless_load($node, sql => "$work, nextval('done')", clients => 8);
	my $done = sub { ($node->safe_psql('postgres', 'SELECT last_value FROM done'), time) };
	# A query goes on in the mode in which it began.
	my $all_new = "SELECT count(*) = 0 FROM pg_stat_activity WHERE query LIKE 'SELECT lock_generator%' AND state = 'active' AND query_start <= 'NOW'";
	my (%count, %seconds, @slow);
	for my $round (1 .. 9)
	{
		for my $name (@names, 'park', 'blind')
		{
			($code{$name} // $code{ $names[0] })->();
			my $mode = $code{$name} ? 'owner' : $name;
			$node->safe_psql('postgres', "ALTER SYSTEM SET adaptive_lwlock.mode = $mode");
			$node->reload;
			sleep 0.1;
			$node->poll_query_until('postgres', $all_new =~ s/NOW/$node->safe_psql('postgres', 'SELECT clock_timestamp()')/er);
			my ($before, $start) = $done->();
			sleep 0.5;
			my ($after, $end) = $done->();
			$count{$name} += $after - $before;
			$seconds{$name} += $end - $start;
		}
		my %rate = map { $_ => $count{$_} / $seconds{$_} } keys %count;
		my $enough = ($rate{park} < $rate{blind} ? $rate{park} : $rate{blind}) / 2;
		@slow = grep { $rate{$_} < $enough } @names;
		last if $round >= 3 && !@slow;
	}
	end_load($load, 'a load in every mode: ' . join(', ', @names));
	$node->safe_psql('postgres', 'ALTER SYSTEM RESET adaptive_lwlock.mode');
	$node->reload;

	my $rates = join ', ', map { sprintf '%s %.0f', $_, $count{$_} / $seconds{$_} } @names, 'park', 'blind';
	note("transactions a second: $rates");
	is(join(', ', @slow), '', 'and owner keeps up with park or blind') or diag("transactions a second: $rates");
	return;
}

1;
