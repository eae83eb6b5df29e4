# Ten million acquires by real backends, shared and exclusive, in every mode and in all at once: nobody is ever inside beside
# somebody that excludes it, and nobody is left asleep.
use strict;
use warnings;
use TestServer;
use Time::HiRes qw(time usleep);
use Test::More;

mirror('load') unless why_no_bpf();
my $node = new_server('stress');
my ($done, $met) = (0, 0);

# Clients that share `millions` of acquires.
sub stress
{
	my ($name, $millions, $clients, $shared_pct, $setting, $meanwhile) = @_;
	$node->safe_psql('postgres', 'SELECT pg_stat_adaptive_lwlock_reset()');
	my $each = $millions * 1_000_000 / $clients / 10;
	my $load = start_load($node, clients => $clients, transactions => 10, sql => "$setting\nSELECT lock_generator_stress($each, $shared_pct)");
	while ($meanwhile && $load->{run}->pumpable && time < $load->{started} + 60)
	{
		$meanwhile->();
		$load->{run}->pump_nb;
		usleep(20_000);
	}
	finish_load($load, $name, 60);
	$done += $millions * 1_000_000;
	is($node->safe_psql('postgres', 'SELECT exclusive = value, exclusive + shared FROM lock_generator_stress_totals()'),
		"t|$done", "$name: every acquire counted, no update lost");
	my $n = counters($node, 'lock_generator');
	note("$name: " . join ', ', map { "$_ $n->{$_}" } sort keys %$n);
	cmp_ok($n->{contended}, '>', 0, "$name: they did meet");
	$met += $n->{contended};
}

stress('owner, half shared', 10, 4, 50, 'SET adaptive_lwlock.mode = owner;');
stress('owner, mostly shared', 16, 16, 90, 'SET adaptive_lwlock.mode = owner;');
stress('owner, exclusive only', 10, 8, 0, 'SET adaptive_lwlock.mode = owner;');
stress('blind, half shared', 10, 8, 50, 'SET adaptive_lwlock.mode = blind;');
stress('park, half shared', 10, 8, 50, 'SET adaptive_lwlock.mode = park;');
stress('every session its own mode', 20, 10, 30,
	"SELECT set_config('adaptive_lwlock.mode', (ARRAY['owner', 'blind', 'park'])[1 + :client_id % 3], false);");
my @modes = ('owner', 'blind', 'park');
stress('modes switched meanwhile', 40, 8, 50, '', sub {
	push @modes, shift @modes;
	$node->safe_psql('postgres', "ALTER SYSTEM SET adaptive_lwlock.mode = $modes[0]");
	$node->reload;
});
cmp_ok($done, '>=', 10_000_000, 'ten million acquires');
# On two busy CPUs they meet seldom: when one is preempted inside the lock.
cmp_ok($met, '>=', 1000, 'many of them contended');
$node->stop;
done_testing();
