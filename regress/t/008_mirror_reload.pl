# The kernel's mirror goes away under load and comes back: backends go on without it and register again.
use strict;
use warnings;
use TestServer;
use PostgreSQL::Test::Utils;
use Test::More;

plan skip_all => 'the kernel keeps no mirror: ' . why_no_bpf() if why_no_bpf();

mirror('load');
my $node = new_server('reload');
is(status($node, 'source'), 'bpf', 'the server uses the mirror');

my $clients = 8;
my $registered = <<'SQL';
SELECT count(slot) FROM pg_stat_activity JOIN adaptive_lwlock_backends USING (pid) WHERE query LIKE 'SELECT lock_generator_run%'
SQL
my $load = start_load($node, clients => $clients, seconds => 20, sql => 'SELECT lock_generator_run(200, 200, 2, 20)');
for my $round (1 .. 3)
{
	wait_until($node, $registered, $clients, "round $round: every client is registered");
	mirror('unload');
	wait_until($node, $registered, 0, "round $round: unloaded, no client has a slot any more");
	isnt(status($node, 'source'), 'bpf', "round $round: the source is not bpf");
	isnt(status($node, "coalesce(source_reason, '')"), '', "round $round: and the reason is given");
	mirror('load', '--slots', 100 * $round);
	wait_until($node, 'SELECT source, source_reason IS NULL FROM adaptive_lwlock_status()', 'bpf|t',
		"round $round: loaded again, the source is bpf");
}
wait_until($node, $registered, $clients, 'every client is registered in the end');
finish_load($load, 'the load did not notice');

# A new server finds the new mirror; two servers share it.
my $second = new_server('second');
is(status($second, 'source'), 'bpf', 'a second server uses the same mirror');
is( $node->safe_psql('postgres', 'SELECT slots_used FROM adaptive_lwlock_status()') >=
	  $node->safe_psql('postgres', 'SELECT count(slot) FROM adaptive_lwlock_backends') +
	  $second->safe_psql('postgres', 'SELECT count(slot) FROM adaptive_lwlock_backends') - 2,
	1, 'whose slots count together');
$second->stop;
unlike(slurp_file($node->logfile), qr/PANIC|TRAP|was terminated by signal/, 'no process crashed');
$node->stop;
mirror('unload');
done_testing();
