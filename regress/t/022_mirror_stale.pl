# A mirror whose program was taken away by hand, not by `schedmirror unload`: it says that it is active, and nothing in it will
# ever change. The server finds out and goes on without.
use strict;
use warnings;
use TestServer;
use RawBpf;
use Throughput;
use PostgreSQL::Test::Utils;
use Test::More;

plan skip_all => 'the kernel keeps no mirror: ' . why_no_bpf() if why_no_bpf();

sub remove_by_hand { my (@names) = @_; as_root_do(sub { for (@names) { unlink "$MIRROR_DIR/$_" or die "unlink $_: $!"; } }); return; }

mirror('load', '--slots', 100);
my $node = new_server('stale');
my $contended = 'SELECT lock_generator_run(1000, 1000, 2, 20, 100, 200)';
my $stale = "SELECT source, source_reason ~ 'the mirror is stale|no mirror at' FROM adaptive_lwlock_status()";
my $good = 'SELECT source, source_reason IS NULL FROM adaptive_lwlock_status()';

# The links alone, then everything.
for my $names ([ 'sched_switch', 'process_exit' ], [ 'slots', 'claims', 'notes', 'register', 'deactivate', 'sched_switch', 'process_exit' ])
{
	my $what = @$names . ' pins';
	is($node->safe_psql('postgres', $good), 'bpf|t', "$what: the mirror is in use");
	my $load = start_endless_load($node, sql => $contended, clients => 8);
	wait_until($node, "SELECT count(slot) FROM pg_stat_activity JOIN adaptive_lwlock_backends USING (pid) WHERE query LIKE 'SELECT lock_generator%'", 8,
		"$what: every client is registered");
	remove_by_hand(@$names);
	wait_until($node, $stale, 'off|t', "$what removed: it is found out");
	wait_until($node, "SELECT count(slot) FROM pg_stat_activity JOIN adaptive_lwlock_backends USING (pid) WHERE query LIKE 'SELECT lock_generator%'", 0,
		"$what removed: every client has left it");
	end_load($load, "$what removed: the load goes on");
	is($node->safe_psql('postgres', $stale), 'off|t', "$what removed: new sessions are not taken in again");

	if (@$names == 2)
	{
		owner_keeps_up($node, "$what removed" => sub { });

		# A server that starts with it.
		my $second = new_server('second', conf => "adaptive_lwlock.sched_state = 'bpf'");
		is($second->safe_psql('postgres', 'SELECT source FROM adaptive_lwlock_status()'), 'bpf', 'a server that starts with it takes it');
		$load = start_endless_load($second, sql => $contended, clients => 8);
		wait_until($second, $stale, 'off|t', 'and finds out as soon as it has to wait');
		end_load($load, 'a load on the second server');
		$second->stop;
	}
	mirror('load', '--slots', 100);
	wait_until($node, $good, 'bpf|t', "$what: loaded again, it is in use");
}
my @said = slurp_file($node->logfile) =~ /runs without a slot in the mirror.*\n.*DETAIL:  the mirror is stale/g;
ok(@said >= 1 && @said <= 10, 'the log says so, not too often') or diag(scalar @said);

# A slot taken from a process, as any member of the group can, by registering for it with a newer generation: the process takes
# another, and nothing else happens.
my $session = $node->background_psql('postgres');
my $pid = $session->query('SELECT pg_backend_pid()');
my $load = start_endless_load($node, sql => $contended, clients => 4);
my $of = "SELECT slot, switches FROM adaptive_lwlock_backends WHERE pid = $pid";
for my $round (1 .. 3)
{
	$session->query('SELECT lock_generator_run(1000, 1000, 2)');
	my $slot = $node->safe_psql('postgres', "SELECT slot FROM adaptive_lwlock_backends WHERE pid = $pid");
	as_other_do('postgres', sub { bpf_register(bpf_open("$MIRROR_DIR/register"), $slot, 1000 * $round); select(undef, undef, undef, 0.01); '' });
	my $frozen = $node->safe_psql('postgres', $of);
	is($node->safe_psql('postgres', "SELECT pg_sleep(0.01); $of"), "\n$frozen", "round $round: a slot taken away, nothing is recorded");
	my $now = $frozen;
	for (1 .. 200)
	{
		$session->query('SELECT lock_generator_run(1000, 1000, 20)');
		$now = $node->safe_psql('postgres', $of);
		last if $now ne $frozen && $now =~ /\d/;
	}
	isnt($now, $frozen, "round $round: it is taken up again");
}
is($node->safe_psql('postgres', $good), 'bpf|t', 'and the mirror is in use');
end_load($load, 'a load beside it');
$session->quit;
unlike(slurp_file($node->logfile), qr/PANIC|TRAP|was terminated by signal/, 'no process crashed');
$node->stop;
mirror('unload');
done_testing();
