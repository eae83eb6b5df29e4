# The counters say what each mode does.
use strict;
use warnings;
use TestServer;
use Test::More;

mirror('load') unless why_no_bpf();
my $node = new_server('counters');

# Runs a load in one mode and returns its counters.
sub counted
{
	my ($mode, $what, $sql, $clients) = @_;
	$node->safe_psql('postgres', "ALTER SYSTEM SET adaptive_lwlock.mode = $mode");
	$node->reload;
	$node->safe_psql('postgres', 'SELECT pg_stat_adaptive_lwlock_reset()');
	is(counters($node, 'lock_generator')->{contended}, 0, "$mode, $what: reset");
	run_load($node, "$mode, $what: load", clients => $clients, seconds => 3, sql => $sql);
	my $n = counters($node, 'lock_generator');
	note("$mode, $what: " . join ', ', map { "$_ $n->{$_}" } sort keys %$n);
	cmp_ok($n->{contended}, '>', 0, "$mode, $what: contended");
	cmp_ok($n->{spin_acquired}, '<=', $n->{contended} + $n->{sleeps}, "$mode, $what: a contended acquire spins once, and once more after each sleep");
	cmp_ok($n->{wakeups_sent}, '>=', $n->{sleeps}, "$mode, $what: every sleep was ended");
	return $n;
}

# The same, until somebody got the lock by spinning: on a busy machine it is seldom that two of the clients run at once.
sub counted_with_success
{
	my $n;
	for (1 .. 10)
	{
		$n = counted(@_);
		last if $n->{spin_acquired} > 0;
	}
	cmp_ok($n->{spin_acquired}, '>', 0, "$_[0] gets the lock by spinning");
	return $n;
}

my $short = 'SELECT lock_generator_run(50, 50)';
my $asleep = 'SELECT lock_generator_run(1000, 1000, 2, 0, 20, 2000)';    # the holder sleeps 2 ms in one hold of 20

my $n = counted('park', 'short', $short, 8);
is("$n->{spin_acquired} $n->{owner_off_cpu} $n->{budget_spent} $n->{wakeups_spared} $n->{spin_time}", '0 0 0 0 0', 'park never spins');
cmp_ok($n->{sleeps}, '>', 0, 'park sleeps');

$n = counted_with_success('blind', 'short', $short, 8);
cmp_ok($n->{spin_time}, '>', 0, 'blind spends time on it');
$n = counted('blind', 'holder asleep', $asleep, 4);
is($n->{owner_off_cpu}, 0, 'blind does not look at the owner');
cmp_ok($n->{budget_spent}, '>', 0, 'blind spends its budget on a holder that is asleep');
my $blind_time = $n->{spin_time} / $n->{contended};

counted_with_success('owner', 'short', $short, 8);
$n = counted('owner', 'holder asleep', $asleep, 4);
cmp_ok($n->{owner_off_cpu}, '>', 0, 'owner sees that the holder is asleep');
cmp_ok($n->{sleeps}, '>', 0, 'and sleeps');
cmp_ok($n->{spin_time} / $n->{contended}, '<', $blind_time / 2, 'and spins less than half as long as blind');

# No budget, no spinning, in any mode.
$node->safe_psql('postgres', 'ALTER SYSTEM SET adaptive_lwlock.max_spin = 0');
$n = counted('blind', 'no budget', $short, 8);
cmp_ok($n->{sleeps}, '>', 0, 'without a budget blind sleeps');

# The module's own source cannot see less than nothing: without a mirror the owner is never seen off its CPU.
$node->append_conf('postgresql.conf', "adaptive_lwlock.sched_state = 'off'");
$node->safe_psql('postgres', 'ALTER SYSTEM RESET adaptive_lwlock.max_spin');
$node->restart;
$n = counted('owner', 'no mirror', $asleep, 4);
is($n->{owner_off_cpu}, 0, 'without a mirror nobody is seen off the CPU');

my $since = "SELECT count(*) > 0, count(DISTINCT stats_reset), min(stats_reset) = pg_stat_adaptive_lwlock_reset_time() FROM pg_stat_adaptive_lwlock";
is($node->safe_psql('postgres', $since), 't|1|t', 'every row says since when it counts');
my $before = $node->safe_psql('postgres', 'SELECT pg_stat_adaptive_lwlock_reset_time()');
$node->restart;
is(counters($node, 'lock_generator')->{contended}, 0, 'a restart starts from nothing');
is($node->safe_psql('postgres', "SELECT pg_stat_adaptive_lwlock_reset_time() > '$before'"), 't', 'and from that moment');
$node->stop;
done_testing();
