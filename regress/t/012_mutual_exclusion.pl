# Ten million acquires by real backends, shared and exclusive, in every mode and in all at once: nobody is ever inside beside
# somebody that excludes it, and nobody is left asleep.
use strict;
use warnings;
use TestServer;
use Time::HiRes qw(usleep);
use Test::More;

mirror('load') unless why_no_bpf();
my $node = new_server('stress');
my $done = 0;

# 4 to 16 clients share 2 million acquires.
sub stress
{
	my ($name, $clients, $shared_pct, $setting, $meanwhile) = @_;
	my $each = 2_000_000 / $clients / 50;
	my $load = start_load($node, clients => $clients, transactions => 50, sql => "$setting\nSELECT lock_generator_stress($each, $shared_pct)");
	while ($meanwhile && $load->{run}->pumpable && time < $load->{started} + 100)
	{
		$meanwhile->();
		$load->{run}->pump_nb;
		usleep(20_000);
	}
	finish_load($load, $name, 100);
	$done += 2_000_000;
	is($node->safe_psql('postgres', 'SELECT exclusive = value, exclusive + shared FROM lock_generator_stress_totals()'),
		"t|$done", "$name: every acquire counted, no update lost");
}

stress('owner, half shared', 4, 50, 'SET adaptive_lwlock.mode = owner;');
stress('owner, mostly shared', 16, 90, 'SET adaptive_lwlock.mode = owner;');
stress('blind, half shared', 8, 50, 'SET adaptive_lwlock.mode = blind;');
stress('park, half shared', 8, 50, 'SET adaptive_lwlock.mode = park;');
stress('every session its own mode', 9, 30,
	"SELECT set_config('adaptive_lwlock.mode', (ARRAY['owner', 'blind', 'park'])[1 + :client_id % 3], false);");
my @modes = ('owner', 'blind', 'park');
stress('modes switched meanwhile', 8, 50, '', sub {
	push @modes, shift @modes;
	$node->safe_psql('postgres', "ALTER SYSTEM SET adaptive_lwlock.mode = $modes[0]");
	$node->reload;
});
cmp_ok($done, '>=', 10_000_000, 'ten million acquires');
$node->stop;
done_testing();
