# Modes and budgets change under load, by SIGHUP and by SET, and nothing stalls.
use strict;
use warnings;
use TestServer;
use Time::HiRes qw(time usleep);
use Test::More;

mirror('load') unless why_no_bpf();
my $node = new_server('switch');
$node->safe_psql('postgres', 'CREATE TABLE t (id bigserial PRIMARY KEY, v int); CREATE SEQUENCE s');

my %loads = (
	'short critical sections' => 'SELECT lock_generator_run(50, 50)',
	'long critical sections, some asleep' => 'SELECT lock_generator_run(2000, 500, 2, 30, 100, 200)',
	'inserts' => "INSERT INTO t (v) SELECT i FROM generate_series(1, 10) i; SELECT nextval('s')",
);
for my $name (sort keys %loads)
{
	my $load = start_load($node, clients => 8, seconds => 6, sql => $loads{$name});
	my ($switches, %seen) = (0);
	while (time < $load->{started} + 5.5)
	{
		my $mode = ('owner', 'park', 'blind')[ $switches % 3 ];
		my $spin = (200, 0, 5, 10000)[ $switches % 4 ];
		$node->safe_psql('postgres', "ALTER SYSTEM SET adaptive_lwlock.mode = $mode");
		$node->safe_psql('postgres', "ALTER SYSTEM SET adaptive_lwlock.max_spin = $spin");
		$node->reload;
		$seen{ status($node, 'mode') } = 1;
		$switches++;
		usleep(20_000);
	}
	finish_load($load, "$name: works through $switches switches");
	is(join(' ', sort keys %seen), 'blind owner park', "$name: new sessions saw every mode");
}

# A running session sees the reload as well.
$node->safe_psql('postgres', 'ALTER SYSTEM SET adaptive_lwlock.mode = blind');
$node->reload;
my $session = $node->background_psql('postgres');
is($session->query('SELECT mode FROM adaptive_lwlock_status()'), 'blind', 'a session starts in one mode');
$node->safe_psql('postgres', 'ALTER SYSTEM SET adaptive_lwlock.mode = park');
$node->reload;
my $mode;
for (1 .. 100)
{
	$mode = $session->query('SELECT mode FROM adaptive_lwlock_status()');
	last if $mode eq 'park';
	usleep(50_000);
}
is($mode, 'park', 'and goes on in another');
$session->quit;

# Every client switches for itself, in the middle of a transaction.
run_load($node, 'clients switch for themselves', clients => 8, seconds => 4, sql => <<'SQL');
\set pick random(0, 2)
BEGIN;
SELECT set_config('adaptive_lwlock.mode', (ARRAY['owner', 'blind', 'park'])[1 + :pick], true);
INSERT INTO t (v) VALUES (1);
SELECT lock_generator_run(100, 100, 0.5, 20);
COMMIT
SQL
$node->stop;
done_testing();
